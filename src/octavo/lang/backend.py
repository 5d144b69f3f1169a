"""What a program needs of a model: a text that goes on, and a choice among texts. Where that comes from is a backend's.

The default backend of a process stands here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from octavo.lang.choices import ChoicesDecision, ChoicesSamplingMethod
from octavo.lang.ir import Options
from octavo.lang.templates import PLAIN

Json = dict[str, Any]
OnText = Callable[[str, Json], None]
"""Takes a piece of text as it comes, and what is known of the answer so far."""


Message = dict[str, Any]
"""A turn, {"role", "content"}: text, or where it has images, parts of text and images as OpenAI's API has them."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a program has said so far.

    messages   the turns that are closed
    role       whose turn is open, or None
    text       what is in the open turn; of a program without turns, all of its text
    images     of the open turn: how many characters stand before each, and its address
    """

    text: str
    messages: Sequence[Message] = ()
    role: str | None = None
    images: Sequence[tuple[int, str]] = ()

    @property
    def has_turns(self) -> bool:
        """Whether it is a conversation."""
        return self.role is not None or bool(self.messages)

    @property
    def image_urls(self) -> list[str]:
        """Of all images, in order."""
        closed = [url for message in self.messages for url in urls_of(message["content"])]
        return [*closed, *(url for _, url in self.images)]


@dataclass(frozen=True, slots=True)
class Generated:
    """The n answers to one gen, and what the server says of each."""

    texts: list[str]
    metas: list[Json]


class Backend(ABC):
    """A server of a model. max_connections: how many of its requests are under way at a time."""

    max_connections: int

    @abstractmethod
    async def generate(self, context: Context, options: Options, on_text: OnText | None) -> Generated:
        """Go on from here. on_text gets the pieces of the one answer as they come. Raises BackendError, ValueError."""

    async def select(
        self,
        context: Context,  # noqa: ARG002
        choices: list[str],
        method: ChoicesSamplingMethod,  # noqa: ARG002
    ) -> ChoicesDecision:
        """Choose how to go on from here. Raises BackendError, and ValueError where the API doesn't allow it."""
        raise ValueError(
            f"select among {choices}: the API behind {type(self).__name__} tells no log-probabilities of given text; "
            "that behind RuntimeEndpoint does"
        )

    async def text_of(self, context: Context) -> str:
        """A context as one text."""
        return PLAIN.text(context.messages, context.role, context.text) if context.has_turns else context.text


class Owner(Protocol):
    """What has a backend: a Runtime."""

    endpoint: Any


AnyBackend = Backend | Owner

_default: Backend | None = None


def content_of(text: str, images: Sequence[tuple[int, str]]) -> str | list[Json]:
    """A turn's content, of Context's text and images."""
    if not images:
        return text
    parts: list[Json] = []
    begin = 0
    for place, url in (*images, (len(text), "")):
        if text[begin:place]:
            parts.append({"type": "text", "text": text[begin:place]})
        if url:
            parts.append({"type": "image_url", "image_url": {"url": url}})
        begin = place
    return parts


def urls_of(content: str | list[Json]) -> list[str]:
    """Of a turn's images."""
    return [] if isinstance(content, str) else [it["image_url"]["url"] for it in content if it["type"] == "image_url"]


def set_default_backend(backend: AnyBackend | None) -> None:
    """Let programs that are given no backend run on this one."""
    global _default
    _default = None if backend is None else _itself(backend)


def chosen(backend: AnyBackend | None) -> Backend:
    """The backend, or the default one. Raises ValueError where there is none."""
    found = _default if backend is None else _itself(backend)
    if found is None:
        raise ValueError("there is no backend: set_default_backend(RuntimeEndpoint(url)), or backend=... to run")
    return found


def _itself(backend: object) -> Backend:
    found = getattr(backend, "endpoint", backend)
    if not isinstance(found, Backend):
        raise TypeError(f"a backend is needed, such as RuntimeEndpoint(url), and no {type(backend).__name__}")
    return found


def check_select(choices: Sequence[str]) -> None:
    """Raise ValueError for an empty choice: it has no token to be likely or not."""
    if "" in choices:
        raise ValueError("select: one of the choices is empty, and has no token whose probability could be asked for")
