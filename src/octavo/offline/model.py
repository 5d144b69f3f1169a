"""A model's engines and its text side, for a program instead of a server: started here, and used from one event loop.

What the server makes of a request is made of one here, by the same code; there are no clients, so nobody waits in line.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

from octavo.inputs import Given
from octavo.lora_request import LoRARequest
from octavo.offline.errors import EngineError, in_python
from octavo.offline.loading import loading_shown
from octavo.offline.measured import metrics_of
from octavo.offline.requests import Asked, Conversation, reading_for
from octavo.outputs import Metric
from octavo.quant.adapter_files import AdapterError
from octavo.quant.model_files import read_object_if_any
from octavo.runtime.launch import EngineProcess, Launcher
from octavo.sampling_params import SamplingParams
from octavo.server.admission import Ticket
from octavo.server.beam_search import search_beams
from octavo.server.engine_client import EngineDeadError
from octavo.server.errors import bad_request
from octavo.server.fleet.collector import FleetCollector
from octavo.server.fleet.fleet import Fleet
from octavo.server.fleet.sleep import ALL_MEMORY, Level, Memory, OpenRequests, Sleep, SleepError
from octavo.server.generation import Choice, Steps, generate
from octavo.server.lora_options import LoraModule
from octavo.server.metrics import Metrics
from octavo.server.prompts import Prompt
from octavo.server.reading import Reading
from octavo.server.served_model import ServedModel, generation_config_file
from octavo.server.start.engines import fleet_limits, set_adapters
from octavo.server.start.flags import ServeOptions
from octavo.server.start.served import made_metrics, served_model
from octavo.server.start.text_side import preparation, text_side
from octavo.text.chat_template import ChatTemplateError

ENDED = "it is closed"


@contextmanager
def _sleep_errors() -> Iterator[None]:
    try:
        yield
    except SleepError as error:
        raise EngineError(in_python(str(error))) from None


class OfflineModel:
    """Engines that load, until `open` has come back; then a model that answers. Raises ServeError.

    launcher, engines: what has started the engines, and these.
    """

    model: ServedModel
    metrics: Metrics

    def __init__(
        self, options: ServeOptions, directory: Path, launcher: Launcher, engines: Sequence[EngineProcess]
    ) -> None:
        self._options = options
        self._directory = directory
        self._launcher = launcher
        self._engines = engines
        self._text = text_side(options, directory)
        self._text.renderer.start()
        self._fleet: Fleet | None = None
        self._sleep: Sleep | None = None
        self._is_closed = False
        self._loading = asyncio.Lock()

    @property
    def fleet(self) -> Fleet:
        """The engines. Raises EngineError where they are closed, or not open yet."""
        if self._fleet is None or self._is_closed:
            raise EngineError(ENDED)
        return self._fleet

    async def open(self) -> None:
        """Connect, and wait until the engines can answer. Raises EngineError with the engine's own message."""
        options = self._options
        limits = dataclasses.replace(fleet_limits(options), keeps_all=True)
        fleet = self._fleet = Fleet(self._engines, self._launcher.start, limits, options.engine.seed)
        set_adapters(fleet, options)
        try:
            formats = await preparation(options.text, self._text, lambda: loading_shown(self._engines))(fleet)
            ready = await fleet.ready()
        except (EngineDeadError, ChatTemplateError) as error:
            raise EngineError(in_python(str(error))) from None
        self.model = served_model(options, self._text, ready, formats, adapters=fleet.adapters)
        self.metrics = made_metrics(options, self.model.name, fleet, ready)
        self.metrics.register(FleetCollector(fleet, self.model.name))
        if options.upkeep.enable_sleep_mode:
            self._sleep = Sleep(fleet, "wake_up()")
        fleet.on_step = self.metrics.step
        fleet.on_restart = self.metrics.restart

    def stop(self) -> None:
        """Begin to end: no more is asked of it."""
        self._is_closed = True
        self._text.renderer.stop(ENDED)

    async def close(self) -> None:
        """End the engines. What is under way ends with an error. May be called again."""
        self.stop()
        if self._fleet is not None:
            await self._fleet.close()
        self._fleet = None
        self.kill()

    def kill(self) -> None:
        """End the processes, and what connects to them, where no event loop runs any more. May be called again."""
        self.stop()
        fleet = self._fleet
        self._fleet = None
        if fleet is not None:
            fleet.context.destroy(linger=0)  # the collector would wait for its sockets
        for engine in self._engines:
            engine.close()
        if hasattr(self, "model") and self.model.images is not None:
            self.model.images.close()

    async def load(self, adapters: Iterable[LoRARequest | None]) -> None:
        """Have the engines know these, each of which may come again and again. Raises ValueError."""
        for adapter in dict.fromkeys(adapters):
            if adapter is not None:
                async with self._loading:
                    await self._load(adapter)

    async def _load(self, adapter: LoRARequest) -> None:
        names = self.fleet.adapters
        name = adapter.lora_name
        if names.max_loras is None:
            raise ValueError("lora_request: this model was started without adapters; enable_lora=True serves them")
        known = names.get(name)
        if known is not None and not adapter.load_inplace:
            if known.directory != str(adapter.directory):
                another = f"load_inplace=True gives the name to {adapter.lora_path}"
                raise ValueError(f"lora_request: {name!r} is {known.directory}; {another}")
            return
        module = LoraModule(name, adapter.lora_path, adapter.base_model_name or "")
        try:
            await names.load(module, in_place=adapter.load_inplace)
        except AdapterError as error:
            raise ValueError(f"lora_request: {in_python(str(error))}") from None

    def check_generates(self) -> None:
        """Raise ValueError where the model generates nothing."""
        pooled = self.model.pooled
        if pooled is not None:
            tasks = ", ".join(pooled.facts.tasks)
            raise ValueError(f"this model generates nothing; LLM's embed, classify, score and encode do {tasks}")
        if self.model.speech is not None:
            raise ValueError(
                "this model writes down what it hears, which octavo.LLM can't give it; octavo serve does, at "
                "/v1/audio/transcriptions"
            )

    def steps(self, choices: Sequence[Choice], name: str = "") -> Steps:
        """The deltas of these answers, step by step; beams all at once. name: by which they can be aborted."""
        answers = generate if choices[0].length_penalty is None else search_beams
        return answers(choices, self.fleet, self.metrics, Ticket("", math.inf, math.inf, name=name))

    @property
    def tells_apart(self) -> bool:
        """Whether answers are read as reasoning, content and calls."""
        text = self._options.text
        return text.reasoning_parser is not None or text.tool_call_parser is not None

    def reading(self, given: Given | Conversation, prompt: Prompt, asked: Asked) -> Reading | None:
        """How the answer to a prompt is told apart; None where it is not. Raises ApiError."""
        if not self.tells_apart:
            if asked.budget is not None:
                raise bad_request("thinking_token_budget: LLM(..., reasoning_parser=...) follows the reasoning", None)
            return None
        return reading_for(given, prompt, asked, self.model)

    async def sleep(self, level: int, mode: str) -> None:
        """Give memory back. Raises ValueError and EngineError."""
        if level not in get_args(Level):
            raise ValueError(f"sleep: level {level}: 1 gives back the KV cache's memory, and 2 all of the engine's")
        if mode not in get_args(OpenRequests):
            raise ValueError(f"sleep: mode {mode!r} is none of {', '.join(get_args(OpenRequests))}")
        with _sleep_errors():
            await self._sleeper.sleep(cast("Level", level), cast("OpenRequests", mode))

    async def wake_up(self, tags: Iterable[str] | None) -> None:
        """Take memory again: what these name, or all. Raises ValueError and EngineError."""
        memory = ALL_MEMORY if tags is None else frozenset(tags)
        if unknown := memory.difference(ALL_MEMORY):
            raise ValueError(f"wake_up: tags {sorted(unknown)}: they are weights and kv_cache")
        with _sleep_errors():
            await self._sleeper.wake(cast("frozenset[Memory]", memory))

    @property
    def is_sleeping(self) -> bool:
        """Whether the engine sleeps, be it in part."""
        return self._sleep is not None and self._sleep.level > 0

    @property
    def _sleeper(self) -> Sleep:
        self.fleet  # noqa: B018 (raises where it is closed)
        if self._sleep is None:
            raise ValueError("the engine can't sleep: enable_sleep_mode=True lets it")
        return self._sleep

    def check(self) -> None:
        """Raise EngineError where no engine can answer now."""
        if (problem := self.fleet.problem) is not None:
            raise EngineError(problem)

    def measured(self) -> list[Metric]:
        """What has been counted since the start."""
        self.metrics.settle()
        return metrics_of(self.metrics.registry.collect())

    def default_params(self) -> SamplingParams:
        """The model's own sampling parameters, as generation_config.json and the options say, and vLLM's for the rest.

        max_tokens is the file's max_new_tokens, which `octavo serve` does not read.
        """
        source = self._options.text.generation_config
        fields: dict[str, Any] = dict(self.model.defaults)
        if source != "vllm":
            config = read_object_if_any(generation_config_file(self._directory, source))
            if config.get("max_new_tokens") is not None:
                fields["max_tokens"] = config["max_new_tokens"]
        return SamplingParams(**fields)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as transformers has it."""
        from transformers import AutoTokenizer

        source = self._options.model.tokenizer or self._directory
        trusts = self._options.engine.trust_remote_code
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=trusts)
