"""Programs as they are written for SGLang, on a real server: what they come to is what transformers computes."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from typing import Any

import httpx
import jsonschema
import pytest
from interrupting import interrupt
from octavo_server import Server, num_in_flight, value, wait_until
from tiny_oracle import Oracle

import octavo.lang as sgl
from octavo.lang.run import THREAD

GREEDY = {"temperature": 0.0, "ignore_eos": True}
COUNT = 12  # tokens

pytestmark = pytest.mark.usefixtures("default_backend")


def greedy(oracle: Oracle, text: str, count: int = COUNT, stop: str | None = None) -> str:
    """What the model goes on with, up to the string that ends it."""
    found = oracle.text(oracle.greedy(oracle.ids(text), count))
    return found.split(stop)[0] if stop else found


@sgl.function
def few_shot(s: sgl.ProgramState, question: str) -> None:
    s += "Questions and answers.\n\n"
    s += "Q: What is a list?\nA: A sequence of objects\n"
    s += "Q: " + question + "\n"
    s += "A:" + sgl.gen("answer", max_tokens=COUNT, stop="\n", **GREEDY)


def few_shot_text(question: str) -> str:
    return f"Questions and answers.\n\nQ: What is a list?\nA: A sequence of objects\nQ: {question}\nA:"


def test_few_shot_answers(oracle: Oracle) -> None:
    state = few_shot.run(question="What is a tuple?")
    prompt = few_shot_text("What is a tuple?")
    assert state["answer"] == greedy(oracle, prompt, stop="\n")
    assert state.text() == prompt + state["answer"]
    assert state.error() is None
    meta = state.get_meta_info("answer")
    assert meta["prompt_tokens"] == len(oracle.ids(prompt))
    assert meta["finish_reason"]["type"] in ("stop", "length")


def test_a_batch_in_order(oracle: Oracle) -> None:
    questions = [f"What is number {index}?" for index in range(20)]
    expected = [greedy(oracle, few_shot_text(question), stop="\n") for question in questions]
    batch = [{"question": question} for question in questions]
    for options in ({}, {"num_threads": 3}, {"num_threads": 1}, {"generator_style": True}, {"progress_bar": True}):
        states = few_shot.run_batch(batch, **options)
        assert isinstance(states, list) is ("generator_style" not in options)
        assert [state["answer"] for state in states] == expected
    assert [state["answer"] for state in few_shot.run_batch([[question] for question in questions])] == expected
    assert few_shot.run_batch([]) == []


@sgl.function
def expert_answer(s: sgl.ProgramState, question: str) -> str:
    s += "Question: " + question + "\n"
    s += "A good person to answer this is" + sgl.gen("expert", max_tokens=6, stop=[".", "\n"]) + ".\n"
    s += "For example," + s["expert"] + " would say" + sgl.gen("answer", max_tokens=COUNT, stop=".") + "."
    return f"by{s['expert']}"


def test_a_body_that_goes_on_from_what_was_generated(oracle: Oracle) -> None:
    state = expert_answer("What is a set?", **GREEDY)
    before = "Question: What is a set?\nA good person to answer this is"
    [expert] = re.split("[.\n]", greedy(oracle, before, 6))[:1]
    then = f"{before}{expert}.\nFor example,{expert} would say"
    assert state["expert"] == expert
    assert state["answer"] == greedy(oracle, then, stop=".")
    assert state.text() == f"{then}{state['answer']}."
    assert state.ret_value == f"by{expert}"
    texts = [each.text() for each in expert_answer.run_batch([{"question": "What is a set?"}] * 9, **GREEDY)]
    assert texts == [state.text()] * 9


@sgl.function
def tips(s: sgl.ProgramState, topic: str, size: int) -> None:
    s += "Some tips for " + topic + ".\n"
    forks = s.fork(size)
    for index in range(size):
        forks[index] += f"Tip {index + 1}:"
        forks[index] += sgl.gen("tip", max_tokens=COUNT, **GREEDY)
    forks.join()
    for index in range(size):
        s += f"{index + 1}." + forks[index]["tip"] + "\n"
    s += "In summary," + sgl.gen("summary", max_tokens=COUNT, **GREEDY)


def test_parallel_decoding(oracle: Oracle) -> None:
    state = tips.run(topic="writing code", size=3)
    begin = "Some tips for writing code.\n"
    expected = [greedy(oracle, f"{begin}Tip {index}:") for index in (1, 2, 3)]
    assert state["tip"] == expected
    text = begin + "".join(f"{index}.{tip}\n" for index, tip in enumerate(expected, start=1)) + "In summary,"
    assert state["summary"] == greedy(oracle, text)
    assert state.text() == text + state["summary"]


def test_parallel_encoding(oracle: Oracle) -> None:
    @sgl.function
    def answer(s: sgl.ProgramState, facts: list[str]) -> None:
        s += "Facts.\n"
        forks = s.fork(len(facts))
        forks += lambda index: f"Fact {index}: {facts[index]}\n"
        forks.join(mode="concate_and_append")
        s += "So" + sgl.gen("answer", max_tokens=COUNT, **GREEDY)

    state = answer.run(facts=["a list has items", "a set has none twice"])
    text = "Facts.\nFact 0: a list has items\nFact 1: a set has none twice\nSo"
    assert state.text() == text + greedy(oracle, text)


def test_forks_of_forks(oracle: Oracle) -> None:
    """A tree of thoughts: the best of two, of which each goes on in two ways."""

    @sgl.function
    def tree(s: sgl.ProgramState) -> None:
        s += "The problem is a list.\n"
        leaves = []
        for index, plan in enumerate(s.fork(2)):
            plan += f"Plan {index}:" + sgl.gen("plan", max_tokens=6, return_logprob=True, **GREEDY) + "\n"
            for number, step in enumerate(plan.fork(2)):
                step += f"Step {number}:" + sgl.gen("step", max_tokens=6, **GREEDY)
                leaves.append(step)
        s["leaves"] = [leaf.text() for leaf in leaves]
        logprobs = [leaf.get_meta_info("plan")["output_token_logprobs"] for leaf in leaves]
        s["scores"] = [sum(entry[0] for entry in each) for each in logprobs]

    state = tree.run()
    expected = []
    for plan in ("Plan 0:", "Plan 1:"):
        thought = f"The problem is a list.\n{plan}"
        thought += greedy(oracle, thought, 6) + "\n"
        expected += [f"{thought}{step}{greedy(oracle, thought + step, 6)}" for step in ("Step 0:", "Step 1:")]
    assert state["leaves"] == expected
    assert state["scores"][0] == state["scores"][1] != state["scores"][2] == state["scores"][3]


def test_a_copy(oracle: Oracle) -> None:
    @sgl.function
    def copied(s: sgl.ProgramState) -> None:
        s += "The list"
        with s.copy() as other:
            other += " of" + sgl.gen("beside", max_tokens=4, **GREEDY)
        s += " is" + sgl.gen("own", max_tokens=4, **GREEDY)

    state = copied.run()
    assert state["beside"] == [greedy(oracle, "The list of", 4)]
    assert state.text() == "The list is" + greedy(oracle, "The list is", 4)
    assert "own" in state
    assert "nothing" not in state


def test_reason_and_act() -> None:
    @sgl.function
    def react(s: sgl.ProgramState, question: str) -> None:
        s += "Question: " + question + "\n"
        for index in range(1, 4):
            s += f"Thought {index}:" + sgl.gen(max_tokens=6, stop=[".", "\n"]) + ".\n"
            s += f"Action {index}: " + sgl.select(f"action_{index}", ["Search", "Finish"])
            if s[f"action_{index}"] == "Finish":
                s += " [" + sgl.gen("answer", max_tokens=6, stop="]") + "].\n"
                break
            s += " [" + sgl.gen(max_tokens=6, stop="]") + "].\n"
        else:
            s["answer"] = "nobody knows"

    state = react.run("Where is the list?", temperature=0)
    actions = re.findall(r"Action \d: (Search|Finish) \[", state.text())
    assert 1 <= len(actions) <= 3
    assert [state[f"action_{index}"] for index in range(1, len(actions) + 1)] == actions
    assert ("Finish" in actions) == (state["answer"] != "nobody knows")


def test_what_a_text_must_be() -> None:
    address = r"((25[0-5]|2[0-4]\d|[01]?\d\d?)\.){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)"

    @sgl.function
    def constrained(s: sgl.ProgramState) -> None:
        s += "Address: " + sgl.gen("address", regex=address, temperature=0) + "\n"
        with s.var_scope("json"):
            s += '{"name": ' + sgl.gen(dtype=str) + ', "count": ' + sgl.gen_int(max_tokens=8)
            s += ', "part": ' + sgl.gen("part", dtype=float, max_tokens=8) + "}"
        s += "\n" + sgl.gen("truth", dtype=bool) + sgl.gen_string("quoted")

    for temperature in (0, 1.0):
        state = constrained.run(max_new_tokens=100, temperature=temperature)
        assert re.fullmatch(address, state["address"])
        assert re.fullmatch(r'\{"name": ".*, "count": [-+]?\d+, "part": .*\}', state["json"], re.DOTALL)
        assert state["json"] in state.text()
        float(state["part"])
        assert state["truth"] in ("True", "False")
        assert state["quoted"].startswith('"')


def test_a_number_ends(backend: sgl.RuntimeEndpoint) -> None:
    """It ends where the model goes on to something else, and is not drawn out to max_tokens."""

    @sgl.function
    def numbers(s: sgl.ProgramState) -> None:
        s += "Version 2.0, and " + sgl.gen_int("whole", max_tokens=200) + " and "
        s += sgl.gen("part", dtype=float, max_tokens=200)

    for state in numbers.run_batch([{}] * 8, backend=backend):
        assert re.fullmatch(r"[-+]?\d+", state["whole"])
        float(state["part"])
        assert state.text() == f"Version 2.0, and {state['whole']} and {state['part']}"
        for name in ("whole", "part"):
            assert state.get_meta_info(name)["finish_reason"]["type"] == "stop"


def test_json_of_a_schema(backend: sgl.RuntimeEndpoint) -> None:
    """An object, or one as a string. An answer that max_tokens cuts is no JSON; the model likes white space."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"enum": [1, 2, 3]}},
        "required": ["name", "size"],
        "additionalProperties": False,
    }

    @sgl.function
    def extracted(s: sgl.ProgramState, form: Any) -> None:
        s += "Object: " + sgl.gen("it", json_schema=form, max_tokens=100)

    states = extracted.run_batch([{"form": form} for form in (schema, json.dumps(schema)) * 8], backend=backend)
    for form in (0, 1):
        whole = [it for it in states[form::2] if it.get_meta_info("it")["finish_reason"]["type"] == "stop"]
        assert whole
        for state in whole:
            jsonschema.validate(json.loads(state["it"]), schema)


def test_options_reach_the_server(oracle: Oracle) -> None:
    text = "The list"
    ids = oracle.greedy(oracle.ids(text), 40)

    @sgl.function
    def free(s: sgl.ProgramState, options: dict[str, Any]) -> None:
        s += text + sgl.gen("it", **options)

    def it(state: sgl.ProgramState) -> str:
        found: str = state["it"]
        return found

    assert it(free.run({"max_tokens": 5}, **GREEDY)) == oracle.text(ids[:5])
    assert it(free.run({}, max_new_tokens=7, **GREEDY)) == oracle.text(ids[:7])
    assert it(free.run({"max_tokens": 5}, max_new_tokens=7, **GREEDY)) == oracle.text(ids[:5])
    assert it(free.run({"max_tokens": 40, "stop_token_ids": [ids[3]], **GREEDY})) in (
        oracle.text(ids[: ids.index(ids[3])]),
        oracle.text(ids[: ids.index(ids[3]) + 1]),
    )
    whole = oracle.text(ids)
    word = re.search(r"[a-z]{4,}", whole)
    assert word
    ended = it(free.run({"max_tokens": 40, "stop_regex": "[a-z]{4}", **GREEDY}))
    assert whole.startswith(ended)
    assert len(ended) < len(whole)
    two = free.run({"n": 2, "max_tokens": 4}, temperature=1.5)
    assert len(two["it"]) == 2
    assert two.text() == text + two["it"][0]
    assert len(two.get_meta_info("it")) == 2
    meta = free.run({"max_tokens": 3, "return_logprob": True, "top_logprobs_num": 2}, **GREEDY).get_meta_info("it")
    assert [entry[1] for entry in meta["output_token_logprobs"]] == ids[:3]
    assert [len(entries) for entries in meta["output_top_logprobs"]] == [2, 2, 2]


def test_stream() -> None:
    state = few_shot.run(question="What is a tuple?", stream=True)
    pieces = list(state.text_iter())
    whole = few_shot.run(question="What is a tuple?")
    assert "".join(pieces) == state.text() == whole.text()
    assert len(pieces) > 2
    state = expert_answer.run("What is a set?", stream=True, **GREEDY)
    assert "".join(state.text_iter("answer")) == expert_answer.run("What is a set?", **GREEDY)["answer"]
    assert "".join(state.text_iter("expert")) == state["expert"]
    assert list(whole.text_iter()) == [whole.text()]
    assert list(whole.text_iter("answer")) == [whole["answer"]]


def test_stream_in_a_coroutine() -> None:
    async def read(name: str | None, **options: Any) -> list[Any]:
        state = few_shot.run(question="What is a tuple?", stream=True)
        return [piece async for piece in state.text_async_iter(name, **options)]

    whole = few_shot.run(question="What is a tuple?")
    assert "".join(asyncio.run(read(None))) == whole.text()
    assert "".join(asyncio.run(read("answer"))) == whole["answer"]
    pairs = asyncio.run(read("answer", return_meta_data=True))
    assert "".join(piece for piece, _ in pairs) == whole["answer"]
    assert pairs[-1][1]["completion_tokens"] == whole.get_meta_info("answer")["completion_tokens"]

    async def read_whole() -> list[str]:
        return [piece async for piece in whole.text_async_iter()]

    assert asyncio.run(read_whole()) == [whole.text()]


def test_bound_arguments() -> None:
    bound = tips.bind(topic="cooking").bind(size=1)
    assert bound.run().text().startswith("Some tips for cooking.\n1.")
    assert [state["tip"] for state in bound.run_batch([{}, {}])] == [bound.run()["tip"]] * 2
    with pytest.raises(TypeError, match="no parameter 'sise'"):
        tips.bind(sise=1)


def test_thoughts_apart() -> None:
    @sgl.function
    def thinks(s: sgl.ProgramState, kind: str, form: str) -> None:
        s += sgl.user("Think.")
        s += sgl.separate_reasoning(sgl.assistant(sgl.gen("answer", regex=form)), model_type=kind)

    whole = thinks.run("qwen3", "<think>[a-f]{3}</think>[g-m]{2}")
    assert re.fullmatch("[a-f]{3}", whole["answer_reasoning_content"])
    assert re.fullmatch("[g-m]{2}", whole["answer"])
    assert whole.messages()[-1] == {"role": "assistant", "content": whole["answer"]}
    begun = thinks.run("deepseek-r1", "[a-f]{3}</think>[g-m]{2}")
    assert (len(begun["answer_reasoning_content"]), len(begun["answer"])) == (3, 2)
    none = thinks.run("qwen3", "[g-m]{2}")
    assert (none["answer_reasoning_content"], len(none["answer"])) == ("", 2)


def test_a_fork_computes_nothing_twice(long_server: Server, oracle: Oracle) -> None:
    """Eight forks of a prompt of a thousand tokens: the model computes it once."""
    prefix = "A list is a sequence of objects, and a tuple is one that does not change. " * 60
    num_prefix = len(oracle.ids(prefix))
    assert num_prefix >= 1000
    backend = sgl.RuntimeEndpoint(long_server.url)

    @sgl.function
    def forked(s: sgl.ProgramState) -> None:
        s += prefix
        forks = s.fork(8)
        for index, fork in enumerate(forks):
            fork += f"\nNumber {index} is" + sgl.gen("it", max_tokens=2, ignore_eos=True)
        forks.join()
        s["metas"] = [fork.get_meta_info("it") for fork in forks]

    with long_server.client() as client:
        names = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
        before = [value(client, name) for name in names]
        state = forked.run(backend=backend)
        metas = state["metas"]
        queries, hits = (value(client, name) - old for name, old in zip(names, before, strict=True))
    assert queries == sum(meta["prompt_tokens"] for meta in metas) >= 8 * num_prefix
    assert hits == sum(meta["cached_tokens"] for meta in metas)
    own = max(meta["prompt_tokens"] for meta in metas) - num_prefix
    block = 16
    assert queries - hits <= num_prefix + 8 * (own + block)
    assert len(state["it"]) == 8


def test_leaving_a_batch_ends_it(server: Server) -> None:
    @sgl.function
    def endless(s: sgl.ProgramState, index: int) -> None:
        s += f"Number {index}" + sgl.gen("it", max_tokens=1 if index == 0 else 400, ignore_eos=True)

    with server.client() as client:
        states = endless.run_batch([{"index": index} for index in range(40)], generator_style=True)
        assert next(states)["it"] is not None
        states.close()
        wait_until(lambda: num_in_flight(client) == 0)


def test_an_error_of_the_server_is_the_states(oracle: Oracle) -> None:
    @sgl.function
    def long(s: sgl.ProgramState, words: int) -> None:
        s += "word " * words + sgl.gen("it", max_tokens=4, **GREEDY)
        s += " and" + sgl.gen("then", max_tokens=4, **GREEDY)

    good, bad = long.run_batch([{"words": 3}, {"words": 3000}])
    assert good["it"] == greedy(oracle, "word " * 3, 4)
    assert good.error() is None
    error = bad.error()
    assert isinstance(error, sgl.BackendError)
    assert "HTTP 400" in str(error)
    assert "512" in str(error)
    for ask in (lambda: bad["it"], lambda: bad["then"], bad.text, bad.messages, lambda: bad.get_meta_info("it")):
        with pytest.raises(sgl.BackendError, match="HTTP 400"):
            ask()
    with pytest.raises(KeyError, match="no variable 'neither'; it has: it, then"):
        good["neither"]
    state = long.run(3000, stream=True)
    with pytest.raises(sgl.BackendError, match="HTTP 400"):
        list(state.text_iter("it"))


def test_a_body_that_waits_for_what_failed() -> None:
    @sgl.function
    def waits(s: sgl.ProgramState, words: int) -> None:
        forks = s.fork(2)
        forks += "word " * words + sgl.gen("it", max_tokens=4)
        s += forks[1]["it"]

    state = waits.run(3000)
    assert isinstance(state.error(), sgl.BackendError)
    joined = sgl.function(lambda s: s.fork(2).__iadd__("word " * 3000 + sgl.gen("it")).join()).run()
    assert isinstance(joined.error(), sgl.BackendError)


def test_an_exception_of_a_body_is_raised() -> None:
    @sgl.function
    def divides(s: sgl.ProgramState, by: int) -> None:
        s += "One" + sgl.gen("it", max_tokens=2)
        s += str(1 // by)

    assert divides.run(by=1)["it"]
    with pytest.raises(ZeroDivisionError):
        divides.run(by=0)
    with pytest.raises(ZeroDivisionError):
        divides.run_batch([{"by": 1}, {"by": 0}, {"by": 1}])
    with pytest.raises(ZeroDivisionError):
        list(divides.run(by=0, stream=True).text_iter())
    with pytest.raises(TypeError, match="missing a required argument: 'by'"):
        divides.run()
    with pytest.raises(TypeError, match="unexpected keyword argument 'bye'"):
        divides.run_batch([{"by": 1, "bye": 1}])


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(sgl.BackendError, match=r"no connection to 127\.0\.0\.1:9"):
        sgl.RuntimeEndpoint("http://127.0.0.1:9")
    with pytest.raises(ValueError, match="is not a URL"):
        sgl.RuntimeEndpoint("nowhere")
    sgl.set_default_backend(None)
    with pytest.raises(ValueError, match="there is no backend"):
        few_shot.run(question="")


def test_what_the_endpoint_tells(server: Server, backend: sgl.RuntimeEndpoint) -> None:
    assert backend.get_model_name().endswith("tiny")
    assert sgl.get_server_info()["context_length"] == 512
    backend.cache_prefix("A list is a list, and a list is a list, and a list is a list. " * 3)
    sgl.flush_cache()
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/health").status_code == 200


def test_the_text_that_all_prompts_begin_with_is_computed_before(server: Server, oracle: Oracle) -> None:
    @sgl.function
    def questions(s: sgl.ProgramState, examples: str, question: str) -> None:
        s += examples
        s += f"Q: {question}\nA:" + sgl.gen("it", max_tokens=1)

    examples = "Q: What is a list?\nA: A sequence of objects\n" * 6
    bound = questions.bind(examples=examples)
    sgl.flush_cache()
    assert bound.cache() == examples
    meta = bound.run(question="Why?").get_meta_info("it")
    block = 16
    assert meta["cached_tokens"] >= len(oracle.ids(examples)) - block > 5 * block
    with pytest.raises(TypeError, match="OpenAI is no RuntimeEndpoint"):
        bound.cache(sgl.OpenAI("tiny", base_url=f"{server.url}/v1", api_key="none"))


@sgl.function
def long_answer(s: sgl.ProgramState) -> None:
    s += "The list" + sgl.gen("it", max_tokens=400, **GREEDY)


@pytest.mark.parametrize("delay", [0.0, 0.0003, 0.003, 0.03])
def test_an_interrupt_ends_a_program_and_stops_no_other(server: Server, oracle: Oracle, delay: float) -> None:
    """Whenever it comes: what wakes whoever waits must not wait for a lock that the interrupt has left taken."""

    def answer_for_ever() -> None:
        while True:
            long_answer.run().sync()

    for _ in range(10):
        interrupt(answer_for_ever, delay)
    state = few_shot.run(question="What is a tuple?")
    assert state["answer"] == greedy(oracle, few_shot_text("What is a tuple?"), stop="\n")
    with server.client() as client:
        wait_until(lambda: num_in_flight(client) == 0)


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.01, 0.1])
@pytest.mark.parametrize("options", [{}, {"num_threads": 2}], ids=["all", "two"])
def test_an_interrupt_ends_a_batch(server: Server, options: dict[str, Any], delay: float) -> None:
    """Also while its threads begin; those that wait for a program's text end too."""

    @sgl.function
    def waits(s: sgl.ProgramState, index: int) -> None:
        s += f"Number {index}" + sgl.gen("it", max_tokens=400, ignore_eos=True)
        s += s["it"]

    interrupt(lambda: waits.run_batch([{"index": index} for index in range(300)], **options), delay)
    with server.client() as client:
        wait_until(lambda: num_in_flight(client) == 0)
    wait_until(lambda: not any(thread.name == THREAD for thread in threading.enumerate()))
    assert waits.run_batch([[index] for index in range(3)], max_new_tokens=1, **options)[2].error() is None
