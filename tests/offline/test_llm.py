"""`octavo.LLM`: what it answers is what transformers computes, and what a server answers to the same request."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import transformers
from octavo_server import TINY
from tiny_oracle import Oracle

from octavo import (
    LLM,
    BeamSearchParams,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
    TextPrompt,
    TokensPrompt,
)
from octavo.collector import NEW_OBJECTS
from octavo.offline import batch
from octavo.offline.errors import EngineError
from octavo.outputs import Counter, Gauge, Histogram

PROMPTS = ["The capital of", "def f(x):\n", "日本", "naïve café “"]
NEAR = 2e-4  # two float32 computations of one log-probability
GREEDY = {"temperature": 0.0, "ignore_eos": True}
CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Say hello."}]


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**GREEDY | fields)


def only(outputs: list[RequestOutput]) -> RequestOutput:
    (output,) = outputs
    return output


def answered(client: httpx.Client, **body: Any) -> list[Any]:
    """The choices of a completion."""
    response = client.post("/v1/completions", json={"return_token_ids": True} | body)
    assert response.status_code == 200, response.text
    found: list[Any] = response.json()["choices"]
    return found


# against transformers


def test_greedy_tokens_and_texts_are_transformers(llm: LLM, oracle: Oracle) -> None:
    outputs = llm.generate(PROMPTS, params(max_tokens=24))
    assert [output.prompt for output in outputs] == PROMPTS
    for output in outputs:
        ids = oracle.ids(output.prompt or "")
        expected = oracle.greedy(ids, 24)
        (answer,) = output.outputs
        assert output.prompt_token_ids == ids
        assert output.finished
        assert answer.finished()
        assert (answer.index, answer.token_ids, answer.text) == (0, expected, oracle.text(expected))
        assert (answer.finish_reason, answer.stop_reason) == ("length", None)
        assert (answer.logprobs, answer.cumulative_logprob, output.prompt_logprobs) == (None, None, None)
    assert len({output.request_id for output in outputs}) == len(outputs)


def test_log_probabilities_are_transformers(llm: LLM, oracle: Oracle) -> None:
    output = only(llm.generate(PROMPTS[0], params(max_tokens=6, logprobs=3, prompt_logprobs=2)))
    (answer,) = output.outputs
    ids = output.prompt_token_ids
    rows = oracle.logprobs(ids + answer.token_ids)
    assert answer.logprobs is not None
    assert len(answer.logprobs) == 6
    for place, (token_id, position) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        row = rows[len(ids) + place - 1]
        assert list(position) == row.topk(3).indices.tolist()
        assert [entry.rank for entry in position.values()] == [1, 2, 3]
        assert [entry.logprob for entry in position.values()] == pytest.approx(row.topk(3).values.tolist(), abs=NEAR)
        assert position[token_id].decoded_token == oracle.text([token_id])
    assert answer.cumulative_logprob == pytest.approx(
        sum(position[token].logprob for token, position in zip(answer.token_ids, answer.logprobs, strict=True))
    )
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for place, position in enumerate(output.prompt_logprobs[1:], start=1):
        assert position is not None
        row = rows[place - 1]
        assert next(iter(position)) == ids[place]
        assert position[ids[place]].logprob == pytest.approx(row[ids[place]].item(), abs=NEAR)
        assert position[ids[place]].rank == int((row > row[ids[place]]).sum()) + 1
        assert set(position) == {ids[place], *row.topk(2).indices.tolist()}


def test_all_log_probabilities_and_named_ones(forked: None, small: dict[str, Any], oracle: Oracle) -> None:  # noqa: ARG001
    with LLM(str(TINY), max_logprobs=-1, **small) as llm:
        (answer,) = only(llm.generate(PROMPTS[0], params(max_tokens=1, logprobs=-1))).outputs
        (named,) = only(llm.generate(PROMPTS[0], params(max_tokens=1, logprob_token_ids=[5, 7]))).outputs
    row = oracle.logprobs(oracle.ids(PROMPTS[0]))[-1]
    assert answer.logprobs is not None
    assert named.logprobs is not None
    assert [answer.logprobs[0][token].logprob for token in range(1024)] == pytest.approx(row.tolist(), abs=NEAR)
    assert list(named.logprobs[0]) == [int(row.argmax()), 5, 7]
    assert named.logprobs[0][7].logprob == pytest.approx(row[7].item(), abs=NEAR)
    assert named.logprobs[0][7].rank is None


@pytest.mark.parametrize("width", [1, 3])
def test_beams_are_transformers(llm: LLM, oracle: Oracle, width: int) -> None:
    outputs = llm.beam_search(
        [{"prompt": PROMPTS[0]}, {"prompt_token_ids": oracle.ids(PROMPTS[1])}],
        BeamSearchParams(beam_width=width, max_tokens=5, ignore_eos=True, length_penalty=0.0),
        concurrency_limit=1,
    )
    for prompt, output in zip(PROMPTS, outputs, strict=False):
        ids = oracle.ids(prompt)
        expected = oracle.beams(ids, width, 5)
        assert [beam.tokens for beam in output.sequences] == [ids + tokens for tokens in expected]
        assert [beam.text for beam in output.sequences] == [oracle.text(beam.tokens) for beam in output.sequences]
        for beam in output.sequences:
            rows = oracle.logprobs(beam.tokens)
            told = sum(rows[place - 1][beam.tokens[place]].item() for place in range(len(ids), len(beam.tokens)))
            assert beam.cum_logprob == pytest.approx(told, abs=10 * NEAR)
            assert len(beam.logprobs) == 5
            assert len(beam.logprobs[0]) >= 2 * width


def test_a_conversation_is_what_the_template_makes_of_it(llm: LLM, oracle: Oracle) -> None:
    one = only(llm.chat(CHAT, params(max_tokens=8)))
    ids = oracle.chat_ids(CHAT)
    assert one.prompt_token_ids == ids
    assert one.prompt == oracle.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert one.outputs[0].token_ids == oracle.greedy(ids, 8)
    many = llm.chat([CHAT, CHAT[1:]], params(max_tokens=8), use_tqdm=False)
    assert [output.prompt_token_ids for output in many] == [ids, oracle.chat_ids(CHAT[1:])]


def test_a_template_of_ones_own_with_its_variables_and_tools(llm: LLM) -> None:
    template = "{{ mood }}{% for m in messages %}[{{ m.content }}]{% endfor %}{{ tools[0].function.name }}"
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    output = only(
        llm.chat(CHAT, params(max_tokens=1), chat_template=template, chat_template_kwargs={"mood": "!"}, tools=[tool])
    )
    assert output.prompt == "![Be short.][Say hello.]add"


def test_a_final_message_is_continued(llm: LLM, oracle: Oracle) -> None:
    begun = [*CHAT, {"role": "assistant", "content": "Hello"}]
    output = only(llm.chat(begun, params(max_tokens=1), add_generation_prompt=False, continue_final_message=True))
    assert output.prompt == oracle.tokenizer.apply_chat_template(begun, tokenize=False, continue_final_message=True)
    with pytest.raises(ValueError, match="continue_final_message needs add_generation_prompt"):
        llm.chat(begun, continue_final_message=True)


def test_the_tokenizer_is_transformers(llm: LLM, oracle: Oracle) -> None:
    tokenizer = llm.get_tokenizer()
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
    assert tokenizer.encode(PROMPTS[3]) == oracle.ids(PROMPTS[3])


# against the server


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.9, "seed": 7},
        {"temperature": 1.3, "seed": 1, "n": 3},
        {"temperature": 1.0, "seed": 2, "top_k": 9, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 0.7, "seed": 5, "presence_penalty": 1.0, "frequency_penalty": -0.5, "repetition_penalty": 1.2},
        {"temperature": 0.0, "logit_bias": {40: 90.0, 41: -90.0}},
        {"temperature": 0.8, "seed": 4, "allowed_token_ids": [20, 30, 40, 50]},
        {"temperature": 0.0, "stop": ["e", "n"]},
        {"temperature": 0.0, "stop": "e", "include_stop_str_in_output": True},
        {"temperature": 0.0, "stop": ["e"], "min_tokens": 9},
        {"temperature": 0.0, "stop_token_ids": list(range(100, 350))},
        {"temperature": 0.0, "stop_token_ids": list(range(100, 350)), "include_stop_str_in_output": True},
        {"temperature": 0.0, "bad_words": ["the", "of"]},
        {"temperature": 1.0, "seed": 3, "min_tokens": 12},
        {"temperature": 1.0, "seed": 3, "skip_special_tokens": False, "ignore_eos": True},
        {"temperature": 0.0, "truncate_prompt_tokens": 2},
        {"temperature": 0.0, "repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 2}},
        {"temperature": 1.0, "seed": 9, "structured_outputs": {"regex": "[a-z]{3}[0-9]{2}"}},
        {"temperature": 1.0, "seed": 9, "structured_outputs": {"choice": ["yes", "perhaps"]}},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_answers_are_the_servers(llm: LLM, client: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 16} | fields
    from octavo.sampling_params import RepetitionDetectionParams

    own = {
        "structured_outputs": lambda value: StructuredOutputsParams(**value),
        "repetition_detection": lambda value: RepetitionDetectionParams(**value),
    }
    asked = {name: own[name](value) if name in own else value for name, value in fields.items()}
    sent = body | {"logit_bias": {str(token): bias for token, bias in fields.get("logit_bias", {}).items()}}
    choices = answered(client, **sent)
    output = only(llm.generate(PROMPTS[0], SamplingParams(max_tokens=16, **asked)))
    assert [answer.index for answer in output.outputs] == list(range(len(choices)))
    for answer, choice in zip(output.outputs, choices, strict=True):
        assert answer.token_ids == choice["token_ids"]
        assert answer.text == choice["text"]
        assert (answer.finish_reason, answer.stop_reason) == (choice["finish_reason"], choice["stop_reason"])
    assert output.prompt_token_ids == choices[0]["prompt_token_ids"]


def test_without_a_seed_answers_differ_and_begin_anew_with_the_engine(
    forked: None,  # noqa: ARG001
    small: dict[str, Any],
) -> None:
    found = []
    for seed in (0, 0, 1):
        with LLM(str(TINY), seed=seed, **small) as llm:
            outputs = llm.generate([PROMPTS[0]] * 2, SamplingParams(max_tokens=12))
            found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]


def test_parameters_may_be_those_of_each_prompt(llm: LLM, oracle: Oracle) -> None:
    each = [params(max_tokens=count) for count in (1, 5, 3)]
    outputs = llm.generate(PROMPTS[:3], each)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 3]
    assert outputs[1].outputs[0].token_ids == oracle.greedy(oracle.ids(PROMPTS[1]), 5)
    with pytest.raises(ValueError, match="sampling_params: 2 for 3 prompts"):
        llm.generate(PROMPTS[:3], each[:2])


def test_all_forms_of_a_prompt_are_the_same(llm: LLM, oracle: Oracle) -> None:
    ids = oracle.ids(PROMPTS[0])
    forms = [PROMPTS[0], ids, TextPrompt(prompt=PROMPTS[0]), TokensPrompt(prompt_token_ids=ids)]
    outputs = llm.generate(forms, params(max_tokens=4))
    assert [output.prompt for output in outputs] == [PROMPTS[0], None, PROMPTS[0], None]
    assert all(output.prompt_token_ids == ids for output in outputs)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert only(llm.generate(ids, params(max_tokens=4))).outputs == outputs[0].outputs
    assert only(llm.generate(dict(forms[3]), params(max_tokens=4))).outputs == outputs[0].outputs  # type: ignore[call-overload]
    assert llm.generate([], params()) == []


def test_many_prompts_come_back_in_their_order(llm: LLM, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """In more groups than are open at a time."""
    monkeypatch.setattr(batch, "MOST_OPEN", 8)
    monkeypatch.setattr(batch, "OPEN_OF_SEQUENCES", 0)
    monkeypatch.setattr(batch, "ORDERED", 12)
    words = ["a", "few", "words", "in", "another", "order", "each", "time"]
    prompts = [" ".join(words[number % 8 :] + words[: number % 5]) for number in range(30)]
    expected = [oracle.ids(prompt) for prompt in prompts]
    ended = []
    outputs = _run_in_groups(llm, prompts, ended)
    assert [output.prompt for output in outputs] == prompts
    assert [output.prompt_token_ids for output in outputs] == expected
    assert sorted(ended) == sorted(output.request_id for output in outputs)
    assert [output.outputs[0].token_ids for output in outputs] == [oracle.greedy(ids, 3) for ids in expected]


def _run_in_groups(llm: LLM, prompts: list[str], ended: list[str]) -> list[RequestOutput]:
    from octavo.inputs import prompts_of
    from octavo.offline.requests import Job, asked_by

    asked = asked_by(params(max_tokens=3))
    jobs = [Job(str(number), given, asked) for number, given in enumerate(prompts_of(prompts))]

    async def run() -> list[RequestOutput]:
        return await batch.Batch(llm._model, lambda output: ended.append(output.request_id)).run(jobs, group=3)

    return llm._thread.call(run())


def test_an_answer_is_as_long_as_the_context_leaves(llm: LLM) -> None:
    ids = [5] * 500
    for most in (None, 1000):
        (answer,) = only(llm.generate(ids, params(max_tokens=most))).outputs
        assert (len(answer.token_ids), answer.finish_reason) == (12, "length")


def test_json_obeys_its_schema(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["city", "age"],
        "additionalProperties": False,
    }
    for given in (schema, json.dumps(schema)):
        constraint = StructuredOutputsParams(json=given, disable_any_whitespace=True)
        asked = SamplingParams(max_tokens=60, structured_outputs=constraint, seed=1)
        outputs = llm.generate(PROMPTS, asked)
        for output in outputs:
            assert output.outputs[0].finish_reason == "stop"
            jsonschema.validate(json.loads(output.outputs[0].text), schema)


def test_without_a_text(llm: LLM, oracle: Oracle) -> None:
    (answer,) = only(llm.generate(PROMPTS[0], params(max_tokens=3, detokenize=False, logprobs=0))).outputs
    assert answer.text == ""
    assert answer.token_ids == oracle.greedy(oracle.ids(PROMPTS[0]), 3)
    assert answer.logprobs is not None
    assert [entry.decoded_token for position in answer.logprobs for entry in position.values()] == [None] * 3


# what a model brings, and what it counts


def test_defaults_are_those_of_generation_config(
    forked: None,  # noqa: ARG001
    small: dict[str, Any],
    tmp_path: Path,
) -> None:
    for file in TINY.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    config = {"eos_token_id": 2, "temperature": 0.3, "top_k": 4, "repetition_penalty": 1.1, "max_new_tokens": 7}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    with LLM(str(tmp_path), **small) as llm:
        found = llm.get_default_sampling_params()
        output = only(llm.generate(PROMPTS[0]))
    assert found == SamplingParams(temperature=0.3, top_k=4, repetition_penalty=1.1, max_tokens=7)
    assert len(output.outputs[0].token_ids) <= 7
    with LLM(str(tmp_path), generation_config="vllm", override_generation_config={"top_p": 0.5}, **small) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(top_p=0.5)


def test_prefixes_are_cached_until_they_are_forgotten(llm: LLM) -> None:
    ids = list(range(100, 150))
    llm.reset_prefix_cache()
    cached = [only(llm.generate(ids, params(max_tokens=1))).num_cached_tokens for _ in range(2)]
    salted = only(llm.generate({"prompt_token_ids": ids, "cache_salt": "mine"}, params(max_tokens=1)))
    assert (cached, salted.num_cached_tokens) == ([0, 48], 0)
    assert llm.reset_prefix_cache()
    assert only(llm.generate(ids, params(max_tokens=1))).num_cached_tokens == 0


def test_a_beginning_is_computed_once_though_the_cache_holds_few(forked: None, small: dict[str, Any]) -> None:  # noqa: ARG001
    """Six documents, of which the cache holds three, and four questions about each that come in turns."""
    documents = [[100 + number] * 192 for number in range(6)]
    prompts = [[*document, 300 + question] for question in range(4) for document in documents]
    with LLM(str(TINY), max_num_seqs=2, **small | {"num_gpu_blocks_override": 40}) as llm:
        outputs = llm.generate(prompts, params(max_tokens=2), use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert sorted(output.num_cached_tokens or 0 for output in outputs) == [0] * 6 + [192] * 18


def test_what_is_kept_is_answered_when_it_is_waited_for(llm: LLM, oracle: Oracle) -> None:
    asked = params(max_tokens=4)
    ids = llm.enqueue(PROMPTS, asked, use_tqdm=False)
    ids += llm.enqueue_chat(CHAT, asked, add_generation_prompt=True)
    assert len(set(ids)) == len(PROMPTS) + 1
    only(llm.generate("a", asked))  # is another call
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == ids
    expected = [oracle.greedy(oracle.ids(prompt), 4) for prompt in PROMPTS]
    assert [output.outputs[0].token_ids for output in outputs[:-1]] == expected
    assert outputs[-1].outputs == only(llm.chat(CHAT, asked)).outputs
    assert llm.wait_for_completion((RequestOutput,)) == []
    with pytest.raises(ValueError, match="output_type"):
        llm.wait_for_completion(str)
    with pytest.raises(TypeError, match=r"enqueue_chat\(\) has no argument 'template'"):
        llm.enqueue_chat(CHAT, asked, template="a")


def test_each_answer_tells_when_it_was_made(llm: LLM) -> None:
    before = time.time()
    for output in llm.generate(PROMPTS, params(max_tokens=5)):
        times = output.metrics
        assert times is not None
        assert times.num_generation_tokens == 5
        assert before <= times.arrival_time == times.queued_ts <= times.scheduled_ts
        assert times.scheduled_ts <= times.first_token_ts <= times.last_token_ts <= time.time()
        assert times.first_token_latency == times.first_token_ts - times.arrival_time


def test_metrics_count_each_prompt(llm: LLM) -> None:
    def found() -> dict[tuple[str, str], Any]:
        return {(metric.name, metric.labels.get("finished_reason", "")): metric for metric in llm.get_metrics()}

    before = found()
    llm.generate(PROMPTS[:3], SamplingParams(n=2, max_tokens=4, ignore_eos=True))
    after = found()
    generated = after["vllm:generation_tokens", ""]
    assert isinstance(generated, Counter)
    assert generated.value - before["vllm:generation_tokens", ""].value == 24
    ended = after["vllm:request_success", "length"].value - before["vllm:request_success", "length"].value
    assert ended == 6
    answers = after["vllm:request_params_n", ""]
    assert isinstance(answers, Histogram)
    assert answers.count - before["vllm:request_params_n", ""].count == 3
    assert answers.sum - before["vllm:request_params_n", ""].sum == 6
    assert answers.buckets["+Inf"] == answers.count
    running = after["vllm:num_requests_running", ""]
    assert isinstance(running, Gauge)
    assert running.value == 0


def test_a_bar_is_told_of_each_prompt(llm: LLM) -> None:
    told: list[object] = []
    before = gc.get_threshold()
    assert 0 < before[0] < NEW_OBJECTS

    class Bar:
        def __init__(self, **options: Any) -> None:
            told.append((options["total"], options["desc"]))

        def update(self, count: int) -> None:
            told.append(count)
            assert gc.get_threshold()[0] == NEW_OBJECTS

        def close(self) -> None:
            told.append("closed")

    llm.generate(PROMPTS, params(max_tokens=2), use_tqdm=Bar)
    assert told == [(4, "Processed prompts"), 1, 1, 1, 1, "closed"]
    assert gc.get_threshold() == before


def test_lower_priorities_go_first(forked: None, small: dict[str, Any]) -> None:  # noqa: ARG001
    order: list[str] = []
    with LLM(str(TINY), scheduling_policy="priority", max_num_seqs=1, **small) as llm:
        from octavo.offline.batch import Batch

        whole = Batch._end

        def end(self: Batch, job: Any, answers: Any) -> None:
            order.append(job.given.text)
            whole(self, job, answers)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Batch, "_end", end)
            each = [params(max_tokens=100), *[params(max_tokens=4)] * 4]  # the others have come when the first one ends
            llm.generate(["first", *PROMPTS], each, priority=[-1, 3, 1, 2, 0])
    assert order == ["first", *(PROMPTS[number] for number in (3, 1, 2, 0))]


# what is refused


@pytest.mark.parametrize(
    ("prompts", "fields", "said"),
    [
        (3, {}, "prompts: int is no prompt"),
        (["a", 3], {}, r"prompts\[1\]: int is no prompt"),
        ({"text": "a"}, {}, "octavo does not support 'text'"),
        ([{"prompt": "a", "mm_processor_kwargs": {"a": 1}}], {}, r"prompts\[0\]: octavo does not support 'mm_proc"),
        ({"cache_salt": "a"}, {}, "needs 'prompt' or 'prompt_token_ids'"),
        ([1, -2], {}, "-2 is no token id"),
        ([1, 5000], {}, "token id 5000 is not below the vocabulary size, 1024"),
        ([1, 2.5], {}, "token ids are a list of integers"),
        ([], {}, None),
        ([5] * 512, {}, "maximum context length is 512"),
        ("", {"truncate_prompt_tokens": 600}, "truncate_prompt_tokens 600 is more than the context"),
        ("a", {"logprobs": 21}, r"logprobs 21 is above this server's limit, 20 \(max_logprobs\)"),
        ("a", {"temperature": 1, "n": 129}, "n: Input should be less than or equal to 128"),
        ("a", {"stop_token_ids": [1024]}, "stop_token_ids: token id 1024 is not below"),
        ("a", {"structured_outputs": StructuredOutputsParams(regex="(")}, "structured_outputs.regex"),
        ("a", {"min_tokens": 600, "max_tokens": None}, "min_tokens 600 is more than max_tokens"),
    ],
)
def test_what_is_wrong_is_said(llm: LLM, prompts: Any, fields: dict[str, Any], said: str | None) -> None:
    if said is None:
        assert llm.generate(prompts) == []
        return
    with pytest.raises(ValueError, match=said):
        llm.generate(prompts, params(**fields), use_tqdm=False)


def test_what_octavo_does_not_have_is_refused_by_name(llm: LLM) -> None:
    with pytest.raises(ValueError, match="lora_request: object is no adapter"):
        llm.chat(CHAT, lora_request=object())
    with pytest.raises(ValueError, match=r"generate: octavo does not support mm_processor_kwargs=\{'a': 1\}"):
        llm.generate("a", mm_processor_kwargs={"a": 1})
    with pytest.raises(TypeError, match=r"generate\(\) has no argument 'promt'"):
        llm.generate("a", promt="b")
    with pytest.raises(ValueError, match="priority 1: this server takes requests as they come"):
        llm.generate("a", priority=1)
    with pytest.raises(ValueError, match="messages: image 1: this model reads text alone"):
        llm.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    for pooled in (llm.embed, llm.encode, llm.classify, lambda text: llm.score(text, text), llm.reward):
        with pytest.raises(ValueError, match="this model generates text"):
            pooled("a")
    with pytest.raises(ValueError, match="the engine can't sleep: enable_sleep_mode=True lets it"):
        llm.sleep()
    with pytest.raises(AttributeError, match=r"octavo\.LLM has no 'genrate'$"):
        llm.genrate("a")
    assert not hasattr(llm, "llm_engine")


def test_one_wrong_prompt_ends_all_of_them(llm: LLM) -> None:
    with pytest.raises(ValueError, match="maximum context length"):
        llm.generate([*PROMPTS, [5] * 512], params(max_tokens=200))
    assert llm._model.fleet.num_open == 0
    assert only(llm.generate("a", params(max_tokens=1))).finished


# its end


def test_an_engine_that_dies_is_started_again_and_answers(forked: None, small: dict[str, Any]) -> None:  # noqa: ARG001
    with LLM(str(TINY), engine_restart_delay=0.0, **small) as llm:
        expected = llm.generate(PROMPTS, params(max_tokens=200))
        dead = threading.Event()

        def kill() -> None:
            while not llm._model.fleet.num_open:
                time.sleep(0.001)
            os.kill(llm._model._engines[0].process.pid, 9)
            dead.set()

        threading.Thread(target=kill, daemon=True).start()
        outputs = llm.generate(PROMPTS, params(max_tokens=200))
        assert dead.wait(60)
        assert [output.outputs[0].token_ids for output in outputs] == [one.outputs[0].token_ids for one in expected]


def test_a_closed_model_says_so(forked: None, small: dict[str, Any]) -> None:  # noqa: ARG001
    llm = LLM(str(TINY), **small)
    pid = llm._model._engines[0].process.pid
    llm.close()
    llm.close()
    with pytest.raises(EngineError, match="it is closed"):
        llm.generate("a")
    assert not Path(f"/proc/{pid}").exists()


def test_a_model_that_nobody_has_any_more_is_closed(forked: None, small: dict[str, Any]) -> None:  # noqa: ARG001
    llm = LLM(str(TINY), **small)
    pid = llm._model._engines[0].process.pid
    assert only(llm.generate("a", params(max_tokens=1))).finished
    del llm
    gc.collect()
    assert not Path(f"/proc/{pid}").exists()


def test_an_engine_that_can_not_start_says_why(forked: None, small: dict[str, Any], tmp_path: Path) -> None:  # noqa: ARG001
    with pytest.raises(ValueError, match="nowhere"):
        LLM(str(tmp_path / "nowhere"), **small)
    for file in TINY.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(EngineError, match=r"no weights for model\.embed_tokens"):
        LLM(str(tmp_path), **small)


def test_an_engine_that_sleeps_gives_the_same_tokens_when_it_wakes_up(forked: None, small: dict[str, Any]) -> None:  # noqa: ARG001
    with LLM(str(TINY), enable_sleep_mode=True, **small) as llm:
        expected = only(llm.generate(PROMPTS[0], params(max_tokens=8))).outputs[0].token_ids
        for level in (1, 2):
            llm.sleep(level=level)
            with pytest.raises(EngineError, match=r"the engines sleep; wake_up\(\) wakes them"):
                llm.generate(PROMPTS[0], params(max_tokens=8))
            llm.wake_up(tags=["weights"])
            with pytest.raises(EngineError, match="sleep"):
                llm.generate(PROMPTS[0], params(max_tokens=8))
            llm.wake_up()
            output = only(llm.generate(PROMPTS[0], params(max_tokens=8)))
            assert output.outputs[0].token_ids == expected
            assert output.num_cached_tokens == 0
        with pytest.raises(ValueError, match="level 3"):
            llm.sleep(level=3)
        with pytest.raises(ValueError, match="mode 'x' is none of abort, wait, keep"):
            llm.sleep(mode="x")
        with pytest.raises(ValueError, match="'cache'"):
            llm.wake_up(tags=["cache"])
