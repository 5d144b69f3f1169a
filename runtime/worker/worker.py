"""One device's share of an engine: the model, its caches and graphs, and the inputs of its steps."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import Cache
from octavo.kernels.sampling.best import Best
from octavo.runtime.model.model import Model, Tap
from octavo.runtime.parallel.order import StepOrder, WantedLogits
from octavo.runtime.scheduling.plan import SchedulerConfig
from octavo.runtime.worker.graphs import StepGraphs
from octavo.runtime.worker.hidden_states import HiddenStates
from octavo.runtime.worker.replays import StepReplays, tap_of
from octavo.runtime.worker.step_inputs import InputBuilder


class Worker:
    """Does what orders say, in their order. Every rank of an engine has one; none of them samples.

    draft_caches: those of who makes drafts.
    """

    def __init__(
        self,
        model: Model,
        caches: list[Cache],
        config: SchedulerConfig,
        graphs: StepGraphs | None = None,
        replays: StepReplays | None = None,
    ) -> None:
        self.model = model
        self.caches = caches
        self.graphs = graphs
        self.replays = replays
        self.draft_caches: list[Cache] = []
        self._inputs = InputBuilder(config)
        self._most_tokens = config.max_num_batched_tokens
        self._mark: Callable[[], None] | None = None
        self._keep: Tap | None = None
        self._tap: Tap | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the last step was computed as later ones of its size will be."""
        return self.replays is None or self.replays.is_settled

    def watch(self, mark: Callable[[], None]) -> bool:
        """Have this called behind each layer from now on; False where the model's layers can't be watched."""
        if self.model.gives_hidden:
            self._mark = mark
            self._set_tap()
        if self.replays is not None:
            self.replays.mark = mark
        return self.model.gives_hidden

    def keep_hidden(self, layers: tuple[int, ...]) -> HiddenStates:
        """Have what these layers say of each token of a step kept until the next one; for a model that gives it."""
        states = HiddenStates(self.model, layers, self._most_tokens)
        self._keep = states.keep
        self.model.taps_all_rows = self.model.num_layers - 1 in layers
        if self.replays is not None:
            self.replays.keep = states.keep
        self._set_tap()
        return states

    def _set_tap(self) -> None:
        self._tap = tap_of(self._mark, self._keep)

    def prepare(self, order: StepOrder) -> StepInputs:
        """The inputs of a step, which may be built while an earlier one is computed; call in the order of the steps."""
        if order.number == 0 and self.replays is not None:
            self.replays.begin()  # followers have computed the steps of a warm-up, with which the driver did without
        return self._inputs.build(order)

    def compute(self, inputs: StepInputs, wants: WantedLogits) -> Tensor | Best:
        """What is wanted of the logits of a step on the CPU; more than that where this rank has all of them anyway.

        Of a model that generates nothing, the hidden states that are wanted.
        """
        if self.model.pooler is not None:
            return self.model.hidden(inputs, self.caches, self._tap)
        if wants == "best" and self.model.best is not None:
            return self.model.best(self._hidden(inputs), inputs)
        return self.forward(inputs)

    def forward(self, inputs: StepInputs) -> Tensor:
        """The model's logits of a step on the CPU, through a CUDA graph or a recording where there is one for it."""
        if self.graphs is not None:
            return self.graphs.forward(inputs)
        if self.replays is not None:
            return self.model.logits(self._hidden(inputs), inputs)
        return self.model.forward(inputs.to(self.model.device), self.caches, self._tap)

    def _hidden(self, inputs: StepInputs) -> Tensor:
        if self.replays is not None:
            return self.replays.hidden(inputs)
        return self.model.hidden(inputs, self.caches, self._tap)
