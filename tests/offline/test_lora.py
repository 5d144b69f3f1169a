"""`lora_request`: what LLM and AsyncLLM answer with adapters is what PEFT computes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from octavo_server import TINY
from peft_oracle import PeftOracle
from tiny_oracle import Oracle

from octavo import LLM, AsyncLLM, BeamSearchParams, LoRARequest, SamplingParams

PROMPTS = ["The capital of", "def f(x):\n", "The cat sat on"]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
CHAT = [{"role": "user", "content": "Say hello."}]


class Adapters:
    """Two adapters of the tiny model."""

    def __init__(self, oracle: Oracle, directory: Path) -> None:
        self.plain = oracle
        self.oracles = [
            PeftOracle(oracle._model, directory / str(seed), seed=seed, r=8, lora_alpha=32) for seed in range(2)
        ]
        self.requests = [LoRARequest(f"lora{i}", i + 1, str(one.directory)) for i, one in enumerate(self.oracles)]

    def greedy(self, ids: list[int], number: int | None, count: int = 6) -> list[int]:
        """What PEFT says."""
        if number is None:
            return self.plain.greedy(ids, count)
        found = list(ids)
        for _ in range(count):
            found.append(int(self.oracles[number].logits(found)[-1].argmax()))
        return found[len(ids) :]


@pytest.fixture(scope="module")
def adapters(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(oracle, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def adapted(forked: None, small: dict[str, Any]) -> Iterator[LLM]:  # noqa: ARG001
    with LLM(str(TINY), enable_lora=True, max_loras=1, **small) as found:
        yield found


def test_each_prompt_has_its_adapter(adapted: LLM, adapters: Adapters) -> None:
    """Two, and the model itself, in one call, though one slot is all there is."""
    numbers = (1, None, 0)
    given = [None if number is None else adapters.requests[number] for number in numbers]
    outputs = adapted.generate(PROMPTS, GREEDY, lora_request=given, use_tqdm=False)
    for output, number, request in zip(outputs, numbers, given, strict=True):
        assert output.outputs[0].token_ids == adapters.greedy(output.prompt_token_ids, number)
        assert output.lora_request is output.outputs[0].lora_request is request
    together = adapted.generate(PROMPTS, GREEDY, lora_request=adapters.requests[0], use_tqdm=False)
    for output in together:
        assert output.outputs[0].token_ids == adapters.greedy(output.prompt_token_ids, 0)
    (chat,) = adapted.chat(CHAT, GREEDY, use_tqdm=False, lora_request=adapters.requests[1])
    assert chat.outputs[0].token_ids == adapters.greedy(chat.prompt_token_ids, 1)
    beams = adapted.beam_search(PROMPTS[0], BeamSearchParams(1, 6, ignore_eos=True), adapters.requests[0])
    (beam,) = beams[0].sequences
    assert beam.tokens == together[0].prompt_token_ids + together[0].outputs[0].token_ids
    assert beam.lora_request is adapters.requests[0]


def test_a_name_is_given_to_another_adapter_on_purpose_only(adapted: LLM, adapters: Adapters) -> None:
    first, second = (str(oracle.directory) for oracle in adapters.oracles)
    for path, in_place in ((first, False), (second, True), (second, False)):
        request = LoRARequest("mine", 7, path, load_inplace=in_place)
        (output,) = adapted.generate(PROMPTS[0], GREEDY, lora_request=request, use_tqdm=False)
        assert output.outputs[0].token_ids == adapters.greedy(output.prompt_token_ids, int(path == second))
    with pytest.raises(ValueError, match=f"lora_request: 'mine' is {second}; load_inplace=True gives the name to"):
        adapted.generate(PROMPTS[0], lora_request=LoRARequest("mine", 7, first))
    with pytest.raises(ValueError, match="lora_request: 'a' is x and y; each adapter needs a name of its own"):
        adapted.generate(PROMPTS[:2], lora_request=[LoRARequest("a", 1, "x"), LoRARequest("a", 1, "y")])
    adapted.enqueue(PROMPTS[0], GREEDY, LoRARequest("mine", 7, first, load_inplace=True))
    with pytest.raises(ValueError, match=r"lora_request: 'mine' is .* and .*; each adapter needs a name of its own"):
        adapted.enqueue(PROMPTS[0], GREEDY, LoRARequest("mine", 7, second, load_inplace=True))
    (kept,) = adapted.wait_for_completion(use_tqdm=False)
    assert kept.outputs[0].token_ids == adapters.greedy(kept.prompt_token_ids, 0)


def test_what_can_t_be_is_said(adapted: LLM, llm: LLM, adapters: Adapters, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora_request: .*has no adapter_config.json"):
        adapted.generate(PROMPTS[0], lora_request=LoRARequest("none", 1, str(tmp_path)))
    with pytest.raises(ValueError, match="lora_request: 1 for 3 prompts"):
        adapted.generate(PROMPTS, lora_request=[adapters.requests[0]])
    with pytest.raises(ValueError, match="enable_lora=True serves them"):
        llm.generate(PROMPTS[0], lora_request=adapters.requests[0])
    with pytest.raises(ValueError, match="lora_int_id is 0"):
        LoRARequest("a", 0, "x")
    with pytest.raises(ValueError, match="lora_path, a directory, must be given"):
        LoRARequest("a", 1)


@pytest.mark.usefixtures("forked")
def test_streams_of_one_new_adapter_load_it_once(small: dict[str, Any], adapters: Adapters) -> None:
    async def said(llm: AsyncLLM, number: int, request_id: str) -> None:
        async for output in llm.generate(PROMPTS[0], GREEDY, request_id, lora_request=adapters.requests[number]):
            last = output
        assert last.outputs[0].token_ids == adapters.greedy(last.prompt_token_ids, number)

    async def test() -> None:
        async with AsyncLLM(str(TINY), enable_lora=True, **small) as llm:
            await asyncio.gather(*(said(llm, number, f"{number}.{i}") for number in (0, 1) for i in range(2)))

    asyncio.run(test())
