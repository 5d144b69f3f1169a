"""`octavo.AsyncLLM`: answers that are read while they come, and what ends them."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from octavo_server import TINY
from tiny_oracle import Oracle

from octavo import AsyncEngineArgs, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams
from octavo.offline.errors import EngineError

PROMPT = "The capital of"

pytestmark = pytest.mark.usefixtures("forked")


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(300):
            await work

    asyncio.run(bounded())


def asked(kind: RequestOutputKind, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 9, "output_kind": kind} | fields)


async def read(
    llm: AsyncLLM, params: SamplingParams, request_id: str = "a", prompt: Any = PROMPT
) -> list[RequestOutput]:
    return [output async for output in llm.generate(prompt, params, request_id)]


def test_a_stream_says_what_its_kind_asks_for(small: dict[str, Any], oracle: Oracle) -> None:
    ids = oracle.ids(PROMPT)
    expected = oracle.greedy(ids, 9)

    async def test() -> None:
        async with AsyncLLM(str(TINY), **small) as llm:
            whole = await read(llm, asked(RequestOutputKind.CUMULATIVE, logprobs=1))
            told = [output.outputs[0] for output in whole]
            lengths = [len(one.token_ids) for one in told]  # a step's token each, unless two have come meanwhile
            assert lengths == sorted(set(lengths))
            assert lengths[-1] == 9 > lengths[0]
            assert all(expected[: len(one.token_ids)] == one.token_ids for one in told)
            assert all(one.logprobs is not None and len(one.logprobs) == len(one.token_ids) for one in told)
            assert [output.finished for output in whole] == [length == 9 for length in lengths]
            assert (told[-1].text, told[-1].finish_reason) == (oracle.text(expected), "length")
            assert all(output.prompt_token_ids == ids and output.request_id == "a" for output in whole)
            assert (whole[-1].prompt, whole[-1].num_cached_tokens) == (PROMPT, 0)

            deltas = await read(llm, asked(RequestOutputKind.DELTA, logprobs=1))
            news = [output.outputs[0] for output in deltas]
            assert [token for one in news for token in one.token_ids] == expected
            assert "".join(one.text for one in news) == oracle.text(expected)
            assert news[-1].cumulative_logprob == pytest.approx(told[-1].cumulative_logprob)

            (last,) = await read(llm, asked(RequestOutputKind.FINAL_ONLY, logprobs=1))
            assert last.outputs == told[-1:]
            assert last.finished

            spare = await read(llm, asked(RequestOutputKind.DELTA, stream_interval=4))
            first, *between, last_length = [len(output.outputs[0].token_ids) for output in spare]
            assert first + sum(between) + last_length == 9
            assert all(length >= 4 for length in between)
            assert len(spare) < 5

    run(test())


def test_a_slow_reader_misses_nothing(small: dict[str, Any], oracle: Oracle) -> None:
    """What several steps have brought meanwhile comes as one output, of each answer one."""
    expected = oracle.greedy(oracle.ids(PROMPT), 40)

    async def test() -> None:
        async with AsyncLLM(str(TINY), **small) as llm:
            for interval in (1, 3):
                params = asked(RequestOutputKind.DELTA, max_tokens=40, logprobs=0, stream_interval=interval)
                tokens: list[int] = []
                count = 0
                async for output in llm.generate(PROMPT, params, "a"):
                    (one,) = output.outputs
                    assert one.logprobs is not None
                    assert [token for position in one.logprobs for token in position] == one.token_ids
                    tokens += one.token_ids
                    count += 1
                    time.sleep(0.05)  # the whole loop, so that outputs wait
                assert tokens == expected
                assert count < 40

    run(test())


def test_several_answers_are_told_apart(small: dict[str, Any]) -> None:
    async def test() -> None:
        async with AsyncLLM(str(TINY), **small) as llm:
            asking = {"temperature": 1.0, "seed": 3, "n": 3}
            (whole,) = await read(llm, asked(RequestOutputKind.FINAL_ONLY, **asking))
            assert [one.index for one in whole.outputs] == [0, 1, 2]
            texts = ["", "", ""]
            for output in await read(llm, asked(RequestOutputKind.DELTA, **asking)):
                for one in output.outputs:
                    texts[one.index] += one.text
            assert texts == [one.text for one in whole.outputs]

    run(test())


def test_prompts_are_answered_together(small: dict[str, Any], oracle: Oracle) -> None:
    prompts = [f"{PROMPT} {word}" for word in ["a", "b", "c", "d", "e", "f"]]

    async def test() -> None:
        async with AsyncLLM(str(TINY), **small) as llm:
            params = asked(RequestOutputKind.FINAL_ONLY)
            answers = await asyncio.gather(*(read(llm, params, prompt, prompt) for prompt in prompts))
            for prompt, (output,) in zip(prompts, answers, strict=True):
                assert output.request_id == prompt
                assert output.outputs[0].token_ids == oracle.greedy(oracle.ids(prompt), 9)

    run(test())


def test_who_stops_reading_ends_the_answer(small: dict[str, Any]) -> None:
    async def test() -> None:
        async with AsyncLLM(str(TINY), **small) as llm:
            long = asked(RequestOutputKind.DELTA, max_tokens=400)
            async with aclosing(llm.generate(PROMPT, long, "a")) as outputs:
                async for _ in outputs:
                    assert llm._model.fleet.num_open == 1
                    break
            assert llm._model.fleet.num_open == 0
            task = asyncio.create_task(read(llm, long))
            while not llm._model.fleet.num_open:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert llm._model.fleet.num_open == 0

    run(test())


def test_an_aborted_answer_says_so(small: dict[str, Any]) -> None:
    async def test() -> None:
        async with AsyncLLM(str(TINY), **small) as llm:
            long = asked(RequestOutputKind.CUMULATIVE, max_tokens=400)
            other = asyncio.create_task(read(llm, long, "other"))
            found = []
            async for output in llm.generate(PROMPT, long, "mine"):
                found.append(output)
                if len(found) == 3:
                    await llm.abort("mine")
            assert found[-1].finished
            assert found[-1].outputs[0].finish_reason == "abort"
            assert len(found[-1].outputs[0].token_ids) < 400
            assert (await other)[-1].outputs[0].finish_reason == "length"
            await llm.abort(["mine", "nobody's"])

    run(test())


def test_what_stands_still_goes_on_as_if_it_had_not(small: dict[str, Any], oracle: Oracle) -> None:
    async def test() -> None:
        async with AsyncLLM(str(TINY), **small) as llm:
            found: list[RequestOutput] = []
            begun = asyncio.Event()

            async def read_on() -> None:
                async for output in llm.generate(PROMPT, asked(RequestOutputKind.CUMULATIVE, max_tokens=300), "a"):
                    found.append(output)
                    if len(found) == 3:
                        begun.set()

            reading = asyncio.create_task(read_on())
            await begun.wait()
            assert not await llm.is_paused()
            await llm.pause_generation(mode="keep")
            assert await llm.is_paused()
            other = asyncio.create_task(read(llm, asked(RequestOutputKind.FINAL_ONLY)))
            await asyncio.sleep(0.3)  # what had been under way has come
            count = len(found)
            await asyncio.sleep(0.3)
            assert (len(found), other.done(), found[-1].finished) == (count, False, False)
            await llm.resume_generation()
            await reading
            assert found[-1].outputs[0].token_ids == oracle.greedy(oracle.ids(PROMPT), 300)
            assert (await other)[0].finished

            ended = asyncio.create_task(read(llm, asked(RequestOutputKind.CUMULATIVE, max_tokens=400)))
            await asyncio.sleep(0)
            await llm.pause_generation()
            assert await llm.is_paused()
            await llm.resume_generation()
            assert (await ended)[-1].outputs[0].finish_reason in ("abort", "length")
            with pytest.raises(ValueError, match="mode 'stop' is none of"):
                await llm.pause_generation(mode="stop")  # type: ignore[arg-type]

    run(test())


def test_what_is_wrong_is_said(small: dict[str, Any]) -> None:
    async def test() -> None:
        async with AsyncLLM(str(TINY), **small) as llm:
            params = asked(RequestOutputKind.DELTA)
            with pytest.raises(ValueError, match="maximum context length"):
                await read(llm, params, prompt=[5] * 512)
            with pytest.raises(ValueError, match="lora_request"):
                async for _ in llm.generate(PROMPT, params, "a", lora_request=1):
                    pass
            with pytest.raises(ValueError, match="enable_sleep_mode=True"):
                await llm.sleep()
            assert not await llm.is_sleeping()
            await llm.check_health()
            assert (await llm.get_default_sampling_params()).max_tokens == 16
            assert (await llm.get_tokenizer()).vocab_size == 1024
            assert await llm.reset_prefix_cache()
            with pytest.raises(ValueError, match="reset_running_requests"):
                await llm.reset_prefix_cache(reset_running_requests=True)

    run(test())


def test_it_ends(small: dict[str, Any]) -> None:
    """By `close`, by `shutdown` in a loop that ends at once, and before it was ever used."""
    pids = []

    def made() -> AsyncLLM:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(str(TINY), **small))
        pids.append(llm._model._engines[0].process.pid)
        return llm

    async def close() -> None:
        llm = made()
        assert await read(llm, asked(RequestOutputKind.FINAL_ONLY))
        await llm.close()
        with pytest.raises(EngineError, match="closed"):
            await read(llm, asked(RequestOutputKind.FINAL_ONLY))

    async def shut_down() -> None:
        llm = made()
        assert await read(llm, asked(RequestOutputKind.FINAL_ONLY))
        llm.shutdown()

    run(close())
    run(shut_down())
    made().shutdown()
    unused = made()
    del unused
    gc.collect()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
