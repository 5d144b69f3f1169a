"""Steps under way: who computes them, and when.

A thread that computes them one after another, while the scheduler plans the next ones, is to the scheduler what a
stream is to a GPU's host: submitted steps run in order, and a step that waits begins as soon as the one before it ends.
Python code of both threads takes turns (there is one interpreter lock), but kernels run without the lock.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.sampling.best import Best
from octavo.runtime.parallel.order import Int32s, StepOrder
from octavo.runtime.scheduling.plan import ScheduledSequence, StepPlan, StepResult
from octavo.runtime.vision.steps import embeddings, with_images
from octavo.runtime.worker.pooled_steps import with_token_types
from octavo.runtime.worker.source_rows import with_sources
from octavo.runtime.worker.step_inputs import with_tokens
from octavo.runtime.worker.worker import Worker

if TYPE_CHECKING:
    from octavo.runtime.parallel.followers import Followers


class Samples(Protocol):
    """Who makes a step's result of what the model has computed: a sampler, or a pooler where nothing is generated."""

    last_tokens: Int32s

    def has_ended(self, it: ScheduledSequence) -> bool: ...

    def sample(self, logits: Tensor | Best, plan: StepPlan) -> StepResult: ...


@dataclass(slots=True)
class StepHandle:
    """A submitted step, and what came of it: None until it is done.

    seconds: that it was computed and sampled for. is_settled: later ones of its size will take no less.
    """

    order: StepOrder
    plan: StepPlan
    inputs: StepInputs
    outcome: StepResult | BaseException | None = None
    seconds: float = 0.0
    is_settled: bool = True


class Executor:
    """The driver: it tells other ranks each step, computes it on its own worker, and samples.

    This one computes a step when its result is asked for. Where kernels take every core, a step that is planned beside
    another one takes from it what it saves, and the threads wait for each other besides. Of several stages of a model
    it is the last one; each of them computes another step.

    most_under_way  steps that may be submitted before the result of the oldest one is taken: as many as stages
    done            a file descriptor: readable while there is a finished step whose result was not taken; None where a
                    step is only computed in `result`
    """

    done: int | None = None

    def __init__(
        self, worker: Worker, sampler: Samples, followers: Followers | None = None, most_under_way: int = 1
    ) -> None:
        self.worker = worker
        self.sampler = sampler
        self.most_under_way = most_under_way
        self._followers = followers
        self._driver = _Driver(worker, sampler, None)

    def submit(self, order: StepOrder, plan: StepPlan) -> StepHandle:
        """Order a step, all of whose tokens are known: no sequence in it is being sampled.

        The other ranks are told first, and build their inputs while this one builds its own.
        """
        if self._followers is not None:
            self._followers.send(order)
        return StepHandle(order, plan, self.worker.prepare(order))

    def withdraw(self) -> bool:
        """Take back the step that was submitted last; False if it has begun."""
        return False

    def result(self, handle: StepHandle) -> StepResult:
        """Wait for the oldest step whose result was not taken, and return it; raises what its computing raised."""
        with torch.inference_mode():
            return self._driver.run(handle)


class ThreadedExecutor(Executor):
    """Computes steps in a thread, one ahead: for a GPU, and for a CPU with a core to spare."""

    done: int

    def __init__(self, worker: Worker, sampler: Samples, followers: Followers | None = None) -> None:
        super().__init__(worker, sampler, most_under_way=2)
        self.done, finished = os.pipe()  # a byte for each such step
        self._steps = _Steps()
        arguments = (self._steps, _Driver(worker, sampler, followers), finished)
        thread = threading.Thread(target=_compute, args=arguments, name="octavo-steps", daemon=True)
        thread.start()
        weakref.finalize(self, _end, self._steps, thread, self.done)

    def submit(self, order: StepOrder, plan: StepPlan) -> StepHandle:
        """Order a step, some of whose tokens may be those of the step under way: the other ranks are told when it
        begins. Its inputs are built here, at once.
        """
        handle = super().submit(order, plan)
        self._steps.put(handle)
        return handle

    def withdraw(self) -> bool:
        return self._steps.take_last()

    def result(self, handle: StepHandle) -> StepResult:
        os.read(self.done, 1)
        outcome = handle.outcome
        assert outcome is not None, "results are taken in the order of the steps"
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class _Steps:
    """A queue whose last entry can be taken back. Tickets and steps are as many, but for a moment."""

    def __init__(self) -> None:
        self._tickets: SimpleQueue[None] = SimpleQueue()
        self._steps: deque[StepHandle | None] = deque()

    def put(self, step: StepHandle | None) -> None:
        self._steps.append(step)
        self._tickets.put(None)

    def take_first(self) -> StepHandle | None:
        """Wait for a step; None is the end."""
        self._tickets.get()
        return self._steps.popleft()

    def take_last(self) -> bool:
        """Take the last step back; False if there is none. Who has a ticket finds a step: tickets are taken first."""
        try:
            self._tickets.get_nowait()
        except Empty:
            return False
        self._steps.pop()
        return True


@dataclass(frozen=True, slots=True)
class _Driver:
    """Computes steps on this rank. followers: whom it tells each step as it begins; None: they know it."""

    worker: Worker
    sampler: Samples
    followers: Followers | None

    def run(self, step: StepHandle) -> StepResult:
        last_tokens = self.sampler.last_tokens
        if all(it.tokens[0] < 0 and self.sampler.has_ended(it) for it in step.plan.scheduled):
            return StepResult([[] for _ in step.plan.scheduled])
        begin = time.perf_counter()
        order = step.order
        order.fill_tokens(last_tokens)
        if self.followers is not None:
            self.followers.send(order)
        inputs = with_tokens(step.inputs, order)
        if self.worker.model.num_token_types > 1:
            inputs = with_token_types(inputs, step.plan)
        model = self.worker.model
        if order.images is not None and model.tower is not None:
            values = embeddings(step.plan, model.tower) if len(order.images.rows) else None
            inputs = with_images(inputs, order.images, model.of_driver, values)
        if (source := self.worker.model.source) is not None:
            inputs = with_sources(inputs, step.plan, source)
        logits = self.worker.compute(inputs, order.wants)
        result = self.sampler.sample(logits, step.plan)
        step.seconds = time.perf_counter() - begin
        step.is_settled = self.worker.is_settled
        return result


def _end(steps: _Steps, thread: threading.Thread, done: int) -> None:
    """Let the thread end and wait for it: one that runs while the interpreter ends takes the process down."""
    steps.put(None)
    if thread is not threading.current_thread():
        thread.join()
    os.close(done)


def _compute(steps: _Steps, driver: _Driver, finished: int) -> None:
    """The thread: compute steps as they come, until there is a None."""
    with torch.inference_mode():
        while (step := steps.take_first()) is not None:
            try:
                step.outcome = driver.run(step)
            except BaseException as error:
                step.outcome = error
            os.write(finished, b"\0")
            del step  # or it would be kept until the next one comes
    os.close(finished)
