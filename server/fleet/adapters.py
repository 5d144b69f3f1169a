"""The adapters that a server's requests may name: what each name means, and that all engines have it.

A name means the files that it was given for, by their digest: engines know adapters by that. So what was asked under a
name before it was given to other files goes on as it was, and caches of the two are never mixed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.quant.adapter_files import AdapterError, digest_of
from octavo.runtime.messages import AdapterLoaded, DropAdapter, LoadAdapter
from octavo.server.given_directory import within
from octavo.server.lora_options import LoraModule

if TYPE_CHECKING:
    from octavo.server.engine_client import EngineClient
    from octavo.server.fleet.member import Member

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02
DROP_SECONDS = 5.0  # in which other processes of the server hear that a name means other files


@dataclass(frozen=True)
class ServedAdapter:
    """What a name means. directory: the module's path, resolved. created: seconds since 1970."""

    module: LoraModule
    digest: str
    directory: str
    created: int = field(default_factory=lambda: int(time.time()))


class AdapterNames:
    """The adapters of one server process, by name. Use from its event loop only.

    root: where their directories must lie, links resolved; None: anywhere. max_loras: None where the engines serve no
    adapters. is_open: whether requests may load and unload some. reserved: names of the model itself.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._served: dict[str, ServedAdapter] = {}
        self._loading: dict[str, LoadAdapter] = {}  # by digest: what engines that come up are told besides
        self._answers: dict[tuple[EngineClient, str], AdapterLoaded] = {}
        self._changing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self.root: Path | None = None
        self.max_loras: int | None = None
        self.is_open = False
        self.reserved: frozenset[str] = frozenset()

    def __contains__(self, name: object) -> bool:
        return name in self._served

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    @property
    def modules(self) -> list[LoraModule]:
        """All of them, as they were asked for."""
        return [served.module for served in self._served.values()]

    def get(self, name: str) -> ServedAdapter | None:
        """What a name means; None where it is no adapter's."""
        return self._served.get(name)

    def names_of(self, digests: Iterable[str]) -> list[str]:
        """The names of adapters that engines know by these digests."""
        wanted = set(digests)
        return [name for name, served in self._served.items() if served.digest in wanted]

    async def load(self, module: LoraModule, *, in_place: bool = False) -> None:
        """Serve an adapter under a name, on all engines. Raises AdapterError with what is wrong with it.

        in_place: a name that is served may be given to other files.
        """
        async with self._changing:
            if not module.name or module.name in self.reserved:
                raise AdapterError(f"{module.name!r} is the model's own name; an adapter needs one of its own")
            before = self._served.get(module.name)
            if before is not None and not in_place:
                raise AdapterError(f"an adapter {module.name!r} is loaded already; load_inplace: true takes its place")
            directory = self._allowed(module.path)
            digest = await asyncio.to_thread(digest_of, directory)
            error = await self._load_everywhere(LoadAdapter(digest, str(directory), module.name))
            if error:
                raise AdapterError(error)
            self._served[module.name] = ServedAdapter(module, digest, str(directory))
            if before is not None:
                self._drop_soon(before.digest)

    async def unload(self, name: str) -> None:
        """Serve it no more; requests under way go on with it. Raises AdapterError for a name that is none."""
        async with self._changing:
            served = self._served.pop(name, None)
            if served is None:
                raise AdapterError(f"there is no adapter {name!r}; {', '.join(self._served) or 'none'} is loaded")
            self._drop_soon(served.digest)

    async def load_all(self, modules: Iterable[LoraModule], *, again: bool = False) -> None:
        """Serve these. Raises AdapterError; again: another process of the server did, and what can't be is logged."""
        for module in modules:
            try:
                await self.load(module)
            except AdapterError as error:
                if not again:
                    raise
                logger.error("the adapter %r is not served by this process: %s", module.name, error)

    def welcome(self, client: EngineClient) -> None:
        """Tell an engine that has come up of all adapters, before it gets a request."""
        known = {it.digest: LoadAdapter(it.digest, it.directory, it.module.name) for it in self._served.values()}
        for message in (known | self._loading).values():
            client.send(message)

    def answered(self, client: EngineClient, message: AdapterLoaded) -> None:
        """An engine has said what became of an adapter."""
        if message.digest in self._loading:
            self._answers[client, message.digest] = message
        elif message.error:
            names = ", ".join(self.names_of([message.digest]))
            logger.error("an engine that was started again can't serve %s: %s", names, message.error)

    def _allowed(self, path: str) -> Path:
        try:
            return within(path, self.root, "--lora-root")
        except ValueError as error:
            raise AdapterError(str(error)) from None

    async def _load_everywhere(self, message: LoadAdapter) -> str:
        """What an engine has against it; "" where none has anything."""
        digest = message.digest
        asked = [(member, member.client) for member in self._members if member.is_up]
        if not asked:
            return "no engine is up; try again in a moment"
        self._loading[digest] = message
        for _, client in asked:
            client.send(message)
        errors: list[str] = []
        for member, client in asked:
            while (answer := self._answers.pop((client, digest), None)) is None:
                if member.client is not client or client.death is not None:
                    break  # it is told when it comes up again
                await asyncio.sleep(POLL_SECONDS)
            if answer is not None and answer.error:
                errors.append(answer.error)
        del self._loading[digest]
        return errors[0] if errors else ""

    def _drop_soon(self, digest: str) -> None:
        self._loop.call_later(DROP_SECONDS, self._drop_unnamed, digest)

    def _drop_unnamed(self, digest: str) -> None:
        if any(served.digest == digest for served in self._served.values()):
            return
        for member in self._members:
            if member.is_up:
                member.client.send(DropAdapter(digest))
