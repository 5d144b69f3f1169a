"""octavo on Ray Serve: a replica is a cell, which Ray places, scales, watches and replaces.

    serve run octavo.server.ray_serve:build model=MODEL max_replicas=3 num_gpus=1

A replica starts `octavo serve` as its child, on a Unix socket, and hands HTTP requests over as they are. So whatever
the server does, it does here too: all dialects, drains, several engines or ranks by its own flags. Ray only sees bytes.
The child has the replica's GPUs and ends with it. A `Front` stands before the cells where they are chosen by prefix
(server/ray_router.py). Ray is imported in `build` alone.
"""

from __future__ import annotations

import collections
import json
import math
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from shutil import rmtree
from typing import TYPE_CHECKING, Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from octavo.runtime.launch import child_environment
from octavo.server.hop_headers import end_to_end
from octavo.server.ray_prompt import Prompt, read_prompt

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

POLL_SECONDS = 0.05
HEALTH_SECONDS = 25.0  # Ray gives a check 30 s
STOP_SECONDS = 15.0  # for the child to end once nothing is under way
OWN_FLAGS = ("host", "port", "uds", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs")
# Each engine, and each rank of it, has threads of its own.
SIZES = ("data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size")
Headers = list[tuple[str, str]]


class Options(BaseModel):
    """Arguments of `build`. Any others are flags of `octavo serve`: `tensor_parallel_size=2`, `enforce_eager=true`,
    and `enable_prefix_caching=false` for `--no-enable-prefix-caching`.

    router: who chooses a replica. ray: Ray's own power of two choices. session: a consistent hash of the header
    `x-session-id`. prefix: waiting tokens and cached prefix, as among the engines of a cell.
    num_cpus, num_gpus: what a replica takes of a node. Without a GPU a cell's engines and ranks share as many threads.
    cache_tokens: with router=prefix, what a cell's prefix cache holds.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(32, gt=0)
    max_ongoing_requests: int = Field(1024, ge=1)
    upscale_delay_s: float = Field(30, ge=0)
    downscale_delay_s: float = Field(600, ge=0)
    shutdown_timeout_s: float = Field(600, ge=0)
    num_cpus: float = Field(1, gt=0)
    num_gpus: float = Field(0, ge=0)
    router: Literal["ray", "session", "prefix"] = "ray"
    cache_tokens: int = Field(500_000, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Options:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self


def serve_arguments(options: Options) -> list[str]:
    """The words behind `octavo serve`, but for the socket."""
    flags = dict(options.model_extra or {})
    for name in OWN_FLAGS:
        if name in flags:
            raise ValueError(f"{name}: a replica's server is reached through Ray alone; `serve start` has such options")
    if options.num_gpus == 0 and "num_threads" not in flags:
        num_processes = math.prod(int(flags.get(name, 1)) for name in SIZES)
        flags["num_threads"] = max(1, int(options.num_cpus) // num_processes)
    words = [options.model]
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if value is True or value == "true":
            words.append(flag)
        elif value is False or value == "false":
            words.append("--no-" + name.replace("_", "-"))
        else:
            words += [flag, value if isinstance(value, str) else json.dumps(value)]
    return words


def build(arguments: dict[str, Any]) -> Application:
    """The application that `serve run` and a config file's `import_path` name."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    options = Options.model_validate(arguments)
    settings: dict[str, Any] = {}
    if options.router == "session":
        settings["request_router_config"] = RequestRouterConfig(
            request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
        )
    if options.router == "prefix":
        settings["request_router_config"] = RequestRouterConfig(
            request_router_class="octavo.server.ray_router.PrefixRouter",
            request_router_kwargs={"cache_tokens": options.cache_tokens},
        )
    cells = serve.deployment(Cell).options(
        name="cell",
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.target_ongoing_requests,
            upscale_delay_s=options.upscale_delay_s,
            downscale_delay_s=options.downscale_delay_s,
        ),
        max_ongoing_requests=options.max_ongoing_requests,
        graceful_shutdown_timeout_s=options.shutdown_timeout_s,
        **settings,
    )
    bound = cells.bind(serve_arguments(options))
    if options.router != "prefix":
        return bound
    front = serve.deployment(Front).options(
        name="front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=options.max_ongoing_requests * options.max_replicas,
        graceful_shutdown_timeout_s=options.shutdown_timeout_s,
    )
    return front.bind(bound)


class Cell:
    """A replica: `octavo serve` as a child, and what hands requests over to it."""

    def __init__(self, arguments: list[str]) -> None:
        self._directory = tempfile.mkdtemp(prefix="octavo-cell-")
        path = f"{self._directory}/server"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "octavo.server.ray_cell_process", "serve", *arguments, "--uds", path],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_environment(None),
        )
        self._last_lines: collections.deque[str] = collections.deque(maxlen=20)
        reader = threading.Thread(target=self._repeat_log, daemon=True)
        reader.start()
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=path, limits=httpx.Limits(max_connections=None)), timeout=None
        )
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), timeout=HEALTH_SECONDS) as client:
            while not _is_healthy(client):
                if (code := self._process.poll()) is not None:
                    reader.join()
                    raise RuntimeError(f"octavo serve ended with {code}:\n" + "".join(self._last_lines))
                time.sleep(POLL_SECONDS)

    def _repeat_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode(errors="replace")
            self._last_lines.append(text)
            sys.stderr.write(text)

    async def check_health(self) -> None:
        """Ray asks; a replica that raises is replaced."""
        answer = await self._client.get("http://cell/health", timeout=HEALTH_SECONDS)
        answer.raise_for_status()

    async def answer(
        self, method: str, target: str, headers: Headers, body: bytes
    ) -> AsyncIterator[tuple[int, Headers] | bytes]:
        """The status with the headers, then the body as it comes. A caller that stops reading ends the request."""
        url = httpx.URL("http://cell").copy_with(raw_path=target.encode())
        try:
            request = self._client.build_request(method, url, headers=headers, content=body)
            upstream = await self._client.send(request, stream=True)
        except httpx.TransportError as error:
            yield 503, [("content-type", "application/json")]
            message = f"the cell can't be reached: {type(error).__name__}"
            yield json.dumps({"error": {"message": message, "type": "service_unavailable", "code": 503}}).encode()
            return
        try:
            yield upstream.status_code, end_to_end(upstream.headers.multi_items())
            async for chunk in upstream.aiter_raw():
                yield chunk
        finally:
            await upstream.aclose()

    async def answer_prompt(
        self, _: Prompt, method: str, target: str, headers: Headers, body: bytes
    ) -> AsyncIterator[tuple[int, Headers] | bytes]:
        """`answer`, for a router that has read the prompt."""
        async for part in self.answer(method, target, headers, body):
            yield part

    async def __call__(self, request: Request) -> Response:
        """A request of Ray's own HTTP proxy."""
        return await respond(self.answer(*await taken_apart(request)))

    def __del__(self) -> None:
        """Ray has waited for what was under way."""
        process = self._process
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        rmtree(self._directory, ignore_errors=True)


class Front:
    """Reads a request's prompt, so that the router can choose a cell by it."""

    def __init__(self, cells: DeploymentHandle) -> None:
        self._cells = cells.options(method_name="answer_prompt", stream=True)

    async def __call__(self, request: Request) -> Response:
        from octavo.server.ray_router import begun

        parts = await taken_apart(request)
        prompt = read_prompt(parts[-1])
        answer = self._cells.remote(prompt, *parts)

        async def passed_on() -> AsyncIterator[tuple[int, Headers] | bytes]:
            try:
                yield await anext(answer)
                begun(prompt)
                async for part in answer:
                    yield part
            finally:
                answer.cancel()  # does nothing to one that has ended

        return await respond(passed_on())


def _is_healthy(client: httpx.Client) -> bool:
    try:
        return client.get("http://cell/health").status_code == 200
    except httpx.TransportError:
        return False  # it doesn't listen yet


async def taken_apart(request: Request) -> tuple[str, str, Headers, bytes]:
    """Method, path with query, headers and body."""
    target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return request.method, target, end_to_end(request.headers.items()), await request.body()


async def respond(parts: AsyncIterator[tuple[int, Headers] | bytes]) -> Response:
    """An answer out of what `Cell.answer` yields."""
    head = await anext(parts)
    assert not isinstance(head, bytes)
    status, headers = head
    response = StreamingResponse(_bytes_of(parts), status)
    response.raw_headers = [(name.lower().encode(), value.encode()) for name, value in headers]
    return response


async def _bytes_of(parts: AsyncIterator[tuple[int, Headers] | bytes]) -> AsyncIterator[bytes]:
    async for part in parts:
        assert isinstance(part, bytes)
        yield part
