"""Conversations: their prompts are those that the model's chat template makes, over each of the backends."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import scripted_server
from octavo_server import Server
from scripted_server import Asked
from tiny_oracle import Oracle

import octavo.lang as sgl

GREEDY = {"temperature": 0.0}
COUNT = 10
SYSTEM = {"role": "system", "content": "You write code."}
FIRST = {"role": "user", "content": "What is a list?"}
SECOND = {"role": "user", "content": " And a tuple? "}

pytestmark = pytest.mark.usefixtures("default_backend")


@sgl.function
def chat(s: sgl.ProgramState, first: str, second: str) -> None:
    s += sgl.system(SYSTEM["content"])
    s += sgl.user(first)
    s += sgl.assistant(sgl.gen("answer_1", max_tokens=COUNT))
    with s.user():
        s += second
    with s.assistant():
        s += sgl.gen("answer_2", max_tokens=COUNT)


def answered(oracle: Oracle, messages: list[dict[str, str]], begun: str = "", count: int = COUNT) -> str:
    """The model's answer, up to the token that ends it; `begun`: what it has said already."""
    prompt = oracle.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + begun
    ids = oracle.greedy(oracle.ids(prompt), count)
    ends = [place for place, token in enumerate(ids) if token in (0, 2)]
    return oracle.text(ids[: ends[0]] if ends else ids)


def conversation(oracle: Oracle) -> list[dict[str, str]]:
    messages = [SYSTEM, FIRST]
    messages.append({"role": "assistant", "content": answered(oracle, messages)})
    messages.append(SECOND)
    messages.append({"role": "assistant", "content": answered(oracle, messages)})
    return messages


@pytest.fixture(params=["native", "chatml", "openai", "anthropic"])
def any_backend(request: pytest.FixtureRequest, server: Server) -> sgl.Backend:
    match request.param:
        case "native":
            return sgl.RuntimeEndpoint(server.url)
        case "chatml":
            return sgl.RuntimeEndpoint(server.url, chat_template_name="chatml")
        case "openai":
            return sgl.OpenAI("tiny", base_url=f"{server.url}/v1", api_key="none")
    return sgl.Anthropic("tiny", base_url=server.url, api_key="none")


def test_a_conversation(any_backend: sgl.Backend, oracle: Oracle) -> None:
    expected = conversation(oracle)
    state = chat.run(FIRST["content"], SECOND["content"], backend=any_backend, **GREEDY)
    assert state.messages() == expected
    assert [state["answer_1"], state["answer_2"]] == [expected[2]["content"], expected[4]["content"]]
    streamed = chat.run(FIRST["content"], SECOND["content"], backend=any_backend, stream=True, **GREEDY)
    assert "".join(streamed.text_iter("answer_1")) == expected[2]["content"]
    assert "".join(streamed.text_iter()) == streamed.text() == state.text()
    assert streamed.messages() == expected
    if isinstance(any_backend, sgl.RuntimeEndpoint):
        assert state.text() == oracle.tokenizer.apply_chat_template(expected, tokenize=False)
    metas = [state.get_meta_info(name)["completion_tokens"] for name in ("answer_1", "answer_2")]
    assert metas == [streamed.get_meta_info(name)["completion_tokens"] for name in ("answer_1", "answer_2")]


def test_a_turn_that_has_begun(server: Server, oracle: Oracle) -> None:
    @sgl.function
    def begun(s: sgl.ProgramState) -> None:
        s += sgl.user(FIRST["content"])
        s += sgl.assistant("A list is" + sgl.gen("one", max_tokens=4) + ". It is" + sgl.gen("two", max_tokens=4))

    state = begun.run(**GREEDY)
    one = answered(oracle, [FIRST], "A list is", 4)
    two = answered(oracle, [FIRST], f"A list is{one}. It is", 4)
    assert (state["one"], state["two"]) == (one, two)
    assert state.messages()[1]["content"] == f"A list is{one}. It is{two}"
    prefilled = begun.run(backend=sgl.Anthropic("tiny", base_url=server.url, api_key="none"), **GREEDY)
    assert prefilled.messages() == state.messages()
    refused = begun.run(backend=sgl.OpenAI("tiny", base_url=server.url, api_key="none"), **GREEDY)
    with pytest.raises(ValueError, match="each gen must begin an assistant's turn"):
        refused.text()


def test_forks_of_a_conversation(oracle: Oracle) -> None:
    @sgl.function
    def forked(s: sgl.ProgramState) -> None:
        s += sgl.user(FIRST["content"])
        forks = s.fork(2)
        forks += sgl.assistant(sgl.gen("answer", max_tokens=COUNT, **GREEDY))
        forks.join("concate_and_append")
        s += sgl.assistant_begin()
        s += "So"
        s += sgl.assistant_end()

    answer = {"role": "assistant", "content": answered(oracle, [FIRST])}
    assert forked.run().messages() == [FIRST, answer, answer, {"role": "assistant", "content": "So"}]


def test_select_in_a_turn(oracle: Oracle) -> None:
    """The choice behind the generation prompt, by transformers' log-probabilities."""

    @sgl.function
    def chosen(s: sgl.ProgramState) -> None:
        s += sgl.user(FIRST["content"])
        s += sgl.assistant(sgl.select("it", ["The", "a", "Yes"]))

    prompt = oracle.chat_ids([FIRST])
    scores = {}
    for choice in ("The", "a", "Yes"):
        ids = oracle.ids(choice)
        rows = oracle.logprobs(prompt + ids)
        scores[choice] = sum(float(rows[len(prompt) - 1 + i][token]) for i, token in enumerate(ids)) / len(ids)
    state = chosen.run()
    assert state["it"] == max(scores, key=scores.__getitem__)
    assert state.get_meta_info("it")["normalized_prompt_logprobs"] == pytest.approx(list(scores.values()), abs=2e-4)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([sgl.user("a"), "text"], "text stands between turns"),
        (["text", sgl.user("a")], "text stands before the first turn"),
        ([sgl.user("a"), sgl.gen("b")], "gen stands outside of a turn"),
        ([sgl.user_begin(), sgl.assistant_begin()], "'assistant' begins within one of role 'user'"),
        ([sgl.user_begin(), sgl.assistant_end()], "'assistant' ends, where one of role 'user' is open"),
        ([sgl.user_end()], "'user' ends, where none is open"),
        ([sgl.user_begin(), sgl.gen("b")], "gen begins a turn of role 'user'"),
    ],
)
def test_turns_that_can_not_be(parts: list[Any], said: str) -> None:
    @sgl.function
    def wrong(s: sgl.ProgramState) -> None:
        for part in parts:
            s += part

    with pytest.raises(ValueError, match=said):
        wrong.run().text()


def test_a_server_that_renders_no_templates() -> None:
    """SGLang's, which knows POST /tokenize with a prompt only."""

    def answers(asked: Asked) -> Iterator[bytes]:
        if asked.path == "/get_model_info":
            yield from scripted_server.whole({"model_path": "theirs"})
        elif asked.path == "/tokenize":
            yield from scripted_server.whole({"error": {"message": "prompt: field required"}}, "400 Bad Request")
        else:
            yield from scripted_server.whole({"text": "so", "meta_info": {"finish_reason": {"type": "stop"}}})

    with scripted_server.serving(answers) as server:
        state = chat.run("a", "b", backend=sgl.RuntimeEndpoint(server.url))
        with pytest.raises(sgl.BackendError, match=r"prompt: field required \(chat_template_name=..."):
            state.messages()
        named = sgl.RuntimeEndpoint(server.url, chat_template_name="llama-3-instruct")
        assert chat.run("a", "b", backend=named)["answer_2"] == "so"
        asked = [each.json for each in server.asked if each.path == "/generate"]
        assert asked[0]["text"].endswith("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
        assert asked[0]["sampling_params"]["stop"] == ["<|eot_id|>"]
    with pytest.raises(ValueError, match="'nobodys' is none of plain, chatml"):
        sgl.RuntimeEndpoint("http://127.0.0.1:9", chat_template_name="nobodys")


def test_openai_options(server: Server, oracle: Oracle) -> None:
    backend = sgl.OpenAI("tiny", base_url=server.url, api_key="none")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}

    @sgl.function
    def asked(s: sgl.ProgramState, **options: Any) -> None:
        s += sgl.user(FIRST["content"])
        s += sgl.assistant(sgl.gen("it", max_tokens=40, **options))

    def run(backend: sgl.Backend, **options: Any) -> sgl.ProgramState:
        program = sgl.function(lambda s: asked.func(s, **options))
        return program.run(backend=backend, **GREEDY)

    for form in (schema, json.dumps(schema)):
        assert re.fullmatch(r'\{\s*("a"\s*(:\s*([12]\s*\}?)?)?)?', run(backend, json_schema=form)["it"])
    assert len(run(backend, n=2)["it"]) == 2
    stopped = run(backend, stop=["e"])
    assert stopped["it"] == answered(oracle, [FIRST], count=40).split("e")[0]
    for name, value in {"regex": "a+", "dtype": int, "top_k": 3, "min_tokens": 2, "ignore_eos": True}.items():
        with pytest.raises(ValueError, match=r"is no field of OpenAI's API"):
            run(backend, **{name: value}).text()
    sent = sgl.OpenAI("tiny", base_url=server.url, api_key="none", extra_body={"regex": "b{3}"})
    assert run(sent)["it"] == "bbb"
    with pytest.raises(ValueError, match="tells no log-probabilities"):
        sgl.function(lambda s: s.assistant(sgl.select("it", ["a", "b"]))).run(backend=backend).text()
    with pytest.raises(ValueError, match="is_azure"):
        sgl.OpenAI("tiny", is_azure=True)


def test_completions(server: Server, oracle: Oracle) -> None:
    backend = sgl.OpenAI("tiny", is_chat_model=False, base_url=f"{server.url}/v1", api_key="none")

    @sgl.function
    def two(s: sgl.ProgramState) -> None:
        s += "The list" + sgl.gen("one", max_tokens=4) + " is" + sgl.gen("two", max_tokens=4)

    one = oracle.text(oracle.greedy(oracle.ids("The list"), 4))
    text = f"The list{one} is"
    state = two.run(backend=backend, **GREEDY)
    assert state.text() == text + oracle.text(oracle.greedy(oracle.ids(text), 4))
    streamed = two.run(backend=backend, stream=True, **GREEDY)
    assert "".join(streamed.text_iter()) == state.text()
    with pytest.raises(ValueError, match="turns need a chat model"):
        chat.run("a", "b", backend=backend).messages()


def test_anthropic_options(server: Server, oracle: Oracle) -> None:
    backend = sgl.Anthropic("tiny", base_url=server.url, api_key="none")

    def run(*parts: Any) -> sgl.ProgramState:
        @sgl.function
        def asked(s: sgl.ProgramState) -> None:
            for part in parts:
                s += part

        return asked.run(backend=backend, **GREEDY)

    plain = run(FIRST["content"], sgl.gen("it", max_tokens=COUNT))
    assert plain["it"] == answered(oracle, [FIRST])
    stopped = run(sgl.user(FIRST["content"]), sgl.assistant(sgl.gen("it", max_tokens=40, stop="e")))
    assert stopped["it"] == answered(oracle, [FIRST], count=40).split("e")[0]
    with pytest.raises(ValueError, match="regex is no field of Anthropic's API"):
        run(sgl.user("a"), sgl.assistant(sgl.gen("it", regex="a+"))).text()
    with pytest.raises(ValueError, match="tells no log-probabilities"):
        run(sgl.user("a"), sgl.assistant(sgl.select("it", ["a", "b"]))).text()


def test_a_busy_server_is_asked_again() -> None:
    refusals = [scripted_server.whole({"error": {"message": "later"}}, "429 Too Many Requests")] * 2

    def answers(asked: Asked) -> Iterator[bytes]:
        assert asked.headers["authorization"] == "Bearer mine"
        if refusals:
            yield from refusals.pop()
        elif asked.json.get("stream"):
            events = [scripted_server.delta(content="o"), scripted_server.delta("stop", content="k")]
            yield from scripted_server.stream([*map(scripted_server.event, events), scripted_server.DONE])
        else:
            yield from scripted_server.whole({"choices": [{"message": {"content": "ok"}, "finish_reason": "stop"}]})

    with scripted_server.serving(answers) as server:
        backend = sgl.OpenAI("any", base_url=server.url, api_key="mine")
        assert chat.run("a", "b", backend=backend)["answer_2"] == "ok"
        assert len(server.asked) == 4
        assert server.asked[-1].json["messages"][-1] == {"role": "user", "content": "b"}
        assert "".join(chat.run("a", "b", backend=backend, stream=True).text_iter("answer_1")) == "ok"


def test_a_stream_that_breaks_off() -> None:
    def answers(_: Asked) -> Iterator[bytes]:
        yield from scripted_server.stream([scripted_server.event(scripted_server.delta(content="beginning"))])

    with scripted_server.serving(answers) as server:
        state = chat.run("a", "b", backend=sgl.OpenAI("any", base_url=server.url, api_key="x"), stream=True)
        pieces = state.text_iter("answer_1")
        assert next(pieces) == "beginning"
        with pytest.raises(sgl.BackendError, match="the stream broke off before its end"):
            next(pieces)
