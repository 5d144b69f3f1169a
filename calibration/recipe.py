"""The options that, with the model and the text, determine the result of a quantization: one value, kept in a file.

A recipe file is JSON that a person can read, edit and replay (`--recipe`):

    {"octavo_recipe": 1, "scheme": "W4A16@64", "algorithm": "gptq", "layers": {"re:.*down_proj": "W8A16@64"}}

Schemes are the presets' names, with '@' and a group size where another than the preset's is meant (@-1: a whole row).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta

from octavo.calibration.choices import (
    OUTSIDE,
    ActOrder,
    Algorithm,
    Effort,
    Format,
    Outside,
    RotationName,
    TransformType,
)
from octavo.flags import check_bounds
from octavo.quant.scheme import (
    GGUF,
    GGUF_MIXES,
    PRESETS,
    KVScheme,
    QuantScheme,
    SchemeError,
    Search,
    group,
    parse_kv,
)

KEEP = "none"  # a layer's scheme in a recipe's `layers`: left as it is
WHAT = "what to quantize, and how"  # headings of the flags
HOW = "algorithm"


class RecipeError(ValueError):
    """A recipe that can't be; the message says what, and what would work."""


class Recipe(msgspec.Struct, frozen=True):
    """How to quantize. Fields with a description are flags of `octavo quantize`.

    algorithm   auto is none yet: `resolved` puts one in its place before anything is planned
    scheme      of every linear layer that `layers` and `ignore` don't name, as spelled: 'W4A16@64'
    layers      pattern -> scheme, or 'none'; the first that matches holds
    dampening   more than the paper's 0.01: some ten thousand tokens tell the moments of a few thousand inputs badly,
                and another kind of text has others. Calibrated on docstrings, KL on prose fell from 0.207 to 0.185
                (SmolLM2) and from 0.113 to 0.089 (Qwen2 0.5B) at W4 g64
    """

    scheme: str
    algorithm: Annotated[
        Algorithm,
        Meta(
            description="rtn: round each weight by itself, without data. gptq: correct each column's error in the "
            "columns that follow. awq: scale channels by their inputs first. smoothquant: the same for W8A8. tune: "
            "begin with awq+gptq (W8A8: smoothquant+gptq), then learn roundings and scales by each block's output. "
            "auto: as --effort says",
            extra={"group": HOW},
        ),
    ] = "auto"
    format: Annotated[
        Format,
        Meta(
            description="compressed-tensors; gptq (v1, what every engine reads) or gptq_v2; awq (GEMM); fp8 "
            "(DeepSeek's native block format, for FP8_BLOCK and FP8); gguf (llama.cpp's, with its schemes)",
            extra={"group": "output"},
        ),
    ] = "compressed-tensors"
    layers: Mapping[str, str] = {}
    ignore: Annotated[
        tuple[str, ...],
        Meta(
            description="linear layers to leave as they are: a name ('model.layers.0.mlp.down_proj', 'down_proj'), a "
            "glob ('*.layers.0.*') or a regex ('re:.*o_proj'); routers always are, the head and "
            "embeddings unless --lm-head and --embedding name a scheme",
            extra={"group": WHAT, "metavar": "PATTERN", "default": "none"},
        ),
    ] = ()
    search: Annotated[
        Search | None,
        Meta(
            description="how scales are chosen: to cover every weight (absmax, also called minmax), or for the least "
            "squared error (mse)",
            extra={
                "group": HOW,
                "flag": "--observer",
                "spellings": {"minmax": "absmax"},
                "default": "mse for fewer than 8 bits and for GGUF, else absmax",
            },
        ),
    ] = None
    act_order: Annotated[
        ActOrder,
        Meta(
            description="GPTQ's order of columns: as they stand (none), by importance within the groups that they had "
            "before (static), or with groups formed in that order, which needs g_idx (group; --format gptq)"
        ),
    ] = "static"
    dampening: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="GPTQ's dampening, as a share of the Hessian's mean diagonal; raised where it isn't enough",
            extra={"flag": "--dampening-frac", "metavar": "X"},
        ),
    ] = 0.1
    true_sequential: Annotated[
        bool,
        Meta(
            description="measure the inputs of each part of a block once the parts before it are quantized; four times "
            "the forwards",
            extra={"default": "measure each block once"},
        ),
    ] = False
    smoothing: Annotated[
        float | None,
        Meta(
            ge=0,
            le=1,
            description="SmoothQuant's alpha, from 0 (weights as they are) to 1",
            extra={
                "flag": "--smoothing-strength",
                "metavar": "ALPHA",
                "default": "0.8 behind norms, the best of several behind linear layers",
            },
        ),
    ] = None
    rotations: Annotated[
        tuple[RotationName, ...],
        Meta(
            description="rotate channels before anything is rounded, so that none is larger than others, folded into "
            "the weights. R1: the residual stream; a tied head gets a weight of its own. R2: each head's values. R4: "
            "the input of down_proj, while serving: a CPU does that here, and vLLM",
            extra={"parse_each": str.upper, "default": "none"},
        ),
    ] = ()
    transform_type: Annotated[
        TransformType,
        Meta(description="the matrix of --rotations; random-hadamard has random signs before"),
    ] = "random-hadamard"
    transform_block_size: Annotated[
        int | None,
        Meta(
            ge=2,
            description="rotate R1's and R4's channels in blocks of so many, a power of two",
            extra={"metavar": "N", "default": "R1's all together, R4's in the largest blocks"},
        ),
    ] = None
    transform_seed: Annotated[
        int, Meta(ge=0, description="seed of random-hadamard's signs", extra={"metavar": "N"})
    ] = 0
    towers: Annotated[
        str | None,
        Meta(
            description="round the linear layers in a vision tower's blocks, too, by a scheme without calibration: "
            "W8A8, W8A16, FP8_DYNAMIC; --format compressed-tensors",
            extra={"group": WHAT, "metavar": "SCHEME", "default": "leave towers as they are"},
        ),
    ] = None
    lm_head: Annotated[
        str | None,
        Meta(
            description="round the head to nearest, too; a tied one gets a weight of its own: W8A16, W4A16@32, W8A8",
            extra={"group": WHAT, "metavar": "SCHEME", "default": "leave the head as it is"},
        ),
    ] = None
    embedding: Annotated[
        str | None,
        Meta(
            description="round the embedding to nearest, too; a head tied to it gets a weight of its own, which "
            "--lm-head rounds: W8A16, W4A16@32",
            extra={"group": WHAT, "metavar": "SCHEME", "default": "leave the embedding as it is"},
        ),
    ] = None
    kv_cache: Annotated[
        str | None,
        Meta(
            description="calibrate scales for a KV cache in fp8 or int8, one for a layer or, with /head, for each KV "
            "head: fp8, int8/head, k=bf16,v=fp8",
            extra={"group": WHAT, "flag": "--kv-cache-scheme", "metavar": "KV", "default": "none"},
        ),
    ] = None

    def __post_init__(self) -> None:
        _check_values(self)
        _check_tuning(self)
        _check_format(self)
        _check_outside(self)

    @property
    def default(self) -> QuantScheme:
        return parse_scheme(self.scheme)

    @property
    def kv(self) -> KVScheme | None:
        try:
            return None if self.kv_cache is None else parse_kv(self.kv_cache)
        except SchemeError as e:
            raise RecipeError(str(e)) from None

    @property
    def outside(self) -> dict[Outside, QuantScheme]:
        """The schemes of what stands in no block of the decoder, where it is to be quantized."""
        return {name: parse_scheme(spelled) for name in OUTSIDE if (spelled := getattr(self, name)) is not None}

    @property
    def solver(self) -> Literal["rtn", "gptq"]:
        """The algorithm that rounds the weights once they are scaled."""
        return "gptq" if self.algorithm.endswith("gptq") or self.tunes else "rtn"

    @property
    def scaling(self) -> Literal["awq", "smoothquant"] | None:
        """The algorithm whose scales per input channel are folded into the op before."""
        first = _usual(self.default) if self.tunes else self.algorithm.partition("+")[0]
        return "smoothquant" if first == "smoothquant" else "awq" if first == "awq" or self.tunes else None

    @property
    def tunes(self) -> bool:
        """True if what awq+gptq gives (of W8A8 smoothquant+gptq) is where tuning by the block's output begins."""
        return self.algorithm == "tune"

    @property
    def schemes(self) -> list[QuantScheme]:
        return [self.default, *(parse_scheme(s) for s in self.layers.values() if s != KEEP)]

    @property
    def needs_statistics(self) -> bool:
        """True if anything depends on the inputs of linear layers."""
        static = any(s.activation is not None and s.activation.has_stored_scale for s in self.schemes)
        return self.algorithm != "rtn" or static

    @property
    def needs_data(self) -> bool:
        return self.needs_statistics or self.kv is not None

    def resolved(self, effort: Effort = "auto", *, calibrates: bool = True) -> Recipe:
        """The recipe with an algorithm in auto's place: rtn where the model's blocks can't be run.

        Raises RecipeError for settings of another algorithm than that.
        """
        if self.algorithm != "auto":
            return self
        algorithm: Algorithm = "rtn"
        if calibrates and effort != "fast":
            algorithm = _usual(self.default)
        if calibrates and effort == "best":
            best = _best(self.default)
            algorithm = best if best != "tune" or all(_can_be_tuned(scheme) for scheme in self.schemes) else algorithm
        return msgspec.structs.replace(self, algorithm=algorithm)

    def with_rtn(self) -> Recipe:
        """The same schemes for the same layers, rounded to nearest."""
        how = {name: getattr(self, name) for name in ("format", "layers", "ignore", "search", *OUTSIDE, "kv_cache")}
        return Recipe(self.scheme, "rtn", **how)

    def schemes_of(self, kinds: Mapping[str, str]) -> dict[str, QuantScheme | None]:
        """Linear layers' schemes, by their full names, of their names in the block; None: left as it is.

        Names among the patterns are looked up: a choice for each of a mixture's experts has thousands.
        """
        patterns = list(self.layers)
        names = {pattern: i for i, pattern in enumerate(patterns) if not _WILD.search(pattern)}
        wild = [i for i, pattern in enumerate(patterns) if _WILD.search(pattern)]
        schemes = [None if s == KEEP else parse_scheme(s) for s in (*self.layers.values(), self.scheme)]
        found = {}
        for module, kind in kinds.items():
            by_name = [names[name] for name in (module, kind, kind.rpartition(".")[2]) if name in names]
            first = min(by_name, default=len(patterns))
            match = next((i for i in wild if i < first and means_layer(patterns[i], module, kind)), first)
            found[module] = schemes[match]
        return found

    def options(self) -> dict[str, str | float | bool | None]:
        """The algorithm's settings, for the report."""
        names = ["search", *(("act_order", "dampening", "true_sequential") if self.solver == "gptq" else ())]
        names += ["smoothing"] if self.scaling == "smoothquant" else []
        found: dict[str, str | float | bool | None] = {name: getattr(self, name) for name in names}
        if self.rotations:
            found["rotations"] = f"{', '.join(self.rotations)} ({self.transform_type})"
        return found

    def search_of(self, scheme: QuantScheme) -> Search:
        return self.search or ("mse" if scheme.weight.bits < 8 or self.format == "gguf" else "absmax")


def _usual(scheme: QuantScheme) -> Algorithm:
    """What loses least of the algorithms that take minutes; where none gains, rtn.

    Of four-bit floats too: of SmolLM2's first two blocks, rtn has a KL of 0.025 with NVFP4 and of 0.095 with MXFP4,
    awq+gptq 0.019 and 0.050.
    """
    weight = scheme.weight
    if weight.bits <= 4:
        return "awq+gptq"
    activation = scheme.activation
    is_int8 = activation is not None and activation.dtype == "int8" and weight.dtype == "int8"
    return "smoothquant" if is_int8 else "rtn"


def _best(scheme: QuantScheme) -> Algorithm:
    """What loses least of all algorithms; weights of 8 bits alone lose next to nothing by rtn.

    Of SmolLM2's first two blocks tune has a KL of 0.0085 with W4A8, where awq+gptq has 0.0101, of 0.0008 with W8A8
    (smoothquant 0.0011), and with FP8 no less than awq+gptq: 0.0020, where rtn has 0.0032.
    """
    if _usual(scheme) != "rtn":
        return "tune"
    return "rtn" if scheme.activation is None else "awq+gptq"


def _can_be_tuned(scheme: QuantScheme) -> bool:
    return scheme.weight.granularity.kind != "block"


def _check_values(recipe: Recipe) -> None:
    """Refuse other types, values out of range, patterns that are none, and settings of another algorithm."""
    for name, kind in _TYPES.items():
        value = getattr(recipe, name)
        try:
            msgspec.convert(value, type=kind)
        except msgspec.ValidationError as e:
            raise RecipeError(f"this is no recipe: {name} is {value!r}: {e}") from None
    try:
        check_bounds(recipe)
    except ValueError as e:
        raise RecipeError(str(e)) from None
    for pattern in (*recipe.layers, *recipe.ignore):
        try:
            means_layer(pattern, "", "")
        except re.error as e:
            raise RecipeError(f"pattern {pattern!r} is not a regex: {e}") from None
    _check_rotations(recipe)
    if recipe.algorithm == "auto":
        return
    if recipe.smoothing is not None and recipe.scaling != "smoothquant":
        raise RecipeError(f"smoothing is SmoothQuant's, and the algorithm is {recipe.algorithm}; smoothquant has it")
    for name in ("act_order", "dampening"):
        if getattr(recipe, name) != _DEFAULTS[name] and recipe.solver != "gptq":
            raise RecipeError(f"{name} is GPTQ's, and the algorithm is {recipe.algorithm}; gptq has it")
    if recipe.true_sequential and not recipe.needs_statistics:
        raise RecipeError(f"true_sequential is for algorithms that measure inputs, which {recipe.algorithm} does not")


def _check_rotations(recipe: Recipe) -> None:
    """Refuse settings of rotations where there are none."""
    for name in ("transform_type", "transform_block_size", "transform_seed"):
        if getattr(recipe, name) != _DEFAULTS[name] and not recipe.rotations:
            raise RecipeError(f"{name} is of rotations, and there are none; --rotations R1 R2 has it")
    if recipe.transform_block_size is not None and not {"R1", "R4"}.intersection(recipe.rotations):
        raise RecipeError("transform_block_size is R1's and R4's, and heads are rotated whole; --rotations R1 has it")
    if "R4" in recipe.rotations and recipe.format != "compressed-tensors":
        raise RecipeError(f"format {recipe.format} can't say what R4 does while serving; compressed-tensors can")


def _check_tuning(recipe: Recipe) -> None:
    """Refuse what a block's output isn't tuned for."""
    if not recipe.tunes:
        return
    for scheme in recipe.schemes:
        if not _can_be_tuned(scheme):
            raise RecipeError(
                f"algorithm tune doesn't know the scales of blocks, which {scheme} has; FP8_DYNAMIC works"
            )


def _check_outside(recipe: Recipe) -> None:
    """Refuse schemes of what is in no block that would need statistics, or that the output format can't say."""
    for name, scheme in recipe.outside.items():
        if recipe.format != "compressed-tensors":
            raise RecipeError(f"{name}: octavo writes none in format {recipe.format}; compressed-tensors works")
        if name == "embedding" and (scheme.activation or scheme.weight.is_float or not scheme.weight.symmetric):
            raise RecipeError(
                f"embedding: {scheme} is not of symmetric integers alone, which is what engines look up; W8A16 works"
            )
        if scheme.activation is not None and scheme.activation.has_stored_scale:
            needed = "images" if name == "towers" else "measured inputs"
            raise RecipeError(
                f"{name}: {scheme} has scales of inputs, for which {needed} would be needed; FP8_DYNAMIC works"
            )


def _check_format(recipe: Recipe) -> None:
    """Refuse what the output format can't say."""
    name = recipe.format
    for scheme in recipe.schemes:
        w = scheme.weight
        a = scheme.activation
        if name in ("gptq", "gptq_v2") and (w.is_float or a is not None):
            raise RecipeError(f"format {name} holds integer weights with plain inputs, not {scheme}; W4A16 is one")
        if name == "gptq" and not w.symmetric:
            raise RecipeError("format gptq stores each zero point minus 1, so it can't store 0; --format gptq_v2 can")
        if name == "awq" and (w.dtype != "int4" or a is not None or w.granularity.kind != "group"):
            raise RecipeError(f"format awq holds 4-bit weights in groups, not {scheme}; W4A16 and W4A16_ASYM are")
        if name == "fp8" and (w.dtype != "fp8_e4m3" or w.granularity.kind in ("channel", "group")):
            raise RecipeError(f"format fp8 holds FP8_BLOCK and FP8, not {scheme}")
        is_gguf = w in GGUF.values() and a is None
        if name == "gguf" and not is_gguf:
            raise RecipeError(
                f"format gguf holds {', '.join((*GGUF_MIXES, *GGUF))}, not {scheme}; --scheme Q4_K_M is one"
            )
        if name != "gguf" and (w.minima or w.dtype in ("int6", "int5")):
            raise RecipeError(f"{scheme} is what blocks of GGUF files hold; --format gguf writes it, not {name}")
    if recipe.format in ("awq", "fp8") and len(set(recipe.schemes)) > 1:
        raise RecipeError(f"format {name} has one scheme for all layers; compressed-tensors has several")
    if recipe.kv is not None and name != "compressed-tensors":
        raise RecipeError(f"format {name} has no place for KV-cache scales; --format compressed-tensors has")
    if recipe.act_order == "group" and recipe.solver == "gptq" and name not in ("gptq", "gptq_v2"):
        raise RecipeError(
            f"act_order group needs g_idx, which format {name} no longer stores; 'static' needs none, and "
            "--format gptq stores it"
        )


def parse_scheme(spelled: str) -> QuantScheme:
    """'W4A16', 'w4a16@64', 'W8A16@-1'. Raises RecipeError."""
    name, at, size = spelled.partition("@")
    scheme = PRESETS.get(name.upper())
    blocks = GGUF.get(GGUF_MIXES.get(name.upper(), name.upper()))
    if blocks is not None and at:
        raise RecipeError(f"group_size {size}: {name.upper()} has groups of {blocks.granularity.group_size} only")
    if blocks is not None:
        return QuantScheme(blocks)
    if scheme is None:
        raise RecipeError(f"scheme {spelled!r} is unknown; known are {', '.join((*PRESETS, *GGUF_MIXES, *GGUF))}")
    if not at:
        return scheme
    if not re.fullmatch(r"-1|[1-9]\d{0,5}", size):
        raise RecipeError(f"scheme {spelled!r}: {size!r} is no group size; 32, 64, 128 and -1 are")
    if scheme.weight.scales != "float":
        raise RecipeError(
            f"group_size {size}: {name.upper()} has groups of {scheme.weight.granularity.group_size} only"
        )
    if scheme.weight.granularity.kind != "group":
        grouped = [
            name
            for name, preset in PRESETS.items()
            if preset.weight.granularity.kind == "group" and preset.weight.scales == "float"
        ]
        raise RecipeError(
            f"group_size {size}: {name.upper()} scales per {scheme.weight.granularity}; a group size is for "
            f"{', '.join(grouped)}"
        )
    return replace(scheme, weight=replace(scheme.weight, granularity=group(int(size))))


def means_layer(pattern: str, module: str, kind: str) -> bool:
    """Match a layer's full name, its name in the block or its last part, with a glob, or with 're:' and a regex."""
    if pattern.startswith("re:"):
        from octavo.quant.formats.compressed_tensors_config import matches  # imports torch, which flags do without

        return matches(module, pattern)
    return pattern in (module, kind, kind.rpartition(".")[2]) or fnmatchcase(module, pattern)


_WILD = re.compile(r"^re:|[*?\[]")  # patterns that aren't plain names
_TYPES = get_type_hints(Recipe)
_DEFAULTS = {known.name: known.default for known in msgspec.structs.fields(Recipe)}


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The content of a recipe file, which `read_recipe` reads back as the same recipe."""
    return {"octavo_recipe": 1, **msgspec.to_builtins(recipe)}


def read_recipe(path: Path) -> Recipe:
    """A recipe file. Raises RecipeError for one that isn't, naming the key that is wrong."""
    try:
        values = msgspec.json.decode(path.read_text("utf-8"), type=dict[str, Any])
    except OSError as e:
        raise RecipeError(f"{path} can't be read: {e.strerror}") from e
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path} is not a recipe: {e}") from e
    version = values.pop("octavo_recipe", None)
    if version != 1:
        raise RecipeError(f"{path}: octavo_recipe is {version!r}; 1 is what this octavo reads")
    if unknown := sorted(values.keys() - _TYPES.keys()):
        raise RecipeError(f"{path} is not a recipe: it has the unknown field `{unknown[0]}`")
    if "scheme" not in values:
        raise RecipeError(f"{path} is not a recipe: it has no `scheme`")
    for name in ("ignore", "rotations"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    return Recipe(**values)
