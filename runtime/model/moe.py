"""A mixture of experts as a layer's MLP: a router chooses a few of many gated MLPs for each token.

Serving runs the chosen experts alone. Calibration needs inputs for all of them: `observed` is the same block, but sends
every token through every expert, and counts the tokens that each was chosen for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.moe import reference as moe
from octavo.kernels.moe.reference import Router
from octavo.kernels.quantized_activation import ActivationQuant, Hidden
from octavo.quant.experts import Stacked
from octavo.quant.linear import Change, Linear
from octavo.runtime.model.layers import GatedMlp, GroupedExperts, Mlp
from octavo.runtime.model.operators import Ops


class _Plain:
    """An MLP that takes its input plain, whose output is whole, and whose experts, if any, run one by one."""

    __slots__ = ()
    capturable = False  # how many tokens an expert gets is known only while the step runs
    grouped = None

    @property
    def input_quant(self) -> ActivationQuant | None:
        return None

    def forward(self, x: Hidden, step: StepInputs | None) -> Tensor:
        raise NotImplementedError

    def partial(self, x: Hidden, step: StepInputs | None) -> Tensor:
        return self.forward(x, step)


@dataclass(frozen=True, slots=True)
class MoeMlp(_Plain):
    """sum over the chosen experts of weight * expert(x), plus the shared expert's output where there is one.

    Or of expert(weight * x), as the router's `Routing.weighs` says.
    experts      all of them, or with --enable-expert-parallel this rank's: from first_expert on
    shared       an expert that every token goes to
    shared_gate  [1, H] float32: its output is multiplied by sigmoid(x . shared_gate); None: it is added as it is
    """

    router: Router
    experts: tuple[GatedMlp, ...]
    first_expert: int
    shared: GatedMlp | None = None
    shared_gate: Tensor | None = None

    @property
    def observable_experts(self) -> int:
        return len(self.experts)

    def observed(self, counts: Tensor) -> ObservedMoe:
        return ObservedMoe(self, counts)

    def forward(self, x: Hidden, step: StepInputs | None, routed_by: Tensor | None = None) -> Tensor:
        """routed_by: what the router reads; None: x."""
        assert isinstance(x, Tensor)
        chosen, weights = moe.route(x if routed_by is None else routed_by, self.router)
        run = self._run if step is None or step.adapters is None else partial(self._run_adapted, step)
        weighs = self.router.routing.weighs
        routed = moe.grouped(x, chosen, weights, len(self.experts), run, self.first_expert, weighs=weighs)
        return add_shared(x, routed, self.shared, self.shared_gate, step)

    def linears(self) -> dict[str, Linear]:
        """'experts.3.gate_up', 'experts.3.down', ... and 'shared.gate_up', 'shared.down'."""
        return {f"{owner}.{name}": linear for owner, mlp in self._mlps() for name, linear in mlp.linears().items()}

    def map_linears(self, change: Change) -> MoeMlp:
        changed = [mlp.map_linears(_within(owner, change)) for owner, mlp in self._mlps()]
        count = len(self.experts)
        shared = None if self.shared is None else changed[count]
        return replace(self, experts=tuple(changed[:count]), shared=shared)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.router.tensors()
        if self.shared_gate is not None:
            yield self.shared_gate

    def _mlps(self) -> Iterator[tuple[str, GatedMlp]]:
        yield from ((f"experts.{i}", expert) for i, expert in enumerate(self.experts, self.first_expert))
        if self.shared is not None:
            yield "shared", self.shared

    def _run(self, expert: int, x: Tensor, tokens: Tensor) -> Tensor:  # noqa: ARG002
        return self.experts[expert].forward(x, None)

    def _run_adapted(self, step: StepInputs, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
        mlp = self.experts[expert]
        is_adapted = any(it.adapters is not None and it.adapters.is_used for it in (mlp.gate_up, mlp.down))
        return mlp.forward(x, step.of_rows(tokens) if is_adapted else None)


def add_shared(
    x: Tensor, routed: Tensor, shared: GatedMlp | None, gate: Tensor | None, step: StepInputs | None
) -> Tensor:
    """The shared expert's output, times sigmoid(x . gate) where there is a gate, added to the chosen ones'."""
    if shared is None:
        return routed
    out = shared.forward(x, step)
    if gate is not None:
        out = out * torch.sigmoid(F.linear(x.float(), gate)).to(x.dtype)
    return routed + out


@dataclass(frozen=True, slots=True)
class GroupedMoe:
    """MoeMlp on a GPU: all chosen experts in one grouped GEMM each way, and no size that depends on what was chosen.

    router  [num_experts, H] float32, or of the model's type where that holds it exactly; the shared expert's gate is
            another row where that is in slices
    normalize  weights of the chosen experts, a softmax over all, are made to sum to 1
    slices  how many of the experts, the last ones, are slices of the shared one; 0: it runs by itself, if there is one
    The other fields are MoeMlp's.
    """

    router: Tensor
    experts: Stacked
    top_k: int
    normalize: bool
    slices: int = 0
    shared: GatedMlp | None = None
    shared_gate: Tensor | None = None

    capturable = True
    observable_experts = 0

    @property
    def input_quant(self) -> ActivationQuant | None:
        """The router reads plain numbers, and so does a shared expert."""
        return self.experts.input_quant if self.shared is None else None

    @property
    def grouped(self) -> GroupedExperts:
        """The slices of a shared expert are experts to the kernels."""
        slices = f", a shared one in {self.slices}" if self.slices else ""
        return GroupedExperts(
            pairs=self.top_k + self.slices,
            num_experts=self.experts.down.shape[0],
            scheme=self.experts.scheme,
            body=f"grouped by expert{slices}",
        )

    def observed(self, counts: Tensor) -> Mlp:  # noqa: ARG002
        raise TypeError("experts that are stacked can't be observed; DecoderBuilder(stacks_experts=False) has others")

    def forward(self, x: Hidden, step: StepInputs | None) -> Tensor:
        from octavo.kernels.moe.gpu.fused import fused_moe

        assert isinstance(x, Tensor)
        routed = fused_moe(x, *self._mixture, normalize=self.normalize, shared=self.slices)
        return add_shared(x, routed, self.shared, self.shared_gate, step)

    def partial(self, x: Hidden, step: StepInputs | None) -> Tensor:
        """As forward; without a shared expert of its own [top_k + slices, T, H], what each expert gives."""
        from octavo.kernels.moe.gpu.fused import partial_moe

        if self.shared is not None:
            return self.forward(x, step)
        return partial_moe(x, *self._mixture, normalize=self.normalize, shared=self.slices)

    @property
    def _mixture(self) -> tuple[Tensor, int, Any, Any]:
        return self.router, self.top_k, self.experts.gate_up, self.experts.down

    def linears(self) -> dict[str, Linear]:
        """'shared.gate_up' and 'shared.down', where there are: the experts are no linear layers here."""
        return {} if self.shared is None else {f"shared.{k}": v for k, v in self.shared.linears().items()}

    def map_linears(self, change: Change) -> GroupedMoe:
        shared = None if self.shared is None else self.shared.map_linears(_within("shared", change))
        return replace(self, shared=shared)

    def tensors(self) -> Iterator[Tensor]:
        yield self.router
        yield from self.experts.tensors()
        if self.shared_gate is not None:
            yield self.shared_gate


@dataclass(frozen=True, slots=True)
class ObservedMoe(_Plain):
    """MoeMlp for calibration: forward(x) is what the block's is, but every expert sees all of x.

    Where weights multiply inputs, they multiply what the first linear layer gives, which is the same: so this one is
    seen to read x, as it does for all experts, and `down` reads what it does when it serves. An expert that a token
    isn't chosen for is weighed by its score.
    """

    block: MoeMlp
    counts: Tensor

    @property
    def observable_experts(self) -> int:
        return self.block.observable_experts

    def observed(self, counts: Tensor) -> ObservedMoe:
        return ObservedMoe(self.block, counts)

    def forward(self, x: Hidden, step: StepInputs | None, routed_by: Tensor | None = None) -> Tensor:
        assert isinstance(x, Tensor)
        block = self.block
        chosen, weights, scores = moe.route_scored(x if routed_by is None else routed_by, block.router)
        self.counts.add_(moe.tokens_per_expert(chosen, len(block.experts)))
        total = torch.zeros_like(x, dtype=torch.float32)
        for i, expert in enumerate(block.experts):
            weight = torch.where(chosen == i, weights, 0.0).sum(dim=1, keepdim=True)  # [T, 1], 0 where not chosen
            if block.router.routing.weighs == "inputs":
                is_chosen = (chosen == i).any(dim=1, keepdim=True)
                total += _weighed_inside(expert, x, torch.where(is_chosen, weight, scores[:, i : i + 1])) * is_chosen
            else:
                total.addcmul_(expert.forward(x, None).float(), weight)
        return add_shared(x, total.to(x.dtype), block.shared, block.shared_gate, step)

    def linears(self) -> dict[str, Linear]:
        return self.block.linears()

    def map_linears(self, change: Change) -> ObservedMoe:
        return replace(self, block=self.block.map_linears(change))

    def tensors(self) -> Iterator[Tensor]:
        return self.block.tensors()


def _weighed_inside(expert: GatedMlp, x: Tensor, weight: Tensor) -> Tensor:
    """expert(weight * x) in float32, for linear layers without biases: weight [T, 1] float32."""
    gate_up = moe.weigh(expert.gate_up.forward(x, None), weight)
    return expert.down.forward(expert.act(gate_up), None).float()


@dataclass(frozen=True, slots=True)
class MlpAndMoe(_Plain):
    """A dense MLP and a mixture of experts, each of the residual stream by a norm of its own; their normed sum.

    before_mlp, after_mlp, before_experts, after_experts, before_router  [H] float32
    """

    ops: Ops
    eps: float
    mlp: GatedMlp
    experts: MoeMlp | ObservedMoe
    before_mlp: Tensor
    after_mlp: Tensor
    before_experts: Tensor
    after_experts: Tensor
    before_router: Tensor

    @property
    def observable_experts(self) -> int:
        return self.experts.observable_experts

    def observed(self, counts: Tensor) -> MlpAndMoe:
        return replace(self, experts=self.experts.observed(counts))

    def forward(self, x: Hidden, step: StepInputs | None) -> Tensor:
        assert isinstance(x, Tensor)
        dense = self.mlp.forward(self._norm(x, self.before_mlp), step)
        routed_by = self._norm(x, self.before_router)
        routed = self.experts.forward(self._norm(x, self.before_experts), step, routed_by)
        return self._norm(dense, self.after_mlp) + self._norm(routed, self.after_experts)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        normed = self.ops.rms_norm(x, weight, self.eps)
        assert isinstance(normed, Tensor)
        return normed

    def linears(self) -> dict[str, Linear]:
        return self.mlp.linears() | self.experts.linears()

    def map_linears(self, change: Change) -> MlpAndMoe:
        return replace(self, mlp=self.mlp.map_linears(change), experts=self.experts.map_linears(change))

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.before_mlp, self.after_mlp, self.before_experts, self.after_experts, self.before_router)
        yield from self.experts.tensors()


def _within(owner: str, change: Change) -> Callable[[str, Linear], Linear]:
    return lambda name, linear: change(f"{owner}.{name}", linear)
