"""Which kernel would serve each linear layer of a checkpoint on some device, from config and headers alone.

It asks the same `choose_kernel` as the loader. What only a weight's values show is assumed: that the parts of a layer
can be fused, that static input scales are there, and that no e4m3 code is NaN. g_idx is read, since it isn't a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.quant.checkpoint import Checkpoint
from octavo.quant.fusion import scheme_per_channel
from octavo.quant.head_name import head_name
from octavo.quant.kernel import LayerShape, Order, order_of
from octavo.quant.kernel_table import KernelChoice, choose_kernel
from octavo.quant.scheme import QuantScheme
from octavo.quant.target import Target
from octavo.runtime.model.names import LinearParts, embedding_name, layer_linears
from octavo.runtime.model.sources import CheckpointSource, LoadError
from octavo.runtime.model.spec import AttentionSpec, DecoderSpec


def check_attention(spec: DecoderSpec, target: Target) -> None:
    """Raise LoadError for attention of a kind that no kernel of the target has."""
    if target.device.type == "cpu" and not target.capability:
        return
    kinds = {
        "attention over latents": spec.has_latents,
        "attention with sinks": spec.has_sinks,
        "attention in chunks": spec.is_chunked,
        "attention whose rotations turn neighbors": spec.turns_neighbors,
        "attention with queries scaled by their positions": spec.scales_queries,
        "attention with normed values": spec.norms_values,
        "attention with a gate": any(isinstance(it.mixer, AttentionSpec) and it.mixer.has_gate for it in spec.layers),
        "MLPs without gates": not spec.has_gates,
        **{mixer.title: True for mixer in spec.states},
    }
    for kind, is_there in kinds.items():
        if is_there:
            raise LoadError(f"{spec.architecture} has {kind}, which no kernel of {target} has; --device cpu serves it")


def plan_kernels(checkpoint: Checkpoint, spec: DecoderSpec, target: Target) -> dict[str, KernelChoice]:
    """The kernel of each linear module of a decoder, by full name.

    Raises FormatError and SchemeError for schemes that octavo doesn't serve, LoadError as `check_attention`.
    """
    check_attention(spec, target)
    source = CheckpointSource(checkpoint)
    plan = _Plan(source, spec, target)
    found: dict[str, KernelChoice] = {}
    for index in range(len(spec.layers)):
        for kind, parts in layer_linears(spec, index, source.prefix, source.has).items():
            found |= plan.of_layer(kind, parts)
    head = head_name(source.prefix)
    if spec.tied and not source.is_quantized(head):
        head = embedding_name(spec, source.prefix)
    found |= plan.of_layer("lm_head", LinearParts({head: spec.vocab_size}, spec.hidden_size))
    return found


@dataclass(frozen=True)
class _Plan:
    source: CheckpointSource
    spec: DecoderSpec
    target: Target

    def of_layer(self, kind: str, parts: LinearParts) -> dict[str, KernelChoice]:
        """The kernel of each module of a linear layer, which are fused."""
        return {module: self._of_module(kind, module, rows, parts) for module, rows in parts.modules.items()}

    def _of_module(self, kind: str, module: str, rows: int, parts: LinearParts) -> KernelChoice:
        scheme = self.source.scheme(module)
        moe = self.spec.moe
        is_expert = moe is not None and kind.startswith("experts.") and self.target.capability > 0
        if scheme is not None and (len(parts.modules) > 1 or is_expert):
            scheme = scheme_per_channel(scheme)
        shape = LayerShape(rows, parts.in_features, order=self._order(kind, module, scheme, parts.in_features))
        if is_expert and moe is not None:
            widest = max(self.spec.hidden_size, moe.intermediate_size)
            together = LayerShape(rows, widest, moe.num_experts, shape.order)
            choice = choose_kernel(scheme, together, self.target)
            if choice.kernel.where == "gpu":
                return choice
        return choose_kernel(scheme, shape, self.target)

    def _order(self, kind: str, module: str, scheme: QuantScheme | None, columns: int) -> Order:
        """As the loader finds it: `sort_inner` removes act-order from down projections beforehand."""
        if scheme is None:
            return "sorted"
        activation = scheme.activation
        is_rotated = bool(self.source.transforms)  # down's input, whose order is no longer that of gate and up
        if kind.endswith("down") and not is_rotated and (activation is None or activation.granularity.kind != "group"):
            return "sorted"
        return stored_order(self.source.checkpoint, module, scheme, columns)


def stored_order(checkpoint: Checkpoint, module: str, scheme: QuantScheme, columns: int) -> Order:
    """The order of a module's columns, as its files have their groups."""
    stored = [name for suffix in ("g_idx", "weight_g_idx") if checkpoint.has(name := f"{module}.{suffix}")]
    if not stored:
        return "sorted"
    return order_of(checkpoint.tensor(stored[0]), scheme.weight.granularity.tile(1, columns)[1])
