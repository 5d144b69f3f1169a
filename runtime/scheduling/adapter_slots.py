"""Which adapters have the slots of a device, and which requests may begin: pure bookkeeping, no tensor.

A request begins where its adapter has a slot, or where a slot has no adapter that is in use. Where neither is so, it is
passed over, and so that it won't be passed over for ever, one adapter that is in use is closed for those behind it: the
one that has had its slot longest. A second adapter that waits closes a second one, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable


class Adapter:
    """An adapter as the scheduler knows it, by the digest of its files.

    name       what it was called when it was loaded, for those who watch
    is_up      whether it is in memory, so that it can be put into a slot
    slot       -1: none
    num_steps  steps under way that use the slot
    taken_at, used_at  by the slots' own count: when it was put into its slot, and last used
    """

    __slots__ = ("digest", "is_up", "name", "num_steps", "slot", "taken_at", "used_at")

    def __init__(self, digest: str, name: str = "") -> None:
        self.digest = digest
        self.name = name
        self.is_up = False
        self.slot = -1
        self.num_steps = 0
        self.taken_at = 0
        self.used_at = 0


class AdapterSlots:
    """The slots of one engine. on_put is called with a slot and the adapter that it has now, or None."""

    def __init__(self, count: int) -> None:
        self._in: list[Adapter | None] = [None] * count
        self._count = 0
        self.on_put: Callable[[int, Adapter | None], None] = lambda _slot, _adapter: None

    def admission(self, running: Iterable[Adapter | None]) -> Admission:
        """The beginning of an admission beside sequences that run with these."""
        return Admission(self, {adapter for adapter in running if adapter is not None})

    def has_room(self, adapter: Adapter, running: Iterable[Adapter | None]) -> bool:
        """Whether a sequence with this adapter could begin now, beside those that run with these."""
        in_use = {other for other in running if other is not None}
        return adapter.is_up and (adapter.slot >= 0 or self.free(in_use) is not None)

    def free(self, in_use: set[Adapter]) -> int | None:
        """A slot that no sequence and no step under way uses: an empty one, or the one that was used longest ago."""
        found: int | None = None
        oldest = -1
        for slot, adapter in enumerate(self._in):
            if adapter is None:
                return slot
            if adapter not in in_use and not adapter.num_steps and (found is None or adapter.used_at < oldest):
                found = slot
                oldest = adapter.used_at
        return found

    def put(self, slot: int, adapter: Adapter | None) -> None:
        """Give a slot that `free` has named to an adapter; None: empty it."""
        before = self._in[slot]
        if before is not None:
            before.slot = -1
        self._in[slot] = adapter
        if adapter is not None:
            self._count += 1
            adapter.slot = slot
            adapter.taken_at = self._count
        self.on_put(slot, adapter)

    def use(self, adapter: Adapter) -> None:
        """A sequence with this adapter begins."""
        self._count += 1
        adapter.used_at = self._count


class Admission:
    """Which sequences may begin in one step, asked in the order in which they wait."""

    def __init__(self, slots: AdapterSlots, in_use: set[Adapter]) -> None:
        self._slots = slots
        self._in_use = in_use
        self._blocked: set[Adapter] = set()

    def admits(self, adapter: Adapter) -> bool:
        """Whether a sequence with this adapter may begin; then the adapter has a slot."""
        if adapter.slot < 0:
            slot = self._slots.free(self._in_use)
            if slot is None:
                self._blocked.add(adapter)
                return False
            if not adapter.is_up:
                return False
            self._slots.put(slot, adapter)
        elif self._is_closed(adapter):
            return False
        self._in_use.add(adapter)
        self._slots.use(adapter)
        return True

    def _is_closed(self, adapter: Adapter) -> bool:
        if not self._blocked or adapter not in self._in_use:
            return bool(self._blocked)  # its slot is for one that has waited longer
        older = sum(other.taken_at < adapter.taken_at for other in self._in_use)
        return older < len(self._blocked)
