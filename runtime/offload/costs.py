"""Whether reading blocks takes less time than computing them: by this engine's own steps, and by what was read last."""

from __future__ import annotations

from collections import deque

from octavo.runtime.scheduling.plan import StepPlan

NUM_KEPT = 9  # last measurements, of which the median counts
LEAST_TOKENS = 32  # of a step that tells what a token of a prompt takes
PROBE = 100  # of so many requests for which reading doesn't pay one reads nevertheless, to see whether that still holds


class FetchCosts:
    """Medians of what was measured last. What was never measured is tried: reading is believed to pay."""

    def __init__(self) -> None:
        self._of_tokens: deque[float] = deque(maxlen=NUM_KEPT)
        self._of_blocks: deque[float] = deque(maxlen=NUM_KEPT)
        self._num_refused = 0

    def take(self, plan: StepPlan, seconds: float) -> None:
        """A step has been computed; one without a chunk of a prompt tells nothing here."""
        if plan.num_tokens >= LEAST_TOKENS and any(it.end - it.start >= LEAST_TOKENS for it in plan.scheduled):
            self._of_tokens.append(seconds / plan.num_tokens)

    def read(self, num_blocks: int, seconds: float) -> None:
        """So many blocks were read in this time."""
        self._of_blocks.append(seconds / num_blocks)

    def computing(self, num_tokens: int) -> float | None:
        """Seconds that it takes to compute so many tokens of a prompt; None: not known yet."""
        return _median(self._of_tokens) * num_tokens if self._of_tokens else None

    def pays(self, num_tokens: int, num_blocks: int) -> bool:
        """Whether to read so many blocks, in place of computing so many tokens."""
        computing = self.computing(num_tokens)
        if computing is None or not self._of_blocks or _median(self._of_blocks) * num_blocks < computing:
            return True
        self._num_refused += 1
        return self._num_refused % PROBE == 0


def _median(values: deque[float]) -> float:
    return sorted(values)[len(values) // 2]
