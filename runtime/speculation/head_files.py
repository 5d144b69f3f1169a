"""Loads a head beside the model that is served: every tensor of its checkpoint is read, or the head is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from octavo.quant.checkpoint import Checkpoint
from octavo.quant.linear import Linear, make_linear
from octavo.quant.model_files import CheckpointError
from octavo.quant.printable import some
from octavo.quant.qparams import Weight
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.config_types import ModelConfigError
from octavo.runtime.model.device import Device
from octavo.runtime.model.dtypes import DTYPES
from octavo.runtime.model.layers import AddNorm, Embedding
from octavo.runtime.model.model import Model
from octavo.runtime.model.sources import UNUSED_SUFFIXES, CheckpointSource, LoadError
from octavo.runtime.model.spec import AttentionSpec, DecoderSpec
from octavo.runtime.model.weights import DecoderBuilder
from octavo.runtime.scheduling.plan import SchedulerConfig
from octavo.runtime.speculation.head_config import EagleConfig, read_eagle_config, read_mtp_config
from octavo.runtime.speculation.heads import EagleHead, Head, MtpHead
from octavo.runtime.speculation.own_config import own_config

PICKLE = "pytorch_model.bin"
OF_MODEL = ("verifier_norm.weight", "verifier_lm_head.weight")
"""Copies of the model's own tensors that speculators may write; nothing reads them."""


@torch.inference_mode()
def load_head(config: EngineConfig, model: Model, limits: SchedulerConfig, notes: list[str]) -> Head:
    """The head that a configuration names, for this model. Raises ValueError."""
    asked = config.speculative_config
    assert asked is not None
    if not model.gives_hidden:
        raise ValueError(
            f"--speculative-config: {model.architecture} runs in transformers' own code, which does not say what a "
            "head reads; the methods ngram, suffix and draft_model work"
        )
    directory = Path(asked.model or config.model)
    load = _load_eagle if asked.method == "eagle3" else _load_mtp
    try:
        return load(config, directory, model, limits, notes)
    except (LoadError, CheckpointError, ModelConfigError) as error:
        raise ValueError(f"--speculative-config: the head {directory}: {error}") from error


def _load_eagle(
    config: EngineConfig, directory: Path, model: Model, limits: SchedulerConfig, notes: list[str]
) -> EagleHead:
    checkpoint = _opened(directory)
    read = read_eagle_config(checkpoint.config)
    layers = tuple(number - 1 for number in read.ids_of(model.num_layers))
    _check_sizes(read, model)
    if checkpoint.quantization is not None:
        raise LoadError("it is quantized, and heads are read as they were trained: leave it as it was")
    parts = _Parts(config, read.spec, _Source(checkpoint, _named_as_trained(checkpoint)), model, limits, notes)
    hidden = read.spec.hidden_size
    width = len(layers) * model.hidden_size
    token_ids = _token_ids(checkpoint, read, model.vocab_size)
    rows = read.draft_vocab_size or model.vocab_size
    head = EagleHead(
        layers=layers,
        layer=parts.builder.layer(0, num_inputs=2).followed_by(parts.norm("norm")),
        embedding=parts.embedding(is_own=checkpoint.has("embed_tokens.weight")),
        hidden_norm=parts.norm("layers.0.hidden_norm"),
        fc=parts.linear("fc", hidden, width),
        model=model,
        lm_head=parts.linear("lm_head", rows, hidden, torch.float32) if checkpoint.has("lm_head.weight") else None,
        token_ids=token_ids,
        state_norms=_state_norms(read, parts, len(layers), model.hidden_size),
        residual_normed=read.residual_normed,
        hidden_normed=read.hidden_normed,
    )
    if head.lm_head is None and (rows != model.vocab_size or hidden != model.hidden_size):
        raise LoadError(f"it has no lm_head.weight, and the model's has {model.vocab_size} rows of {model.hidden_size}")
    _refuse_unread(checkpoint)
    return head


MTP_NAMES = {
    "norm": "final_layernorm",
    "token_norm": "token_layernorm",
    "hidden_norm": "hidden_layernorm",
    "input_proj": "input_proj",
}
"""What stands around the layer, by its names in octavo and in MiMo's and speculators' files."""


def _load_mtp(
    config: EngineConfig, directory: Path, model: Model, limits: SchedulerConfig, notes: list[str]
) -> MtpHead:
    checkpoint = _opened(directory)
    read = read_mtp_config(checkpoint.config)
    hidden = read.spec.hidden_size
    if (read.spec.vocab_size, hidden) != (model.vocab_size, model.hidden_size):
        raise LoadError(
            f"it was trained for {read.spec.vocab_size} tokens and hidden states of {hidden} numbers, and the model "
            f"has {model.vocab_size}, of {model.hidden_size}"
        )

    def named(name: str) -> str:
        part, dot, rest = name.removeprefix("layers.0.").partition(".")
        return f"{read.prefix}{MTP_NAMES.get(part, part)}{dot}{rest}"

    parts = _Parts(config, read.spec, _Source(checkpoint, named), model, limits, notes)
    head = MtpHead(
        layers=(model.num_layers - 1,),
        layer=parts.builder.layer(0).followed_by(parts.norm("norm")),
        embedding=parts.embedding(is_own=False),
        token_norm=parts.norm("token_norm"),
        hidden_norm=parts.norm("hidden_norm"),
        input_proj=parts.linear("input_proj", hidden, 2 * hidden),
        model=model,
        token_first=read.token_first,
    )
    _refuse_unread(checkpoint, read.prefix if read.is_model else "")
    return head


def _opened(directory: Path) -> Checkpoint:
    if (directory / PICKLE).is_file() and not any(directory.glob("*.safetensors")):
        raise LoadError(
            f'{PICKLE} is a pickle, which can run code when it is loaded and is not read; python -c "import torch, '
            f"safetensors.torch as s; s.save_file(torch.load('{PICKLE}', weights_only=True), 'model.safetensors')\" in "
            "its directory writes what is read"
        )
    return Checkpoint.open(directory)


def _check_sizes(read: EagleConfig, model: Model) -> None:
    """Raise LoadError where it was trained for another model."""
    if read.spec.vocab_size < model.vocab_size:
        raise LoadError(
            f"vocab_size {read.spec.vocab_size}: the model has {model.vocab_size} tokens; it is another one's"
        )
    size = read.target_hidden_size or read.spec.hidden_size
    if size != model.hidden_size:
        raise LoadError(
            f"it reads hidden states of {size} numbers, and the model's have {model.hidden_size}: it is another one's"
        )


def _token_ids(checkpoint: Checkpoint, read: EagleConfig, vocab_size: int) -> Tensor | None:
    """The model's token for each of the head's: its number, and what d2t adds to it. Raises LoadError."""
    if not checkpoint.has("d2t"):
        if read.draft_vocab_size not in (None, vocab_size):
            raise LoadError(f"draft_vocab_size {read.draft_vocab_size} without d2t, which says what its tokens are")
        return None
    offsets = checkpoint.tensor("d2t").long()
    ids = torch.arange(len(offsets)) + offsets
    rows = read.draft_vocab_size or vocab_size
    if len(offsets) != rows:
        raise LoadError(f"d2t has {len(offsets)} entries, and the head {rows} tokens")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise LoadError(f"d2t names the tokens {int(ids.min())} to {int(ids.max())}; the model has {vocab_size}")
    if len(set(ids.tolist())) < len(ids):
        raise LoadError("d2t names a token twice")
    if checkpoint.has("t2d"):
        named = checkpoint.tensor("t2d").bool().nonzero().flatten()
        if not torch.equal(named, ids.sort().values):
            raise LoadError(f"t2d names {len(named)} tokens, and others than d2t, which names {len(ids)}")
    return ids


def _state_norms(read: EagleConfig, parts: _Parts, num_layers: int, size: int) -> tuple[AddNorm, ...]:
    if read.state_norms == "all":
        return (parts.norm("input_norm", num_layers * size),)
    return tuple(parts.norm(f"fc_norm.{i}", size) for i in range(num_layers if read.state_norms == "each" else 0))


def _refuse_unread(checkpoint: Checkpoint, prefix: str = "") -> None:
    """Raise LoadError with the names of tensors that nothing read, among those that begin so."""
    unread = [name for name in checkpoint.unread() if name.startswith(prefix)]
    if left := [name for name in unread if name not in OF_MODEL and not name.endswith(UNUSED_SUFFIXES)]:
        raise LoadError(f"it has tensors that nothing reads: {some(left)}")


def _named_as_trained(checkpoint: Checkpoint) -> Callable[[str], str]:
    """EAGLE and SpecForge call the layer midlayer."""
    if checkpoint.has("midlayer.self_attn.q_proj.weight"):
        return lambda name: name.replace("layers.0.", "midlayer.", 1)
    return lambda name: name


class _Source(CheckpointSource):
    """A head's tensors by the names of a decoder's."""

    def __init__(self, checkpoint: Checkpoint, named: Callable[[str], str]) -> None:
        super().__init__(checkpoint)
        self.prefix = ""
        self._named = named

    def has(self, module: str) -> bool:
        return super().has(self._named(module))

    def linear(self, module: str, out_features: int, in_features: int) -> Weight:
        return super().linear(self._named(module), out_features, in_features)

    def is_quantized(self, module: str) -> bool:
        return super().is_quantized(self._named(module))

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return super().tensor(self._named(name), shape)


class _Parts:
    """Reads and builds the parts of a head, in the type that the model computes in."""

    def __init__(
        self,
        config: EngineConfig,
        spec: DecoderSpec,
        source: CheckpointSource,
        model: Model,
        limits: SchedulerConfig,
        notes: list[str],
    ) -> None:
        """It sees no more than the block tables that it shares with the first group of the model's layers hold, and is
        as long as the model: a rope goes on as it began, whatever length a head was trained with.
        """
        first = spec.layers[0]
        windows = [window for window in (first.mixer.window, limits.windows[0]) if window is not None]
        assert isinstance(first.mixer, AttentionSpec)  # a head's layer is Llama's or Qwen's
        mixer = replace(first.mixer, window=min(windows, default=None))
        spec = replace(spec, max_position=limits.max_model_len, layers=(replace(first, mixer=mixer),))
        dtype = next(name for name, dtype in DTYPES.items() if dtype == model.dtype)
        own = own_config(config, dtype=dtype, max_model_len=limits.max_model_len)
        notes += [f"the head's config.json has {key}, which octavo doesn't know" for key in spec.unknown_keys]
        self._model = model
        self.source = source
        self.builder = DecoderBuilder(own, spec, source, model.dtype, Device.choose(config.device), notes)

    def norm(self, module: str, size: int | None = None) -> AddNorm:
        """A norm of vectors of this size; None: of the head's own."""
        return self.builder.norm(module, size or self.builder.spec.hidden_size)

    def linear(self, module: str, rows: int, columns: int, out_dtype: torch.dtype | None = None) -> Linear:
        """A linear layer without a bias."""
        weight = self.source.linear(module, rows, columns)
        return make_linear([weight], [None], self.builder.target, out_dtype=out_dtype)

    def embedding(self, *, is_own: bool) -> Embedding:
        """Of tokens as they are stored, without the factor that some models have: the head's own, or the model's."""
        spec = self.builder.spec
        if is_own:
            table = self.source.tensor("embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
            table = table.to(self._model.device, self._model.dtype, copy=True)
        else:
            table = self._model.token_table
        if table.shape[1] != spec.hidden_size:
            raise LoadError(
                f"it has no embed_tokens.weight, and the model's has {table.shape[1]} columns; {spec.hidden_size} are "
                "the head's"
            )
        return Embedding(self.builder.ops, table, 1.0)
