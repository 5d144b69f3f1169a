"""A server of a program's own: `octavo serve MODEL` as a child process, which ends with this one."""

from __future__ import annotations

import asyncio
import json
import tempfile
import weakref
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import IO, Any

from octavo.lang.backend import Json
from octavo.lang.execution import waker
from octavo.lang.native import RuntimeEndpoint
from octavo.own_server import OwnServer, ServerEndedError

CHOSEN_HERE = ("host", "port", "api_key", "uds")
Prompts = str | list[str] | list[int] | list[list[int]]


class Runtime:
    """A server of this model, on a free port of this machine, which nobody else has the key of; programs run on it.

    flags: those of `octavo serve` with underscores (vLLM's and SGLang's names), True for one without a value, False for
    its --no- form. launch_timeout: seconds until it must be ready. `shutdown` ends it, as do the end of a `with` block
    and that of the process, however it comes. Raises ServerEndedError, ValueError, TypeError.
    """

    def __init__(
        self, model_path: str, *, launch_timeout: float = 300.0, max_connections: int = 256, **flags: Any
    ) -> None:
        wrong = [name for name in CHOSEN_HERE if name in flags]
        if wrong:
            raise ValueError(f"{wrong[0]}: Runtime chooses it; RuntimeEndpoint(url) is for a server that you start")
        words = words_of(flags)
        log = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the server
        server = OwnServer([str(model_path), *words], log, {})
        self._tokenizer = flags.get("tokenizer_path") or flags.get("tokenizer") or model_path
        self._trusts = bool(flags.get("trust_remote_code"))
        self.pid = server.pid
        self.url = server.url
        self._end = weakref.finalize(self, _end, server, log)
        try:
            server.wait_until_ready(launch_timeout)
            self.endpoint = RuntimeEndpoint(server.url, server.api_key, max_connections=max_connections)
        except BaseException:
            self.shutdown()
            raise

    @property
    def generate_url(self) -> str:
        """Where SGLang's own API is."""
        return f"{self.url}/generate"

    def generate(self, prompt: Prompts, sampling_params: Json | None = None, **options: Any) -> str:
        """What POST /generate answers, as JSON. options: its other fields. Raises BackendError."""
        return json.dumps(self.endpoint.ask_native(_body(prompt, sampling_params, options)))

    async def async_generate(
        self, prompt: Prompts, sampling_params: Json | None = None, **options: Any
    ) -> AsyncIterator[str]:
        """The pieces of one answer's text as they come. Who stops reading ends the answer. Raises BackendError.

        Raises ValueError for several prompts or answers, whose pieces nobody could tell apart; `generate` takes them.
        """
        if (sampling_params or {}).get("n", 1) != 1 or (
            isinstance(prompt, list) and not all(isinstance(each, int) for each in prompt[:1])
        ):
            raise ValueError("async_generate: one prompt and one answer at a time; generate takes several")
        pieces: deque[str] = deque()
        woken = asyncio.Event()
        wake = waker(woken)
        said = ""

        def take(event: Any) -> None:
            nonlocal said
            pieces.append(event["text"][len(said) :])
            said = event["text"]
            wake()

        body = _body(prompt, sampling_params, options)
        stream = asyncio.ensure_future(self.endpoint.stream_native(body, take))
        stream.add_done_callback(lambda _: woken.set())
        try:
            while not stream.done() or pieces:
                woken.clear()
                while pieces:
                    if piece := pieces.popleft():
                        yield piece
                if not stream.done():
                    await woken.wait()
            stream.result()
        finally:
            stream.cancel()

    add_request = async_generate

    def cache_prefix(self, prefix: str) -> None:
        """Compute a text, so that prompts that begin with it find it in the cache."""
        self.endpoint.cache_prefix(prefix)

    def flush_cache(self) -> None:
        """Forget all prefixes that no running request holds."""
        self.endpoint.flush_cache()

    def get_server_info(self) -> Json:
        """What the server says of itself; SGLang's is a coroutine."""
        return self.endpoint.get_server_info()

    def get_tokenizer(self) -> Any:
        """The tokenizer, as transformers has it."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(self._tokenizer), trust_remote_code=self._trusts)

    def encode(self, prompt: object) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError(f"encode({prompt!r:.40}): octavo's server does not serve models that embed yet")

    def start_profile(self) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError("start_profile: octavo's server has no profiler; /metrics tells what took how long")

    stop_profile = start_profile

    def shutdown(self) -> None:
        """End the server."""
        self._end()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def _body(prompt: Prompts, sampling_params: Json | None, options: Json) -> Json:
    """Of POST /generate: a text or a list of them, or token ids."""
    is_ids = isinstance(prompt, list) and not isinstance(prompt[:1] and prompt[0], str)
    asked = {name: value for name, value in options.items() if value is not None}
    return {"input_ids" if is_ids else "text": prompt, "sampling_params": sampling_params or {}, **asked}


def words_of(flags: Mapping[str, Any]) -> list[str]:
    """The words of a command line. None leaves a flag out."""
    from octavo.server.start import arguments  # of the server's code, which other backends don't need

    return [
        word
        for name, value in flags.items()
        for word in arguments.words_of(f"--{name.replace('_', '-')}", value, own=())
    ]


def _end(server: OwnServer, log: IO[bytes]) -> None:
    server.end()
    log.close()


__all__ = ["Runtime", "ServerEndedError", "words_of"]
