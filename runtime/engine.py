"""The engine: a scheduler that plans steps and an executor that computes them, one step ahead of each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from octavo.runtime.adapters import Adapters
from octavo.runtime.constraint import FAILED, Grammars
from octavo.runtime.messages import AdapterLoaded, AddRequest, Asleep, EngineStats, LoadAdapter, TokenOutput
from octavo.runtime.parallel.executor import Executor, Samples, StepHandle, ThreadedExecutor
from octavo.runtime.parallel.order import make_order
from octavo.runtime.scheduling.plan import SchedulerConfig, StepPlan
from octavo.runtime.scheduling.scheduler import Scheduler
from octavo.runtime.speculation.speculation import Speculates
from octavo.runtime.validation import problem_of
from octavo.runtime.vision.steps import images_of
from octavo.runtime.worker.cache_memory import give_back
from octavo.runtime.worker.pooled_steps import PooledSteps
from octavo.runtime.worker.sampler import Sampler
from octavo.runtime.worker.worker import Worker

if TYPE_CHECKING:
    from octavo.runtime.offload.offload import Offload
    from octavo.runtime.parallel.followers import Followers


NO_IMAGES = "this model reads text alone, and no images"


class Engine:
    """Token ids in, token ids out. Not thread-safe: one loop owns it.

    The loop calls `advance`, which orders steps ahead, and then `finish`, which waits for the oldest one's result;
    `step` is both. overlaps: whether steps are computed while the next ones are planned; with several stages other
    steps are in any case. deterministic: as in EngineConfig. speculation: who gives sequences drafts; None: nobody.
    A sequence that has some is in no further step before the token in front of them is there; others go on meanwhile.
    offload: the file that blocks of the prefix cache lie in; None: there is none.
    is_paused: no further step is ordered. is_replaced: it was told to end, and another one is started in its place.
    """

    def __init__(
        self,
        worker: Worker,
        config: SchedulerConfig,
        seed: int = 0,
        followers: Followers | None = None,
        *,
        overlaps: bool = True,
        deterministic: bool = False,
        speculation: Speculates | None = None,
        most_adapters: int = 0,
    ) -> None:
        self.worker = worker
        self.scheduler = Scheduler(config)
        self.speculation = speculation
        self.grammars = Grammars(worker.model.vocab_size)
        self.adapters: Adapters | None = None
        if most_adapters and worker.model.adapters is not None:
            self.adapters = Adapters(worker.model.adapters, self.scheduler.adapters, most_adapters, followers)
        sampler: Samples
        if worker.model.pooler is not None:
            sampler = PooledSteps(worker.model.pooler, config.max_num_seqs)
        else:
            sampler = Sampler(
                seed,
                worker.model.device,
                config.max_num_seqs,
                jumps=config.jumps_forward,
                batch_invariant=deterministic,
            )
        self.executor: Executor
        if overlaps and config.stages == 1:
            self.executor = ThreadedExecutor(worker, sampler, followers)
        else:
            self.executor = Executor(worker, sampler, followers, config.stages)
        self._under_way: deque[StepHandle] = deque()
        self._num_ordered = 0
        self._num_finished = 0
        self.offload: Offload | None = None
        self.is_paused = False
        self.is_replaced = False

    @property
    def has_work(self) -> bool:
        """Whether a step is under way, or could be."""
        return bool(self._under_way) or (self.scheduler.has_work and not self.is_paused)

    @property
    def is_computing(self) -> bool:
        """Whether a step is under way, for which `finish` would wait."""
        return bool(self._under_way)

    def add(self, request: AddRequest, request_ids: Sequence[str] | None = None) -> list[TokenOutput]:
        """Accept a request, or some of its answers; returns the outputs that say why not."""
        wanted = request.request_ids if request_ids is None else request_ids
        pooler = self.worker.model.pooler
        tasks = () if pooler is None else pooler.tasks
        problem = problem_of(request, self.worker.model.vocab_size, tasks, self.worker.model.source)
        if problem is None and request.images:
            tower = self.worker.model.tower
            problem = NO_IMAGES if tower is None else tower.problem_of(request.token_ids, request.images)
            if problem is None and tower is not None and request.params.prompt_logprobs is not None:
                problem = tower.problem_of_logits(request.images, self.scheduler.config.max_prompt_logits)
        if problem is not None:
            return [TokenOutput(request_id, [], finish_reason="error", error=problem) for request_id in wanted]
        chosen = frozenset(wanted)
        refused = [self._add(answer) for answer in request.answers() if answer.request_id in chosen]
        return [output for output in refused if output is not None]

    def _add(self, answer: AddRequest) -> TokenOutput | None:
        adapter = None
        if answer.adapter:
            adapter = None if self.adapters is None else self.adapters.find(answer.adapter)
            if adapter is None:
                error = f"the adapter of digest {answer.adapter[:16]} is not loaded"
                return TokenOutput(answer.request_id, [], finish_reason="error", error=error, is_refused=True)
        constraint = answer.params.constraint
        grammar = "" if constraint is None else constraint.grammar
        refusal = self.scheduler.add(answer, is_ready=not grammar, adapter=adapter)
        if refusal is None and grammar:
            self.grammars.compile(answer.request_id, grammar)
        elif refusal is None and constraint is not None:
            self.scheduler.set_ready(answer.request_id, self.grammars.without_rules())
        return refusal

    def take_grammars(self) -> list[TokenOutput]:
        """Let requests run whose grammars are compiled; returns outputs that refuse the others."""
        refused: list[TokenOutput | None] = []
        for compiled in self.grammars.finished():
            if compiled.grammar is None:
                refused.append(
                    self.scheduler.refuse(compiled.request_id, f"{FAILED} doesn't compile: {compiled.error}")
                )
            else:
                self.scheduler.set_ready(compiled.request_id, compiled.grammar)
        return [output for output in refused if output is not None]

    def load_adapter(self, message: LoadAdapter) -> AdapterLoaded | None:
        """Begin to read an adapter; `take_adapters` says what became of it, unless that is returned."""
        if self.adapters is None:
            return AdapterLoaded(message.digest, "adapters are not served here: --enable-lora serves them")
        return self.adapters.load(message)

    def drop_adapter(self, digest: str) -> None:
        """No request names it any more."""
        if self.adapters is not None:
            self.adapters.drop(digest)

    def take_adapters(self) -> tuple[list[AdapterLoaded], list[TokenOutput]]:
        """Let requests run whose adapters have been read; returns what to say of these, and outputs that refuse."""
        if self.adapters is None:
            return [], []
        told, failed = self.adapters.finished()
        refused: list[TokenOutput | None] = []
        for adapter, error in failed:
            hopeless = [it.request_id for it in self.scheduler.waiting.values() if it.adapter is adapter]
            refused += [self.scheduler.refuse(request_id, error) for request_id in hopeless]
        self.adapters.tidy(self.scheduler.running, self.scheduler.waiting.values())
        return told, [output for output in refused if output is not None]

    def take_fetched(self) -> None:
        """Let requests run whose blocks have been read."""
        if self.offload is not None:
            for fetch, are_right in self.offload.finished():
                self.scheduler.end_fetch(fetch, are_right)

    def forget_prefixes(self) -> None:
        """Let no request find what was computed before, in memory or in the file, but for what running ones hold."""
        self.scheduler.reset_prefix_cache()
        if self.offload is not None:
            self.offload.forget()

    def close(self) -> None:
        """Write what is to outlive the engine."""
        if self.offload is not None:
            self.offload.close()

    def stats(self) -> EngineStats:
        """Gauges and counters as they are now."""
        stats = self.scheduler.stats()
        if self.offload is not None:
            stats = msgspec.structs.replace(stats, offload=self.offload.stats())
        if self.adapters is None:
            return stats
        running, waiting = (
            tuple(dict.fromkeys(it.adapter.digest for it in those if it.adapter is not None))
            for those in (self.scheduler.running, self.scheduler.waiting.values())
        )
        return msgspec.structs.replace(stats, running_adapters=running, waiting_adapters=waiting)

    def sleep(self) -> tuple[list[TokenOutput], Asleep]:
        """Give the KV cache's memory back: (outputs of the steps that were under way, what to say of it).

        With requests that go on it gives nothing back, since what they have computed is there.
        """
        outputs: list[TokenOutput] = []
        while self._under_way:
            outputs += self.finish()
        num_open = len(self.scheduler.running) + len(self.scheduler.waiting)
        if num_open:
            return outputs, Asleep(0, f"{num_open} requests are open")
        if self.worker.model.device.type != "cpu":
            return outputs, Asleep(0, f"on {self.worker.model.device} an engine can't give memory back")
        if self.offload is not None:  # which may be writing blocks to its file
            return outputs, Asleep(0, "level 1 with --kv-offloading-path is not supported; level 2 works")
        self.scheduler.reset_prefix_cache()
        try:
            return outputs, Asleep(give_back([*self.worker.caches, *self.worker.draft_caches]))
        except OSError as error:
            return outputs, Asleep(0, str(error))

    def step(self) -> list[TokenOutput]:
        """Compute one batch and plan the next; call while `has_work`. Returns nothing while nothing is ready."""
        self.advance()
        return self.finish()

    def advance(self) -> None:
        """Order steps as far ahead as may be."""
        while len(self._under_way) < self.executor.most_under_way and not self.is_paused:
            plan = self.scheduler.plan()
            self._begin_fetches()
            if not plan.scheduled:
                return
            self._submit(plan)

    def admit(self) -> None:
        """Take new requests into the step that was ordered last, if it hasn't begun, to save them a step's wait."""
        if len(self._under_way) > 1 and self.executor.withdraw():
            handle = self._under_way.pop()
            self._num_ordered -= 1
            if self.adapters is not None:
                self.adapters.end(handle.plan)
            plan = self.scheduler.extend(handle.plan)
            self._begin_fetches()
            self._submit(plan)

    def finish(self) -> list[TokenOutput]:
        """Wait for the oldest step under way and return what it brought."""
        if not self._under_way:
            return []
        handle = self._under_way.popleft()
        result = self.executor.result(handle)
        self._num_finished += 1
        if self.adapters is not None:
            self.adapters.end(handle.plan)
        outputs = self.scheduler.commit(handle.plan, result)
        if self.adapters is not None:  # before the loop waits: sequences that ended may have made room for another
            self.adapters.tidy(self.scheduler.running, self.scheduler.waiting.values())
        if self.speculation is not None:
            self.speculation.after(handle.plan, handle.seconds if handle.is_settled else None)
        if self.offload is not None:
            self.offload.after(handle.plan, handle.seconds)
            self.offload.take_offers(self._num_ordered, self._num_finished)
        return outputs

    def _begin_fetches(self) -> None:
        if self.offload is not None:
            self.offload.begin_fetches(self._num_ordered, self._num_finished)

    def _submit(self, plan: StepPlan) -> None:
        tower = self.worker.model.tower
        order = make_order(plan, self._num_ordered, None if tower is None else images_of(plan, tower))
        self._num_ordered += 1
        if self.adapters is not None:
            self.adapters.begin(plan)
        self._under_way.append(self.executor.submit(order, plan))
        if self.offload is not None:
            self.offload.take_offers(self._num_ordered, self._num_finished)
