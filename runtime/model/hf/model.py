"""--model-impl hf: any decoder-only architecture of transformers, over octavo's paged cache.

The model is transformers' own, in its own code; only its attention is replaced (hf_attention.py), and only if the model
proves at load that the replacement is right for it (hf_checks.py). Slower than the decoder: no fused layers. Dense
checkpoints only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import Cache
from octavo.kernels.native.huge_memory import in_huge_pages
from octavo.quant.checkpoint import Checkpoint, quantization_dict, read_config
from octavo.quant.scheme import AT_LOAD
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.adapters import ModelAdapters
from octavo.runtime.model.device import Device
from octavo.runtime.model.hf.attention import PROBE, SERVE, HFModelError, Step, call, describe, register
from octavo.runtime.model.hf.checks import BLOCK_SIZE, Proven, check_against_transformers, probe_model
from octavo.runtime.model.layers import GroupedExperts
from octavo.runtime.model.model import CacheShape, KVScales, KVShape, LayerRow, Tap, distinct_bytes
from octavo.runtime.model.operators import Ops, only_rank
from octavo.runtime.model.sources import some
from octavo.runtime.source_messages import Source


class HFModel:
    """A `Model` (runtime/model/model.py) that is one of transformers' own, with the attention SERVE."""

    kv_scales: KVScales | None = None
    kv_dtype: str | None = None
    # between its blocks, and behind them, is code that nobody here has read
    gives_hidden = False
    best = None
    adapters: ModelAdapters | None = None
    pooler = None
    num_token_types = 0
    tower = None
    of_driver = staticmethod(only_rank)
    source: Source | None = None
    first_layer = 0
    compiles_kernels = False
    capturable = False
    recordable = False
    taps_all_rows = False

    def __init__(
        self, model: Any, proven: Proven, *, dtype: torch.dtype, ops: Ops, max_position: int, notes: list[str]
    ) -> None:
        self.architecture = type(model).__name__
        self.vocab_size = proven.vocab_size
        self.hidden_size: int = model.get_input_embeddings().weight.shape[1]
        self.max_position = max_position
        self.kv_shapes: list[CacheShape] = [KVShape(shape.num_kv_heads, shape.head_dim) for shape in proven.shapes]
        self.kv_windows = [shape.window for shape in proven.shapes]
        self.dtype = dtype
        self.device: torch.device = model.device
        self.notes = notes
        self.ranks: tuple[str, ...] = ()
        self.ops = ops
        self._model = model
        self._proven = proven
        self.weight_bytes = distinct_bytes(self.tensors())

    @property
    def num_layers(self) -> int:
        return len(self.kv_shapes)

    def tensors(self) -> Iterator[Tensor]:
        yield from self._model.parameters()
        yield from self._model.buffers()

    @property
    def mixtures(self) -> list[GroupedExperts]:
        return []

    @torch.inference_mode()
    def forward(self, step: StepInputs, caches: list[Cache], tap: Tap | None = None) -> Tensor:
        """Logits [num logits_index, vocab_size] float32 of the tokens at logits_index; writes the caches."""
        if tap is not None:
            raise self._no_hidden()
        seen = Step(self.ops, step.by_group(), self._proven.shapes, caches)
        index = step.logits_index
        if self._proven.takes_index:
            return call(self._model, step.token_ids, step.positions, seen, logits_to_keep=index).float()
        return call(self._model, step.token_ids, step.positions, seen)[index].float()

    def entering(self, step: StepInputs) -> Tensor:  # noqa: ARG002
        raise self._no_hidden()

    def hidden(
        self,
        step: StepInputs,  # noqa: ARG002
        caches: list[Cache],  # noqa: ARG002
        tap: Tap | None = None,  # noqa: ARG002
        entering: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        raise self._no_hidden()

    def logits(self, hidden: Tensor, step: StepInputs | None = None) -> Tensor:  # noqa: ARG002
        raise self._no_hidden()

    def normed(self, residual: Tensor) -> Tensor:  # noqa: ARG002
        raise self._no_hidden()

    @property
    def token_table(self) -> Tensor:
        raise self._no_hidden()

    def _no_hidden(self) -> HFModelError:
        return HFModelError(
            f"{self.architecture} gives logits alone; hidden states can be had of octavo's own decoders "
            "(--model-impl octavo)"
        )

    def report_layers(self) -> list[LayerRow]:
        """Two rows: what transformers computes, and what octavo does."""
        name = str(self.dtype).removeprefix("torch.")
        return [("all but attention", name, "transformers"), ("attention", name, self.ops.name)]


def load_hf_model(config: EngineConfig, dtype: torch.dtype, device: Device, notes: list[str]) -> HFModel:
    """Load a dense checkpoint with transformers, and have it prove itself. Raises HFModelError, CheckpointError."""
    directory = Path(config.model)
    if quantization_dict(read_config(directory)) is not None or config.dtype in AT_LOAD:
        raise HFModelError("only dense checkpoints, in float32, bfloat16 or float16; octavo's decoder quantizes")
    if config.load_format == "dummy" or config.lm_head_dtype != "auto":
        raise HFModelError("there is no --load-format dummy and no --lm-head-dtype with it")
    hf_config = read_hf_config(config, directory)
    max_position = choose_max_position(hf_config, config.max_model_len, notes)
    Checkpoint.open(directory)  # refuses pickles and incomplete downloads, by name
    model = read_model(directory, hf_config, dtype, config.trust_remote_code).to(device.torch_device)
    for parameter in model.parameters():
        parameter.data = in_huge_pages(parameter.data)
    ops = device.ops(dtype)
    register()
    try:
        model.set_attn_implementation(PROBE)
        proven = probe_model(model, dtype, ops, max(max_position, BLOCK_SIZE))
        model.set_attn_implementation(SERVE)
        served = HFModel(model, proven, dtype=dtype, ops=ops, max_position=max_position, notes=notes)
        check_against_transformers(served, model)
    except HFModelError:
        raise
    except Exception as error:  # raised by code that octavo doesn't know, so of any type
        raise HFModelError(f"{type(model).__name__} fails without its own attention ({describe(error)})") from error
    return served


def read_hf_config(config: EngineConfig, directory: Path) -> Any:
    """The checkpoint's config as transformers reads it; refused if it isn't a decoder's."""
    from transformers import AutoConfig, __version__

    try:
        hf_config = AutoConfig.from_pretrained(
            directory, trust_remote_code=config.trust_remote_code, local_files_only=True
        )
    except Exception as error:
        hint = ""
        if "auto_map" in read_config(directory) and not config.trust_remote_code:
            hint = "; its code is in the checkpoint: --trust-remote-code runs it"
        raise HFModelError(f"transformers {__version__} can't read config.json ({describe(error)}){hint}") from error
    if getattr(hf_config, "is_encoder_decoder", False):
        raise HFModelError(f"{hf_config.model_type} is an encoder-decoder; only decoders are served")
    return hf_config


def choose_max_position(hf_config: Any, wanted: int | None, notes: list[str]) -> int:
    """The longest sequence that is served. A rope that depends on the length is served up to where it would change."""
    text = hf_config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None) or wanted
    if longest is None:
        raise HFModelError("config.json doesn't say how many positions the model has; --max-model-len does")
    why = ""
    for rope in ropes_of(text):
        kind = rope.get("rope_type")
        if kind == "longrope":
            longest = min(longest, rope["original_max_position_embeddings"])
        if kind in ("longrope", "dynamic"):
            why = f": its rope, of type {kind}, changes beyond them"
            notes.append(f"rope type {kind}: sequences end at {longest} tokens, beyond which it would change")
    if wanted is not None and wanted > longest:
        raise HFModelError(f"--max-model-len {wanted}: {longest} positions can be served{why}")
    return wanted or longest


def ropes_of(text: Any) -> list[dict[str, Any]]:
    """The rope parameters of a config: one set, or one for each kind of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]


def read_model(directory: Path, hf_config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model with all its weights on the CPU; refused unless it is the one that config.json names, completely."""
    from transformers import AutoModelForCausalLM

    hf_config = copy.deepcopy(hf_config)  # from_pretrained writes the attention's name into the config that it is given
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            config=hf_config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:
        raise HFModelError(f"transformers can't load the checkpoint ({describe(error)})") from error
    name = type(model).__name__
    if (named := hf_config.architectures or [name]) and name not in named:
        raise HFModelError(f"config.json names {named[0]}, which transformers has no causal language model for")
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if keys := sorted(map(str, report[kind])):
            raise HFModelError(f"{name} and the checkpoint don't fit together: {kind.replace('_', ' ')} {some(keys)}")
    if not getattr(type(model), "_supports_attention_backend", False):
        raise HFModelError(f"{name} doesn't use transformers' AttentionInterface, so its attention can't be replaced")
    return model.eval()
