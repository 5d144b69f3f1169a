"""Modules of encoder-decoders out of a checkpoint, and the memory of their sources: what their builders share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from octavo.kernels.native.huge_memory import huge_tensor
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.kernel_table import note_departures
from octavo.quant.linear import Linear, make_linear
from octavo.quant.target import Target
from octavo.runtime.config import EngineConfig, PoolerConfig
from octavo.runtime.model.at_load import quantized_at_load
from octavo.runtime.model.device import Device
from octavo.runtime.model.dtypes import choose_dtype
from octavo.runtime.model.encdec import SourceMemory
from octavo.runtime.model.encoder import LayerNorm, RmsNorm
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.held_tensors import HeldTensors
from octavo.runtime.model.refused_flags import FOR_DECODERS, Flags, refuse_flags
from octavo.runtime.model.select_operators import select_ops
from octavo.runtime.model.sources import CheckpointSource, LoadError, some
from octavo.runtime.worker.device import free_memory

SOURCE_SHARE = 0.4  # of free memory that sources may take; the cache of tokens takes half of what is left at most
NOT_SERVED: Flags = {
    **FOR_DECODERS,
    "--kv-events-config": lambda config: config.kv_events_config.is_on,
    "--runner pooling": lambda config: config.runner == "pooling",
    "--convert": lambda config: config.convert in ("embed", "classify"),
    "--pooler-config": lambda config: config.pooler_config != PoolerConfig(),
    "--model-impl hf": lambda config: config.model_impl == "hf",
    "--lm-head-dtype int8": lambda config: config.lm_head_dtype == "int8",
}


class EncDecParts:
    """One checkpoint's modules, each made once. target: what they are made for; source: of what."""

    def __init__(
        self,
        config: EngineConfig,
        checkpoint: Checkpoint,
        source: CheckpointSource | HeldTensors,
        target: Target,
        notes: list[str],
    ) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.source = source
        self.target = target
        self.ops = select_ops(target.device, target.dtype)
        self.notes = notes

    @classmethod
    def open(cls, config: EngineConfig, device: Device, what: str, stored: str | None) -> EncDecParts:
        """Of `config.model`. what: the model and its kind, for errors. stored: the type that its config names.

        Raises LoadError for flags and devices that such a model isn't served with.
        """
        refuse_flags(config, NOT_SERVED, what)
        if device.torch_device.type != "cpu":
            raise LoadError(f"{what}; these run on the CPU so far: --device cpu works")
        notes = list(device.notes)
        dtype = choose_dtype(config.dtype, stored or "float32", device.torch_device, notes)
        checkpoint = Checkpoint.open(Path(config.model), LAYOUTS)
        source = CheckpointSource(checkpoint)
        return cls(config, checkpoint, source, Target.of(device.torch_device, dtype), notes)

    def linear(self, modules: Mapping[str, bool], rows: int, columns: int) -> Linear:
        """One layer of modules that share their input, `rows` of each; by each module's name whether it has a bias."""
        self.source.require(modules)
        weights = [
            quantized_at_load(name, self.source.linear(name, rows, columns), self.config.dtype, self.target.device)
            for name in modules
        ]
        biases = [self.source.bias(name, rows, expected=has_bias) for name, has_bias in modules.items()]
        linear = make_linear(weights, biases, self.target)
        note_departures((part.choice for part in linear.parts), self.notes)
        return linear

    def head(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """Float32 logits of a plain weight [V, H]."""
        return make_linear([weight], [bias], self.target, out_dtype=torch.float32)

    def layer_norm(self, module: str, size: int, eps: float) -> LayerNorm:
        weight, bias = (
            self.source.tensor(f"{module}.{name}", (size,)).to(torch.float32, copy=True) for name in ("weight", "bias")
        )
        return LayerNorm(weight, bias, eps)

    def rms_norm(self, module: str, size: int, eps: float, factor: float = 1.0) -> RmsNorm:
        """factor: what its output is multiplied by."""
        weight = self.source.tensor(f"{module}.weight", (size,)).to(torch.float32, copy=True)
        return RmsNorm(self.ops, weight * factor, eps)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.source.tensor(name, shape).to(self.target.dtype, copy=True)

    def num_places(self, each: int, what: str) -> int:
        """For as many sources as sequences may run, as far as memory goes, of `each` bytes. Notes how many."""
        room = int(SOURCE_SHARE * free_memory(self.target.device)) // each
        wanted = self.config.max_num_seqs
        if room < 1:
            raise LoadError(f"keys and values of one {what} take {each / 1e6:,.1f} MB, which are not free")
        count = min(wanted, room)
        held = "" if count == wanted else f"; memory holds no more, so that {count} sequences run at once, not {wanted}"
        self.notes.append(
            f"keys and values of one {what}: {each / 1e6:,.1f} MB for each of {count} sequences, if used{held}"
        )
        if self.config.enable_prefix_caching:
            self.notes.append(f"the prefix cache is off: what follows a prompt depends on the {what}, too")
        return count

    def memory(self, places: int, heads: int, positions: int, dim: int) -> SourceMemory:
        """One layer's, where nothing is yet."""
        shape = (places, heads, positions, dim)
        dtype = self.target.dtype
        num_bytes = places * heads * positions * dim * dtype.itemsize
        keys, values = (huge_tensor(num_bytes).view(dtype).view(shape) for _ in range(2))
        return SourceMemory(keys, values)

    def check_complete(self, unused: Iterable[str] = ()) -> None:
        """Raise LoadError with the names of tensors that nothing read, but for these."""
        if left := [name for name in self.checkpoint.unread() if name not in unused]:
            raise LoadError(f"the checkpoint has tensors that this architecture doesn't: {some(left)}")


def source_bytes(num_layers: int, positions: int, width: int, dtype: torch.dtype) -> int:
    """Of one source's keys and values in all layers of a decoder."""
    return 2 * num_layers * positions * width * dtype.itemsize
