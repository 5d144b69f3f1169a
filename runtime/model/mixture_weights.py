"""A layer's mixture of experts out of a checkpoint: its router, its experts, and the shared one.

On a GPU experts are stacked for grouped GEMMs where these have all that the architecture asks; else they stand one by
one, as on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels.moe.reference import Router, Routing
from octavo.quant.experts import Expert, Stacked, slices, stack_experts
from octavo.quant.kernel_table import KernelChoice, one_by_one
from octavo.quant.qparams import QuantizedWeight, Weight
from octavo.quant.target import Target
from octavo.runtime.model.experts import MoeSpec
from octavo.runtime.model.layers import GatedMlp
from octavo.runtime.model.moe import GroupedMoe, MlpAndMoe, MoeMlp
from octavo.runtime.model.names import BESIDE_NORMS, NORMS, LinearParts, routers
from octavo.runtime.model.operators import Ops
from octavo.runtime.model.sources import LoadError, Source
from octavo.runtime.model.spec import DecoderSpec
from octavo.runtime.parallel.layout import RankLayout

Parts = tuple[list[Weight], list[Tensor | None]]  # of modules that share their input: weights [N_i, K], biases [N_i]


class MlpReader(Protocol):
    """Who reads the gated MLPs of a model (`DecoderBuilder`). own: this rank's share; None: there is one rank."""

    spec: DecoderSpec
    source: Source
    own: RankLayout | None
    target: Target
    ops: Ops
    device: torch.device
    dtype: torch.dtype

    def norm_weight(self, module: str, size: int) -> Tensor: ...

    def read_gated(self, parts: dict[str, LinearParts], owner: str) -> tuple[Parts, Parts]:
        """gate and up, and down, of '', 'shared.' or 'experts.3.'."""
        ...

    def gated(self, gate_up: Parts, down: Parts, *, is_whole: bool = False) -> GatedMlp: ...

    def note(self, *choices: KernelChoice) -> None:
        """Say why a kernel departs from what the checkpoint says."""
        ...


class Mixture:
    """Reads the mixture of one layer."""

    def __init__(self, mlps: MlpReader, moe: MoeSpec, index: int) -> None:
        self._mlps = mlps
        self._moe = moe
        self._source = mlps.source
        self._layer = f"{mlps.source.prefix}layers.{index}"
        self._modules = routers(mlps.spec, index, mlps.source.prefix, mlps.source.has)

    def read(self, parts: dict[str, LinearParts], *, stacks_experts: bool) -> MoeMlp | GroupedMoe:
        """parts: the layer's linear layers. stacks_experts: where a GPU has grouped GEMMs for them."""
        mlps = self._mlps
        gates = [self._gate(module, rows) for module, rows in self._modules.items()]
        shared = None if self._moe.shared_intermediate_size is None else mlps.read_gated(parts, "shared.")
        experts: Iterable[tuple[Parts, Parts]] = self._experts(parts)
        if stacks_experts and mlps.target.capability and mlps.dtype != torch.float32:
            experts = list(experts)
            grouped = self._grouped(gates, experts, shared)
            if isinstance(grouped, GroupedMoe):
                mlps.note(grouped.experts.choice)
                return grouped
            mlps.note(grouped)
        is_whole = mlps.own is not None and mlps.own.whole_experts
        alone = tuple(mlps.gated(*expert, is_whole=is_whole) for expert in experts)
        first_expert = 0 if mlps.own is None else mlps.own.experts[0]
        bias = self._of_router("bias", self._moe.num_experts) if self._moe.has_bias else None
        correction = None
        if self._moe.has_correction:
            correction = self._of_router("e_score_correction_bias", self._moe.num_experts)
        scale = self._of_router("per_expert_scale", self._moe.num_experts) if self._moe.beside_mlp else None
        router = Router(gates[0], self._moe.routing, bias, correction, scale)
        return MoeMlp(router, alone, first_expert, None if shared is None else mlps.gated(*shared), *gates[1:])

    def beside(self, mlp: GatedMlp, experts: MoeMlp) -> MlpAndMoe:
        """Both, with their norms."""
        mlps = self._mlps
        hidden = mlps.spec.hidden_size
        before_mlp = NORMS[mlps.spec.norms][2]
        norms = (mlps.norm_weight(f"{self._layer}.{norm}", hidden) for norm in (before_mlp, *BESIDE_NORMS))
        before, after, before_experts, after_experts = norms
        before_router = self._of_router("scale", hidden) * hidden**-0.5
        eps = mlps.spec.norm_eps
        return MlpAndMoe(mlps.ops, eps, mlp, experts, before, after, before_experts, after_experts, before_router)

    def _experts(self, parts: dict[str, LinearParts]) -> Iterator[tuple[Parts, Parts]]:
        """Those that this rank has, one by one; nothing of the others is read."""
        own = self._mlps.own
        first, stop = (0, self._moe.num_experts) if own is None else own.experts
        for i in range(self._moe.num_experts):
            if first <= i < stop:
                yield self._mlps.read_gated(parts, f"experts.{i}.")
                continue
            for linear in (parts[f"experts.{i}.gate_up"], parts[f"experts.{i}.down"]):
                for module, rows in linear.modules.items():
                    self._source.leave(module, rows, linear.in_features)

    def _grouped(
        self, gates: list[Tensor], experts: list[tuple[Parts, Parts]], shared: tuple[Parts, Parts] | None
    ) -> GroupedMoe | KernelChoice:
        """Experts stacked for a GPU's grouped GEMMs, the shared one in slices or beside them; or why they can't be."""
        moe = self._moe
        target = self._mlps.target
        how = moe.routing
        if self._mlps.spec.activation != "silu":
            return one_by_one(f"grouped GEMMs have SiLU between them, not {self._mlps.spec.activation}")
        if any(_has_bias(expert) for expert in experts):
            return one_by_one("grouped GEMMs add no bias")
        if how != Routing(how.top_k, how.normalize):
            return one_by_one("grouped GEMMs have experts chosen by their softmax alone")
        plain = [(gate_up, down) for (gate_up, _), ((down,), _) in experts]
        cut: list[Expert] | None = []
        if shared is not None:
            (gate_up, _), ((down,), _) = shared
            is_plain = moe.shared_gate and not _has_bias(shared)
            cut = slices(gate_up, down, moe.intermediate_size) if is_plain else None
        found = None if cut is None else stack_experts([*plain, *cut], target)
        if isinstance(found, Stacked):
            return GroupedMoe(self._narrowed(gates), found, how.top_k, how.normalize, len(cut or ()))
        if shared is None and found is not None:
            return found
        found = stack_experts(plain, target)
        if isinstance(found, KernelChoice):
            return found
        assert shared is not None
        gate = gates[1] if moe.shared_gate else None
        beside = self._mlps.gated(*shared)
        return GroupedMoe(self._narrowed(gates[:1]), found, how.top_k, how.normalize, 0, beside, gate)

    def _narrowed(self, gates: list[Tensor]) -> Tensor:
        """All rows as one weight, of the model's type where that holds them exactly."""
        rows = torch.cat(gates)
        narrow = rows.to(self._mlps.dtype)
        return narrow if torch.equal(narrow.float(), rows) else rows

    def _gate(self, module: str, rows: int) -> Tensor:
        """[rows, H] float32. Never rounded here; some quantizers round it, and then its codes are what there is."""
        shape = (rows, self._mlps.spec.hidden_size)
        device = self._mlps.device
        if not self._source.is_quantized(module):
            return self._source.tensor(f"{module}.weight", shape).to(device, torch.float32, copy=True)
        weight = self._source.linear(module, *shape)
        if not isinstance(weight, QuantizedWeight) or weight.scheme.activation is not None:
            raise LoadError(f"{module} is a router whose input is to be rounded, which isn't served")
        return weight.dequantize().to(device)

    def _of_router(self, kind: str, size: int) -> Tensor:
        """[size] float32, the router's, which may have its weight in a module of its own."""
        router = next(iter(self._modules)).removesuffix(".proj")
        numbers = self._source.tensor(f"{router}.{kind}", (size,))
        return numbers.to(self._mlps.device, torch.float32, copy=True)


def _has_bias(mlp: tuple[Parts, Parts]) -> bool:
    return any(bias is not None for _, biases in mlp for bias in biases)
