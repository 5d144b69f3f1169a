"""select: its log-probabilities are those of transformers on the same weights, and so are its choices."""

from __future__ import annotations

import random
from itertools import zip_longest

import pytest
from octavo_server import Server, value
from tiny_oracle import Oracle

import octavo.lang as sgl

NEAR = 2e-4  # two float32 computations of one log-probability
METHODS = {
    "mean": sgl.token_length_normalized,
    "greedy": sgl.greedy_token_selection,
    "gain": sgl.unconditional_likelihood_normalized,
}
CASES = [
    ("The capital of France is", [" Paris", " London", " Berlin"]),
    ("A list is a", [" sequence", " set", " sequence of objects", " sequence of"]),
    ("Is it true?", ["True", "False", "Unknown"]),
    ("x = ", ["1", "12", "123", "[1, 2, 3]"]),
    ("日本", ["語", "人", "\n"]),
    ("The", [" quick brown fox jumps over the lazy dog", " a"]),
    ("This sour", ["ce", "ces", "dough"]),
]

pytestmark = pytest.mark.usefixtures("default_backend")


@sgl.function
def chosen(s: sgl.ProgramState, text: str, choices: list[str], method: sgl.ChoicesSamplingMethod) -> None:
    s += text + sgl.gen("it", choices=choices, choices_method=method)


def logprobs(oracle: Oracle, before: list[int], ids: list[int]) -> list[float]:
    """Of each token, behind `before`; 0 for one that nothing precedes."""
    rows = oracle.logprobs(before + ids)
    places = range(len(before) - 1, len(before) + len(ids) - 1)
    return [float(rows[place][token]) if place >= 0 else 0.0 for place, token in zip(places, ids, strict=True)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def best(oracle: Oracle, kind: str, prompt: list[int], choices: list[str]) -> str:
    """What a method is defined to choose."""
    scores: dict[str, list[float]] = {}
    longest = max(len(oracle.ids(choice)) for choice in choices)
    for choice in choices:
        ids = oracle.ids(choice)
        given = logprobs(oracle, prompt, ids)
        match kind:
            case "mean":
                scores[choice] = [mean(given)]
            case "greedy":
                scores[choice] = given + [mean(given)] * (longest - len(ids))
            case "gain":
                alone = logprobs(oracle, [], ids)
                scores[choice] = [mean([one - other for one, other in zip(given, alone, strict=True)])]
    return max(scores, key=scores.__getitem__)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(("text", "choices"), CASES, ids=[text for text, _ in CASES])
def test_choices(oracle: Oracle, text: str, choices: list[str], kind: str) -> None:
    prompt = oracle.ids(text)
    state = chosen.run(text, choices, METHODS[kind])
    meta = state.get_meta_info("it")
    for choice, entries in zip(choices, meta["input_token_logprobs"], strict=True):
        assert [entry[1] for entry in entries] == oracle.ids(choice)
        expected = logprobs(oracle, prompt, oracle.ids(choice))
        assert [entry[0] for entry in entries] == pytest.approx(expected, abs=NEAR)
    assert meta["normalized_prompt_logprobs"] == pytest.approx(
        [mean(logprobs(oracle, prompt, oracle.ids(choice))) for choice in choices], abs=NEAR
    )
    if kind == "gain":
        for choice, entries in zip(choices, meta["unconditional_token_logprobs"], strict=True):
            assert entries[0][0] is None
            expected = logprobs(oracle, [], oracle.ids(choice))[1:]
            assert [entry[0] for entry in entries[1:]] == pytest.approx(expected, abs=NEAR)
    assert state["it"] == best(oracle, kind, prompt, choices)
    assert state.text() == text + state["it"]


def test_random_choices(oracle: Oracle) -> None:
    """Words of the vocabulary behind words of it: with all methods, and whether or not tokens would join."""
    draw = random.Random(7)
    words = [oracle.text([token]) for token in range(300, 1000)]
    items = []
    for _ in range(12):
        text = "".join(draw.choices(words, k=5))
        choices = ["".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(4)]
        items += [{"text": text, "choices": choices, "method": method} for method in METHODS.values()]
    joins = 0
    for item, state in zip(items, chosen.run_batch(items), strict=True):
        prompt = oracle.ids(item["text"])
        kind = next(name for name, method in METHODS.items() if method is item["method"])
        assert state["it"] == best(oracle, kind, prompt, item["choices"])
        joins += any(oracle.ids(item["text"] + choice)[: len(prompt)] != prompt for choice in item["choices"])
    assert joins  # or the next test would stand alone


def test_a_choice_is_split_where_the_text_ends(oracle: Oracle) -> None:
    """Written together, the end of the text and the beginning of a choice are one token. They are not scored as one.

    SGLang tokenizes them together, so that one choice is scored behind another text than its neighbor.
    """

    def together(choice: str) -> float:
        ids = oracle.ids(text + choice)
        same = next(place for place, pair in enumerate(zip_longest(prompt, ids)) if pair[0] != pair[1])
        return mean(logprobs(oracle, ids[:same], ids[same:]))

    text = "This sour"
    choices = ["ce", "dough"]
    prompt = oracle.ids(text)
    assert oracle.ids(text + "ce")[: len(prompt)] != prompt
    assert oracle.ids(text + "dough")[: len(prompt)] == prompt
    state = chosen.run(text, choices, sgl.token_length_normalized)
    entries = state.get_meta_info("it")["input_token_logprobs"]
    apart = [mean(logprobs(oracle, prompt, oracle.ids(choice))) for choice in choices]
    assert together("dough") == pytest.approx(apart[1], abs=NEAR)
    assert together("ce") != pytest.approx(apart[0], abs=0.1)
    for choice, found in zip(choices, entries, strict=True):
        assert "".join(entry[2] for entry in found) == choice
        assert [entry[0] for entry in found] == pytest.approx(logprobs(oracle, prompt, oracle.ids(choice)), abs=NEAR)


def test_one_request_over_a_shared_text(long_server: Server, oracle: Oracle) -> None:
    """The text is computed once for all choices, and in one request."""
    backend = sgl.RuntimeEndpoint(long_server.url)
    text = "A list has an order, and a set has none, which is what they are. " * 30 + "A list is"
    choices = [" ordered", " a sequence of objects", " a set of objects", " nothing at all", " what it is"]
    prompt = oracle.ids(text)
    with long_server.client() as client:
        before = value(client, "vllm:prefix_cache_queries_total"), value(client, "vllm:prefix_cache_hits_total")
        state = chosen.run(text, choices, sgl.token_length_normalized, backend=backend)
        assert state["it"] in choices
        queries = value(client, "vllm:prefix_cache_queries_total") - before[0]
        hits = value(client, "vllm:prefix_cache_hits_total") - before[1]
    longest = max(len(oracle.ids(choice)) for choice in choices)
    num_rows = queries / len(prompt)
    assert num_rows > len(choices)
    assert queries - hits <= len(prompt) + num_rows * (longest + 16)


def test_many_choices(oracle: Oracle) -> None:
    """More than one row can ask for."""
    choices = [oracle.text([token]) for token in range(300, 560)]
    choices = [choice for choice in choices if oracle.ids(choice)[1:] == []]
    assert len(choices) > 200
    state = chosen.run("The list", choices, sgl.token_length_normalized)
    row = oracle.logprobs(oracle.ids("The list"))[-1]
    assert state["it"] == max(choices, key=lambda choice: float(row[oracle.ids(choice)[0]]))


def test_a_method_of_ones_own() -> None:
    class Unlikeliest(sgl.ChoicesSamplingMethod):
        def __call__(self, *, choices, normalized_prompt_logprobs, **_):  # type: ignore[no-untyped-def]
            return sgl.ChoicesDecision(choices[normalized_prompt_logprobs.index(min(normalized_prompt_logprobs))])

    choices = ["1", "12", "[1, 2, 3]"]
    state = chosen.run("x = ", choices, Unlikeliest())
    means = chosen.run("x = ", choices, sgl.token_length_normalized).get_meta_info("it")["normalized_prompt_logprobs"]
    assert state["it"] == choices[means.index(min(means))]


def test_select_that_can_not_be() -> None:
    with pytest.raises(ValueError, match="one of the choices is empty"):
        chosen.run("a", ["b", ""], sgl.token_length_normalized).text()
    with pytest.raises(ValueError, match="there is no text yet"):
        chosen.run("", ["a", "b"], sgl.token_length_normalized).text()
    with pytest.raises(ValueError, match=r"temperature 0\.7"):
        sgl.gen("a", choices=["a"], temperature=0.7)
    with pytest.raises(ValueError, match="is no list of texts"):
        sgl.select("a", "abc")
    with pytest.raises(ValueError, match="regex does not go with choices"):
        sgl.gen("a", choices=["a"], regex="a")
