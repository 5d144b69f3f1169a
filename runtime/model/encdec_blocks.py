"""An encoder-decoder's blocks, one at a time: for calibration, as blocks.py has a decoder's.

A sample is a source and what the decoder reads beside it, as many tokens of each: hidden states [B, 2 * T, H]. The
encoder's blocks come first and change the first half, which the last of them norms as well; the decoder's blocks change
the second half and attend to the first. Each is the layer that serves, and runs through its `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.cross import Sources
from octavo.kernels.attention.distances import biases_of
from octavo.kernels.attention.packed import runs_of
from octavo.kernels.attention.step import StepInputs
from octavo.quant.block_map import Fold, InputGroup, StoredCache
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.input_rounding import Round
from octavo.quant.linear import Linear
from octavo.quant.target import Target
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.device import Device
from octavo.runtime.model.differentiable_encdec import DifferentiableEncDec
from octavo.runtime.model.dtypes import choose_dtype
from octavo.runtime.model.encdec import DecoderLayer, SourceMemory
from octavo.runtime.model.encdec_parts import EncDecParts
from octavo.runtime.model.encdec_spec import EncDecSpec
from octavo.runtime.model.encdec_weights import EncDecBuilder
from octavo.runtime.model.encoder import EncoderLayer, Norm, Texts, biases_by_distance
from octavo.runtime.model.families.translating import Stack
from octavo.runtime.model.held_tensors import HeldTensors, rounding_by, showing
from octavo.runtime.model.sources import CheckpointSource, LoadError

Record = Callable[[str, Tensor], None]  # (group's name, its input [T, K])
NO_ROUNDING: Mapping[str, Round] = {}


@dataclass(frozen=True)
class BuiltBlock:
    """A layer, with what stands beside it. end: the norm behind the encoder's last layer.

    distances  of an encoder's layer, [heads, 2 * T - 1] biases by distance; None: there are none
    """

    layer: EncoderLayer | DecoderLayer
    end: Norm | None = None
    distances: Tensor | None = None

    def with_linears(self, change: Callable[[str, Linear], Linear]) -> BuiltBlock:
        return replace(self, layer=self.layer.map_linears(change))


class EncDecBlockRunner:
    """Runs samples through single blocks of an encoder-decoder of text, on the CPU: a `calibration.block.Runner`.

    Raises UnsupportedModelError for a config that isn't known, ModelConfigError for one that can't be.
    """

    expert_counts: Tensor | None = None
    is_causal = False

    def __init__(self, checkpoint: Checkpoint, seq_len: int) -> None:
        """checkpoint: dense; what stands in no block is read from it. seq_len: tokens of each half of a sample."""
        spec = self.spec = EncDecSpec.from_hf(checkpoint.config)
        if seq_len > spec.max_position and spec.bounds_positions:
            raise LoadError(
                f"--max-seq-length {seq_len}: the model has {spec.max_position} positions; {spec.max_position} works"
            )
        device = Device.choose("cpu")
        self.device = device.torch_device
        self.dtype = torch.float32
        if spec.dtype not in ("float32", None):
            self.dtype = choose_dtype("auto", spec.dtype, self.device, [])
        self.hidden_size = spec.hidden_size
        self.num_blocks = spec.encoder.num_layers + spec.decoder.num_layers
        self._seq_len = seq_len
        self._checkpoint = checkpoint
        self._source = HeldTensors("", beside=CheckpointSource(checkpoint))
        config = EngineConfig(model=str(checkpoint.directory), max_model_len=seq_len)
        parts = EncDecParts(config, checkpoint, self._source, Target.of(self.device, self.dtype), [])
        self._builder = EncDecBuilder(spec, parts, seq_len, seq_len, 1)
        stacks: tuple[Stack, Stack] = ("encoder", "decoder")
        self._distances = {stack: self._builder.distances(stack) for stack in stacks}
        self._end = self._builder.final_norm("encoder")

    @property
    def embedding_name(self) -> str:
        names = [f"{name}.weight" for name in (self.spec.names.words, *self.spec.names.copies)]
        return next((name for name in names if self._checkpoint.has(name)), names[0])

    def embed(self, token_ids: Tensor, embedding: Tensor) -> Tensor:
        """token_ids [B, 2 * T], embedding [vocab, H] as stored -> the first block's input [B, 2 * T, H]."""
        used, rows = torch.unique(token_ids, return_inverse=True)
        words = embedding[used].to(self.dtype)
        read, written = rows.chunk(2, dim=1)
        return torch.cat([self._embedded("encoder", read, words), self._embedded("decoder", written, words)], dim=1)

    def _embedded(self, stack: Stack, rows: Tensor, words: Tensor) -> Tensor:
        batch, length = rows.shape
        positions = torch.arange(length).repeat(batch)
        hidden = self._builder.embedding(stack, words, self._seq_len).forward(rows.flatten(), positions)
        return hidden.view(batch, length, -1)

    def head(self, tensor: Callable[[str], Tensor]) -> Callable[[Tensor], Tensor]:  # noqa: ARG002
        raise LoadError("an encoder-decoder's logits are of its second half alone; layers' sensitivity isn't measured")

    def _place(self, index: int) -> tuple[Stack, int]:
        """Of block `index`, the stack, and the layer's number in it."""
        first = self.spec.encoder.num_layers
        return ("encoder", index) if index < first else ("decoder", index - first)

    def build(self, index: int, tensors: Mapping[str, Tensor]) -> BuiltBlock:
        """Block `index` out of its tensors by their names in the checkpoint, all of them dense."""
        stack, number = self._place(index)
        distances = self._distances[stack][number] if self._distances[stack] else None
        with self._source.holding(tensors):
            if stack == "decoder":
                return BuiltBlock(self._builder.decoder_layer(number, distances))
            is_last = number == self.spec.encoder.num_layers - 1
            return BuiltBlock(self._builder.encoder_layer(number), self._end if is_last else None, distances)

    def groups(self, index: int, layer: BuiltBlock) -> list[InputGroup]:  # noqa: ARG002
        """The block's linear layers by the input that they share, in the order of computing."""
        return [InputGroup(name, modules) for name, modules in self.modules(index).items()]

    def modules(self, index: int) -> dict[str, tuple[str, ...]]:
        """The checkpoint's modules of each linear layer of a block, by the layer's name in it."""
        return self.spec.modules(*self._place(index))

    def differentiable(self, layer: BuiltBlock, rounds: Mapping[str, Round] = NO_ROUNDING) -> DifferentiableEncDec:
        """The layer's forward with other weights, which have gradients, and inputs rounded so."""
        return DifferentiableEncDec(layer.layer, rounds, layer.end, self._whole_biases(layer))

    def _whole_biases(self, block: BuiltBlock) -> Tensor | None:
        """[heads, T, T] of one sample."""
        if isinstance(block.layer, EncoderLayer):
            runs = runs_of([self._seq_len])
            return None if block.distances is None else biases_by_distance(block.distances, runs)[0]
        own = block.layer.attention.distances
        return None if own is None else biases_of(own, self._step(1, self._seq_len))[0]

    def rounding(self, layer: BuiltBlock, rounds: Mapping[str, Round]) -> BuiltBlock:
        """The layer with the inputs of some of its linear layers rounded, by these layers' names in it."""
        return layer.with_linears(rounding_by(rounds))

    def folds(self, index: int) -> list[Fold]:
        """The ops into which scales per input channel of the next linear layer can be folded.

        Norms behind a sum make the residual stream as well, and GELU and SiLU aren't linear in what they are given.
        """
        spec = self.spec
        stack, number = self._place(index)
        modules = self.modules(index)
        names = spec.names
        owner = names.layer.format(stack, number)
        dim = spec.head_dim
        first = "gate_up" if spec.gated else "up"
        folds = [Fold("o", modules["qkv"][-1], "rows", head_dim=dim)]
        if stack == "decoder":
            folds.append(Fold("cross_o", modules["cross_kv"][-1], "rows", head_dim=dim))
        if spec.gated or spec.activation == "relu":
            folds.append(Fold("down", modules[first][-1], "rows"))
        if spec.row.norms == "post":
            return folds
        norms = {"qkv": names.attention_norm, first: f"{names.mlp(stack)}{names.mlp_norm}"}
        if stack == "decoder":
            norms["cross_q"] = names.cross_norm
        return [*(Fold(group, f"{owner}{norm}", "norm") for group, norm in norms.items()), *folds]

    def norm_behind(self, _index: int) -> tuple[str, float] | None:
        """None, so that channels count the same: many blocks read what an encoder ends with."""
        return None

    @torch.inference_mode()
    def forward(
        self,
        layer: BuiltBlock,
        hidden: Tensor,
        record: Record | None = None,
        record_kv: Callable[[Tensor, Tensor], None] | None = None,
        stored: StoredCache | None = None,
    ) -> Tensor:
        """hidden [B, 2 * T, H] through one block -> the same; inputs of its linear layers go to `record` on the way."""
        assert record_kv is None, "an encoder-decoder's keys and values aren't measured"
        assert stored is None, "nor are they rounded"
        if record is not None:
            layer = layer.with_linears(lambda name, linear: showing(linear, partial(record, name)))
        read, written = hidden.chunk(2, dim=1)
        if isinstance(layer.layer, EncoderLayer):
            return torch.cat([self._encoded(layer.layer, layer, read), written], dim=1)
        return torch.cat([read, self._decoded(layer.layer, read, written)], dim=1)

    def _encoded(self, layer: EncoderLayer, block: BuiltBlock, read: Tensor) -> Tensor:
        batch, length, width = read.shape
        runs = runs_of([length] * batch)
        biases = None if block.distances is None else biases_by_distance(block.distances, runs)
        none = torch.empty(0, dtype=torch.int64)  # tokens and positions, which no such layer looks at
        x = layer.forward(read.reshape(-1, width), Texts(none, none, None, runs, biases, None))
        return (x if block.end is None else block.end.forward(x)).view(batch, length, width)

    def _decoded(self, layer: DecoderLayer, read: Tensor, written: Tensor) -> Tensor:
        batch, length, width = written.shape
        heads = self.spec.decoder.num_heads
        empty = torch.zeros(4, batch, heads, length, self.spec.head_dim, dtype=self.dtype)
        one = torch.ones(heads)
        layer = replace(layer, cross=replace(layer.cross, memory=SourceMemory(empty[0], empty[1])))
        layer.cross.read(read.reshape(-1, width), [((place,), length) for place in range(batch)])
        step = self._step(batch, length)
        sources = Sources(step.query_starts.tolist(), range(batch), [length] * batch)
        own = layer.attention.distances
        biases = None if own is None else biases_of(own, step)
        x = layer.forward(written.reshape(-1, width), step, LayerCache(empty[2], empty[3], one, one), sources, biases)
        return x.view(batch, length, width)

    def _step(self, batch: int, length: int) -> StepInputs:
        """`batch` sequences of `length` tokens, each prefilled at once into a cache block of its own."""
        return StepInputs.prefill([length] * batch, length, logits_index=torch.arange(batch * length))
