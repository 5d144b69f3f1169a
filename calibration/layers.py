"""Finds the linear layers of a checkpoint, and checks that a scheme fits them.

By their tensors' names, or as the layout of a model without code here has them from transformers' code (`linears`).

Every decoder that transformers saves keeps its blocks under `...layers.N.`, an encoder also under `...layer.N.`, and in
them the two-dimensional `.weight`s are linear layers, routers aside. A checkpoint without such names (GPT-2 keeps
transposed weights) is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from octavo.calibration.recipe import means_layer
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.embedding_names import is_embedding
from octavo.quant.formats.reading import FLOATS
from octavo.quant.mtp_names import is_mtp, mtp_patterns
from octavo.quant.scheme import GROUP_SIZES, TENSOR, QuantScheme
from octavo.quant.split_experts import LAYOUTS

BLOCK = re.compile(r"^(?P<prefix>(?:\w+\.)*?)(?P<list>layers?|block)\.(?P<index>\d+)\.(?P<kind>.+)\.weight$")
NUMBERED = re.compile(r"^(?P<prefix>(?:\w+\.)*?)(?P<list>[a-z]\w*)\.(?P<index>\d+)\.(?P<kind>.+)\.weight$")
"""Blocks under whatever name, where it is known which weights are linear layers'."""
TOWER_BLOCK = re.compile(
    r"^(?:\w+\.)*(?:vision_tower|vision_model|visual)\.(?:\w+\.)*(?:layers?|blocks?)\.(?P<index>\d+)\.(?P<kind>.+)\.weight$"
)
OTHER_TOWERS = re.compile(r"(^|[._])(vision|visual|audio|encoder|image)")
ROUTER = re.compile(
    r"(^|\.)(mlp|block_sparse_moe|feed_forward|moe|mixer)\.(gate|router)$|router|shared_expert_gate$|^altup\."
)
EXPANSION = re.compile(r"(^|\.)kv_b_proj$")
"""What makes keys and values of latents: engines multiply queries by it, and serve it dequantized."""
GATES = re.compile(r"(^|\.)(linear_attn\.in_proj_(ba|b|a)|self_attn\.(b|f_a|f_b|g_a|g_b)_proj)$")
"""What makes a state's decays, which all later tokens are multiplied by: a few rows, which engines don't quantize."""
EXPERT = re.compile(r"\.experts\.\d+\.")
EMBEDDING = re.compile(r"embed(?!.*projection)|wte|wpe|^shared$|\.shared$")
DISTANCES = re.compile(r"\.relative_attention_bias\.weight$")
"""Numbers of each head for buckets of distances, which have two dimensions as well."""
MOST_LAYERS = 10_000
WIDEST_KERNEL = 16  # positions or channels of a convolution within a block, which has three dimensions as well
NUM_LAYERS = ("num_hidden_layers", "n_layers", "n_layer")  # names of the key, the last two of encoders
OF_BOTH = ("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers")  # of an encoder and a decoder
FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("block_sparse_moe.gate_proj", "block_sparse_moe.up_proj"),
    ("feed_forward.gate_proj", "feed_forward.up_proj"),
    ("feed_forward.w1", "feed_forward.w3"),
    ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
)
"""Layers that engines make one of, by their names in a block."""


class QuantizeError(ValueError):
    """A model that can't be quantized as asked; the message says why, and what would work."""


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a decoder block.

    kind  its name in the block, the same for all experts: 'self_attn.q_proj', 'mlp.experts.*.up_proj'
    """

    module: str
    index: int
    kind: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Selection:
    """The layers to quantize, by module, and for the config's ignore list others' names and regexes ('re:...')."""

    linears: dict[str, LinearLayer]
    ignore: list[str]


def select_linears(checkpoint: Checkpoint, patterns: list[str]) -> Selection:
    """All linear layers of the decoder blocks but routers, latents' expansions, states' gates, and those that a
    pattern names; none of MTP heads.

    A pattern is a module's full name, its name in the block, a glob ('*.down_proj') or a regex ('re:.*mlp'). Raises
    QuantizeError for one that matches nothing, for blocks that are missing, and when no block is found.
    """
    found, others = _find(checkpoint)
    if checkpoint.layout.linears is None:
        _check_blocks(checkpoint, found)
    used: set[str] = set()
    linears = {}
    ignore = ["lm_head", *(["proj_out"] if checkpoint.layout.has_encoder else [])]
    for linear in found:
        matching = [p for p in patterns if means_layer(p, linear.module, linear.kind)]
        used.update(matching)
        if matching or any(kept.search(linear.kind) for kept in (ROUTER, EXPANSION, GATES)):
            ignore.append(linear.module)
        else:
            linears[linear.module] = linear
    unused = [p for p in patterns if p not in used and not any(means_layer(p, o, o) for o in (*others, "lm_head"))]
    if unused:
        raise QuantizeError(f"--ignore {' '.join(unused)}: matches no linear layer; kinds are {_kinds(found)}")
    if not linears:
        raise QuantizeError("nothing is left to quantize: every linear layer is ignored")
    heads = mtp_patterns(checkpoint.names, checkpoint.config)
    return Selection(linears, ignore + [o for o in others if o != "lm_head"] + heads)


def select_towers(checkpoint: Checkpoint, patterns: Sequence[str]) -> dict[str, LinearLayer]:
    """The linear layers in the blocks of a vision tower but those that a pattern names, by module.

    Raises QuantizeError where there are none.
    """
    found = {}
    for file in checkpoint.files.values():
        for name, spec in file.specs.items():
            match = TOWER_BLOCK.match(name)
            if match is None or len(spec.shape) != 2 or spec.dtype not in FLOATS:
                continue
            module = name.removesuffix(".weight")
            kind = f"tower.{match['kind']}"
            if not any(means_layer(p, module, kind) for p in patterns):
                found[module] = LinearLayer(module, int(match["index"]), kind, *spec.shape)
    if not found:
        raise QuantizeError("towers: the checkpoint has no vision tower with linear layers that are to be quantized")
    return found


def _find(checkpoint: Checkpoint) -> tuple[list[LinearLayer], list[str]]:
    """Linear layers in decoder blocks, and modules elsewhere that a reader may take for linear layers."""
    found = []
    known = checkpoint.layout.linears
    others = sorted(checkpoint.layout.kept)
    for file in checkpoint.files.values():
        for name, spec in file.specs.items():
            head = is_mtp(name, checkpoint.config)
            if _may_be_experts(name, spec.shape) and not head:
                raise QuantizeError(
                    f"{name} {list(spec.shape)}: experts fused into one tensor are split where their layout is known, "
                    f"of {', '.join(LAYOUTS)}; model_type {checkpoint.config.get('model_type')!r} is none of them"
                )
            if len(spec.shape) != 2 or not name.endswith(".weight") or DISTANCES.search(name):
                continue
            module = name.removesuffix(".weight")
            match = (BLOCK if known is None else NUMBERED).match(name)
            is_linear = known is None or module in known or EXPERT.search(name) is not None
            of_tower = match and checkpoint.layout.is_decoder and OTHER_TOWERS.search(match["prefix"])
            if match and is_linear and not head and not of_tower:
                if spec.dtype not in FLOATS:
                    raise QuantizeError(f"{name} is {spec.dtype}, and config.json doesn't say that it is quantized")
                found.append(LinearLayer(module, int(match["index"]), kind_in_block(match["kind"]), *spec.shape))
            elif (match is None or module in known) if known is not None else not EMBEDDING.search(module):
                others.append(module)
    if not found and known is not None:
        raise QuantizeError(
            "transformers' code of this model has no linear layers (nn.Linear) in numbered blocks: there is nothing "
            "that could be quantized (GPT-2's Conv1D and Falcon's FalconLinear are others)"
        )
    if not found:
        raise QuantizeError("no decoder block was found: no two-dimensional weight is named ...layers.N.<layer>.weight")
    return found, others


def kind_in_block(name: str) -> str:
    """A linear layer's name in its block, with '*' for an expert's number."""
    return EXPERT.sub(".experts.*.", f".{name}")[1:]  # experts may be the block's own


def _may_be_experts(name: str, shape: Sequence[int]) -> bool:
    """A matrix for each of many: of experts, under whatever name (GraniteMoE's is input_linear). Convolutions are
    three-dimensional, too, but narrow.
    """
    return len(shape) == 3 and (
        ".experts." in name or (BLOCK.match(name) is not None and min(shape[1:]) > WIDEST_KERNEL)
    )


def _check_blocks(checkpoint: Checkpoint, found: list[LinearLayer]) -> None:
    config = checkpoint.config
    text = config.get("text_config") or config
    count = next((text[name] for name in NUM_LAYERS if name in text), None)
    kinds = text.get("layers_block_type")
    if count is None and isinstance(kinds, list):
        count = len(kinds)
    if checkpoint.layout.has_encoder:
        counts = [config[name] for name in OF_BOTH if type(config.get(name)) is int]
        count = max(counts, default=None)
    if not config.get("model_type") or type(count) is not int:
        raise QuantizeError("config.json lacks model_type or num_hidden_layers: not a decoder that transformers wrote")
    if not 1 <= count <= MOST_LAYERS:
        raise QuantizeError(f"config.json says {count} layers, which no model has")
    present = {linear.index for linear in found}
    missing = sorted(set(range(count)) - present)
    if missing:
        raise QuantizeError(f"config.json says {count} layers, but the files hold no weights for {missing}")
    if checkpoint.layout.blocks_alike:
        _check_alike(found, count)


def _check_alike(found: list[LinearLayer], count: int) -> None:
    """Each kind of layer as often in one block as in any other."""
    by_kind: dict[str, Counter[int]] = {}
    for linear in found:
        by_kind.setdefault(linear.kind, Counter())[linear.index] += 1
    for kind, blocks in by_kind.items():
        if holes := [index for index in range(count) if blocks[index] < max(blocks.values())]:
            raise QuantizeError(f"{kind}.weight is missing in layers {holes}")


def _kinds(linears: list[LinearLayer]) -> str:
    return ", ".join(dict.fromkeys(linear.kind for linear in linears))


def check_group_size(scheme: QuantScheme, linears: dict[str, LinearLayer]) -> None:
    """Refuse a group size that doesn't divide some layer's in_features, with all such layers and what would work."""
    size = scheme.weight.granularity.group_size
    if size is None:
        return
    bad = Counter((x.kind, x.in_features) for x in linears.values() if x.in_features % size)
    if not bad:
        return
    if scheme.weight.scales != "float":
        layers = ", ".join(f"{kind} {k} ({count} layers)" for (kind, k), count in bad.items())
        kinds = " ".join(dict.fromkeys(kind for kind, _ in bad))
        raise QuantizeError(
            f"{scheme} has groups of {size}, which doesn't divide in_features of {layers}; --ignore {kinds} leaves them"
        )
    fitting = [g for g in GROUP_SIZES if all(x.in_features % g == 0 for x in linears.values())]
    best = f"{max(fitting)} is the largest that fits all" if fitting else "-1, a whole row, is all that fits"
    layers = ", ".join(f"{kind} {k} ({count} layers)" for (kind, k), count in bad.items())
    raise QuantizeError(
        f"group_size {size} does not divide in_features of {layers}; {best}: "
        f"--group-size {max(fitting) if fitting else -1}"
    )


def joined_with(module: str) -> tuple[str, ...]:
    """A layer and those that engines make one with it, by their full names; an expert's stand beside it."""
    owner, _, name = module.rpartition(".")
    for fused in FUSED:
        names = tuple(kind.rpartition(".")[2] for kind in fused)
        if name in names:
            return tuple(f"{owner}.{each}" for each in names)
    return (module,)


def mixed_experts(schemes: Mapping[str, QuantScheme]) -> list[str]:
    """Warn of layers whose experts have several schemes, which octavo's grouped GEMMs and other engines don't take."""
    of_layers: dict[str, set[QuantScheme]] = {}
    for module, scheme in schemes.items():
        if EXPERT.search(module):
            of_layers.setdefault(module.partition(".experts.")[0], set()).add(scheme)
    mixed = [layer for layer, found in of_layers.items() if len(found) > 1]
    if not mixed:
        return []
    return [
        f"experts of {len(mixed)} layers have several schemes: octavo serves them, on a GPU one by one and without "
        "CUDA graphs; vLLM wants one for all experts of a layer, as --expert-schemes layer chooses"
    ]


def of_embeddings(schemes: Mapping[str, QuantScheme]) -> list[str]:
    """Warn of what others do with a quantized embedding."""
    return [
        f"{module} is quantized: vLLM looks such embeddings up from 0.29 on, on GPUs, in those of its models that tell "
        "them of quantization; transformers 5.24 loads the model with CompressedTensorsConfig(dequantize=True) alone, "
        "and right only where all layers have one scheme; octavo decodes it at load"
        for module in schemes
        if is_embedding(module)
    ]


def portability_warnings(
    scheme: QuantScheme, selection: Selection, format: str = "compressed-tensors", model_type: str = ""
) -> list[str]:
    """Warn of what other engines don't load although it is legal."""
    warnings: list[str] = []
    if format == "gguf":
        return warnings
    has_experts = any("experts." in linear.kind for linear in selection.linears.values())
    if model_type in ("gpt_oss", "gemma4", "gemma4_text") and has_experts:
        warnings.append(
            f"{model_type}: each expert is written as linear layers of its own, which transformers 5.24 with "
            "compressed-tensors 0.20 doesn't find"
        )
    block = scheme.weight.granularity.block
    if block is not None:
        rows, columns = block
        ragged = Counter(
            (x.kind, x.out_features, x.in_features)
            for x in selection.linears.values()
            if x.out_features % rows or x.in_features % columns
        )
        if ragged:
            layers = ", ".join(f"{kind} [{n}, {k}]" for kind, n, k in ragged)
            warnings.append(
                f"{rows}x{columns} blocks don't divide {layers}: the blocks at the edges are short, which is legal on "
                "disk and which octavo serves, but vLLM and transformers don't load such a model; FP8_DYNAMIC is "
                "what they do load"
            )
    for fused in FUSED:
        kept = set(selection.ignore)
        of_kind = [module for module, linear in selection.linears.items() if linear.kind in fused]
        if any(kept.intersection(joined_with(module)) for module in of_kind):
            warnings.append(f"{', '.join(fused)} are quantized only in part: vLLM fuses them and wants them alike")
    is_int8 = scheme.weight.dtype == "int8" and scheme.activation is not None
    if is_int8 and format == "compressed-tensors" and has_experts:
        warnings.append(
            "int8 experts with int8 inputs: transformers 5.24 with compressed-tensors 0.20 finds none of their tensors "
            "and doesn't load the model; octavo does, and what transformers loads is FP8_DYNAMIC or W4A16"
        )
    if format == "fp8" and scheme.weight.granularity == TENSOR:
        warnings.append(
            "one scale a tensor: transformers 5.24 takes such scales by names of its own (weight_scale_inv, "
            "activation_scale), says no error without them, and computes another model; vLLM reads them, and "
            "--format compressed-tensors is read by both"
        )
    if not scheme.weight.symmetric and format == "compressed-tensors":
        warnings.append(
            "asymmetric: transformers with compressed-tensors 0.20 reports the packed zero points as a MISMATCH and "
            "doesn't load the model; 0.19 and vLLM read them"
        )
    return warnings
