"""Who reads and writes a decoder's residual stream, for a quantizer that rotates it; and what can't be rotated.

A rotation is folded into linear layers on both sides of the stream. That is exact where every norm of the stream is an
RMSNorm whose weight its readers can take over, and where all readers and writers are known: others are refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from octavo.quant.block_map import RotationMap, ValueHeads
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.head_name import head_name
from octavo.runtime.model.names import (
    NORMS,
    LinearParts,
    attention_norms,
    embedding_name,
    expansion,
    layer_linears,
    layer_norms,
    routers,
    state_gates,
    state_tensors,
    stored_name,
)
from octavo.runtime.model.sentence_files import MODULES
from octavo.runtime.model.sources import UNUSED_SUFFIXES, CheckpointSource
from octavo.runtime.model.spec import AttentionSpec, DecoderSpec, LatentSpec, UnsupportedModelError


def rotation_map(checkpoint: Checkpoint, rotations: Collection[str]) -> RotationMap:
    """What R1 (the residual stream), R2 (heads of values) and R4 (the input of down_proj) concern, of those asked for.

    Raises UnsupportedModelError for a model in which one of them would change what it computes.
    """
    spec = DecoderSpec.from_hf(checkpoint.config)
    source = CheckpointSource(checkpoint)
    found = _Map(spec, source)
    if "R1" in rotations:
        found.check_stream()
    if "R2" in rotations:
        found.check_values()
    if "R4" in rotations and spec.moe is not None:
        raise UnsupportedModelError(
            f"R4: {spec.architecture} has experts, whose inputs no engine rotates while serving; R1 and R2 do without"
        )
    return RotationMap(
        size=spec.hidden_size,
        embedding=embedding_name(spec, source.prefix),
        head=head_name(source.prefix),
        tied=spec.tied,
        readers=dict(found.readers()) if "R1" in rotations else {},
        writers=tuple(found.writers()) if "R1" in rotations else (),
        values=tuple(found.values()) if "R2" in rotations else (),
        inner=found.inner() if "R4" in rotations else {},
        offset=spec.norm_offset,
    )


ENTERING = ("qkv", "qkv_a", "qkvz", "in")
"""Kinds of linear layers that read the stream behind the first norm of a layer; `gate_up` does behind the second."""
LEAVING = ("o", "out", "down")
INSIDE = ("q_b",)


class _Map:
    """A model's wiring by the names of a checkpoint."""

    def __init__(self, spec: DecoderSpec, source: CheckpointSource) -> None:
        self.spec = spec
        self.source = source
        self.prefix = source.prefix
        self.layers = [layer_linears(spec, i, self.prefix, source.has) for i in range(len(spec.layers))]

    def check_stream(self) -> None:
        """Refuse a residual stream that can't be rotated."""
        spec = self.spec
        reasons = {
            "norms behind attention and the MLP, whose weights no linear layer can take over": spec.norms != "pre",
            "a residual stream of several parts": spec.streams is not None,
            "inputs of each layer beside the residual stream": spec.per_layer is not None,
            "a vision tower, which writes into the residual stream": spec.text_only,
            f"{MODULES} of sentence-transformers, and embeddings are made of the last norm's output": (
                self.source.checkpoint.directory / MODULES
            ).exists(),
        }
        for reason, holds in reasons.items():
            if holds:
                raise UnsupportedModelError(f"R1: {spec.architecture} has {reason}; R2 may do without")
        for name in dict.fromkeys(name for parts in self.layers for name in parts):
            if _kind(name) not in (*ENTERING, *LEAVING, *INSIDE, "gate_up"):
                raise UnsupportedModelError(f"R1: {spec.architecture} has {name}, which isn't known to read a norm")
        known = self._known()
        for name in sorted(self.source.checkpoint.names):
            shape = self.source.checkpoint.spec(name).shape
            if (
                spec.hidden_size in shape
                and name.rpartition(".")[0] not in known
                and not name.endswith(UNUSED_SUFFIXES)
            ):
                raise UnsupportedModelError(
                    f"R1: {name} {list(shape)} stands beside the decoder's layers (an MTP head, a tower), and would "
                    "read or write a stream that is rotated"
                )

    def check_values(self) -> None:
        """Refuse heads of values that can't be rotated."""
        spec = self.spec
        mixers = [layer.mixer for layer in spec.layers]
        attention = [mixer for mixer in mixers if isinstance(mixer, AttentionSpec)]
        reasons = {
            "latents, which values are made of": any(isinstance(mixer, LatentSpec) for mixer in mixers),
            "normed values": spec.norms_values,
            "values that are keys": any(mixer.values_are_keys for mixer in attention),
            "layers that read another layer's values": any(mixer.source is not None for mixer in attention),
            "a gate between attention and o_proj": any(mixer.has_gate for mixer in attention),
            "no attention": not attention,
        }
        for reason, holds in reasons.items():
            if holds:
                raise UnsupportedModelError(f"R2: {spec.architecture} has {reason}; R1 may do without")

    def readers(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each norm of the stream, and the modules behind it."""
        before_attention, _, before_mlp, _ = NORMS["pre"]
        for index, parts in enumerate(self.layers):
            layer = f"{self.prefix}layers.{index}"
            first = [module for name in parts if _kind(name) in ENTERING for module in parts[name].modules]
            of_mlp = [module for name in parts if _kind(name) == "gate_up" for module in parts[name].modules]
            gates = state_gates(self.spec, index, self.prefix)
            experts = routers(self.spec, index, self.prefix, self.source.has)
            if self.spec.layers[index].is_single:
                (norm,) = layer_norms(self.spec, index)
                yield stored_name(self.spec, f"{layer}.{norm}"), (*first, *gates, *of_mlp, *experts)
                continue
            yield stored_name(self.spec, f"{layer}.{before_attention}"), (*first, *gates)
            yield stored_name(self.spec, f"{layer}.{before_mlp}"), (*of_mlp, *experts)
        yield stored_name(self.spec, f"{self.prefix}norm"), (head_name(self.prefix),)

    def writers(self) -> Iterator[str]:
        for parts in self.layers:
            for name, linear in parts.items():
                if _kind(name) in LEAVING:
                    yield from linear.modules

    def inner(self) -> dict[str, int]:
        """Each layer's down projection, and its columns."""
        return {module: parts["down"].in_features for parts in self.layers for module in parts["down"].modules}

    def values(self) -> Iterator[ValueHeads]:
        for layer, parts in zip(self.spec.layers, self.layers, strict=True):
            if isinstance(layer.mixer, AttentionSpec):
                yield self._values(layer.mixer, parts)

    def _values(self, mixer: AttentionSpec, parts: dict[str, LinearParts]) -> ValueHeads:
        (consumer,) = parts["o"].modules
        *_, producer = parts["qkv"].modules
        rows = None
        if self.spec.fused_qkv:
            end = parts["qkv"].modules[producer]
            rows = (end - mixer.num_kv_heads * mixer.head_dim, end)
        return ValueHeads(producer, consumer, mixer.head_dim, rows)

    def _known(self) -> set[str]:
        """All modules that R1 is folded into, and those within a mixer, which it doesn't reach."""
        known = {embedding_name(self.spec, self.prefix), *self.writers()}
        for norm, modules in self.readers():
            known |= {norm, *modules}
        for index, layer in enumerate(self.spec.layers):
            name = f"{self.prefix}layers.{index}"
            known |= {module for parts in self.layers[index].values() for module in parts.modules}
            known |= {f"{name}.self_attn.{norm}" for norm in attention_norms(self.spec, index)}
            known |= {tensor.rpartition(".")[0] for tensor in state_tensors(self.spec, index, self.prefix)}
            known |= {f"{name}.self_attn"}  # its sinks
            if (expanded := expansion(self.spec, index, self.prefix)) is not None:
                known |= expanded.modules.keys()
            if layer.state is not None:
                known |= {f"{name}.{layer.state.owner}"}
        return known


def _kind(name: str) -> str:
    """A linear layer's name in a layer without whose it is: 'experts.3.down', 'beside.in'."""
    return name.rpartition(".")[2]
