"""`octavo.AsyncLLM`: answers that are read while they come, in a program with an event loop. Names are vLLM's.

    async with AsyncLLM("MODEL") as llm:
        async for output in llm.generate("Once upon a time", SamplingParams(max_tokens=64), "a"):
            print(output.outputs[0].text)

Prompts that are asked at once are computed together. Who stops reading, or is cancelled, ends the answer.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from octavo.inputs import prompts_of
from octavo.lora_request import LoRARequest, checked_adapters
from octavo.offline.arguments import EngineArgs
from octavo.offline.errors import python_errors
from octavo.offline.refusals import checked_others, checked_reset, missing
from octavo.offline.start import start
from octavo.outputs import PoolingOutput, PoolingRequestOutput, RequestOutput
from octavo.pooling_params import PoolingParams, checked_params
from octavo.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from octavo.offline.model import OfflineModel


class AsyncLLM:
    """A model that loads, and is loaded when it first answers. Arguments are those of LLM.

    Use from the event loop in which it was used first. It ends with `close`, or `shutdown`, or the program.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._model = start(model, options)
        self._kill = weakref.finalize(self, _kill, self._model, os.getpid())
        self._opening: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **_: Any) -> AsyncLLM:
        """The same, with arguments that are a value."""
        return cls(engine_args.model, **engine_args.options)

    async def ready(self) -> None:
        """Wait until it can answer. Raises EngineError with the engine's own message if it can't."""
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._model.open())
        await asyncio.shield(self._opening)

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
        **others: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The answers to one prompt as they come: with each step all so far, or what sampling_params.output_kind says.

        An output has those of n answers for which the step brought something. lora_request: an adapter, with
        enable_lora=True. Raises ValueError and EngineError.
        """
        from octavo.offline.answers import GrowingRequest, TokenTexts, plain_parsers
        from octavo.offline.requests import asked_by, choices_of, tokenized, written
        from octavo.server.generation import in_batches

        (adapter,) = checked_adapters(lora_request, 1)
        checked_others("generate", others)
        (given,) = prompts_of(prompt)
        await self.ready()
        self._model.check_generates()
        model = self._model.model
        kind = sampling_params.output_kind
        with python_errors():
            asked = asked_by(sampling_params).adapted(adapter).own(given, priority)
            await self._model.load([adapter])
            found = await written(given, model)
            tokens = await asyncio.to_thread(tokenized, found, asked, model)
            reading = self._model.reading(given, tokens, asked)
            choices = choices_of([(asked, tokens, reading)], model)
            plain = plain_parsers(choices, asked, model, reading) if self._model.tells_apart else None
            growing = GrowingRequest(request_id, found.given, asked, choices, TokenTexts(model), plain)
            interval = max(sampling_params.stream_interval or 1, model.stream_interval)
            steps = self._model.steps(choices, request_id)
            async with aclosing(steps if interval == 1 else in_batches(steps, interval)) as told:
                async for deltas in told:
                    news = [growing.add(delta) for delta in deltas]
                    if news and (kind is not RequestOutputKind.FINAL_ONLY or growing.is_finished):
                        yield growing.told(news, kind)

    async def encode(
        self,
        prompt: Any,
        pooling_params: PoolingParams,
        request_id: str,
        **others: Any,
    ) -> AsyncGenerator[PoolingRequestOutput[PoolingOutput], None]:
        """What the model's pooler makes of a prompt, as one output. Raises ValueError and EngineError."""
        from octavo.offline.pooled import facts_of, pooled_prompts, tensor_of

        checked_others("encode", others)
        params = checked_params(pooling_params)
        given = prompts_of(prompt)
        await self.ready()
        _, task = facts_of(self._model, params.task)
        ((made, result),) = await pooled_prompts(self._model, given, params, task)
        yield PoolingRequestOutput(request_id, PoolingOutput(tensor_of(result, task)), made.token_ids)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End the answers of these requests: their last output has the finish reason abort."""
        names = {request_id} if isinstance(request_id, str) else set(request_id)
        self._model.fleet.abort_all_of("", names)

    async def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json says, and vLLM's defaults for the rest."""
        await self.ready()
        return self._model.default_params()

    async def get_tokenizer(self) -> Any:
        """The tokenizer, as transformers has it."""
        return await asyncio.to_thread(lambda: self._model.tokenizer)

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget all cached prefixes that no running request uses. What else vLLM has is refused."""
        checked_reset(running=reset_running_requests, connector=reset_connector)
        self._model.fleet.reset_prefix_cache()
        return True

    async def pause_generation(
        self, *, mode: Literal["abort", "wait", "keep"] = "abort", clear_cache: bool = True
    ) -> None:
        """Let no answer begin, or go on, before `resume_generation`.

        mode: answers that are under way end now, with the finish reason abort; or are waited for; or stand still.
        clear_cache: forget cached prefixes, but those of answers that stand still.
        """
        if mode not in ("abort", "wait", "keep"):
            raise ValueError(f"pause_generation: mode {mode!r} is none of abort, wait, keep")
        await self.ready()
        await self._model.fleet.pause(mode)
        if clear_cache:
            self._model.fleet.reset_prefix_cache()

    async def resume_generation(self) -> None:
        """Go on after `pause_generation`."""
        await self.ready()
        self._model.fleet.resume()

    async def is_paused(self) -> bool:
        """Whether answers wait for `resume_generation`."""
        await self.ready()
        return self._model.fleet.is_paused

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Give memory back until `wake_up`, as LLM does."""
        await self.ready()
        await self._model.sleep(level, mode)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Take memory again: weights, kv_cache, or all. Raises ValueError, and EngineError where it can't be had."""
        await self.ready()
        await self._model.wake_up(tags)

    async def is_sleeping(self) -> bool:
        """Whether the engine sleeps, be it in part."""
        return self._model.is_sleeping

    async def check_health(self) -> None:
        """Raises EngineError where it can't answer any more."""
        self._model.check()

    async def close(self) -> None:
        """End the engine. What is under way ends with an EngineError. May be called again."""
        if self._opening is not None:
            self._opening.cancel()
        await self._model.close()
        self._kill()

    def shutdown(self) -> None:
        """The same, without waiting for it."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # the program has ended its loop: no one waits for anything any more
            self._kill()
            return
        self._model.stop()  # the loop may end before it comes to the rest
        self._closing = loop.create_task(self.close())

    async def __aenter__(self) -> AsyncLLM:
        await self.ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(missing("AsyncLLM", name))


def _kill(model: OfflineModel, owner: int) -> None:
    if os.getpid() == owner:
        model.kill()
