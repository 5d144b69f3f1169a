"""The engine: a scheduler, a model and a sampler around one paged cache, advanced one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.runtime.messages import AddRequest, TokenOutput
from octavo.runtime.model.model import Model
from octavo.runtime.scheduling.scheduler import Scheduler, SchedulerConfig
from octavo.runtime.validation import problem_of
from octavo.runtime.worker.graphs import StepGraphs
from octavo.runtime.worker.sampler import Sampler
from octavo.runtime.worker.step_inputs import InputBuilder


class Engine:
    """Token ids in, token ids out. Not thread-safe: one loop owns it."""

    def __init__(
        self,
        model: Model,
        caches: list[LayerCache],
        config: SchedulerConfig,
        seed: int = 0,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.model = model
        self.caches = caches
        self.graphs = graphs
        self.scheduler = Scheduler(config)
        self.inputs = InputBuilder(config)
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
        logits = self.forward(inputs)
        sampled = self.sampler.sample(logits, plan)
        return self.scheduler.commit(plan, sampled)

    def forward(self, inputs: StepInputs) -> Tensor:
        """The model's logits of a step on the CPU, through a CUDA graph where there is one for it."""
        if self.graphs is not None:
            return self.graphs.forward(inputs)
        return self.model.forward(inputs.to(self.model.device), self.caches)
