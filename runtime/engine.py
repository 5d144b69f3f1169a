"""The engine: a scheduler, a model and a sampler around one paged cache, advanced one step at a time."""

from __future__ import annotations

import torch

from octavo.kernels.attention.cache import LayerCache
from octavo.runtime.graphs import DecodeGraphs
from octavo.runtime.inputs import InputBuilder
from octavo.runtime.model.model import Model
from octavo.runtime.request import AddRequest, TokenOutput
from octavo.runtime.sampler import Sampler
from octavo.runtime.scheduler import Scheduler, SchedulerConfig
from octavo.runtime.validation import problem_of


class Engine:
    """Token ids in, token ids out. Not thread-safe: one loop owns it."""

    def __init__(
        self,
        model: Model,
        caches: list[LayerCache],
        config: SchedulerConfig,
        seed: int = 0,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model = model
        self.caches = caches
        self.graphs = graphs
        self.scheduler = Scheduler(config)
        self.inputs = InputBuilder(config, model.device)
        self.sampler = Sampler(seed, model.device)

    def add(self, request: AddRequest) -> TokenOutput | None:
        """Accept a request, or return the output that says why not."""
        problem = problem_of(request, self.model.vocab_size)
        if problem is not None:
            return TokenOutput(request.request_id, [], finish_reason="error", error=problem)
        return self.scheduler.add(request)

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        """Compute one batch; call while `scheduler.has_work`."""
        plan = self.scheduler.plan()
        inputs = self.inputs.build(plan)
        logits = self.model.forward(inputs, self.caches) if self.graphs is None else self.graphs.forward(inputs)
        sampled = self.sampler.sample(logits, plan)
        return self.scheduler.commit(plan, sampled)
