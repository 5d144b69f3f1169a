"""SGLang's /v1/decisions and /v1/systemone: probabilities are those that transformers computes of the same prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import fim_tokenizer
import httpx
import pytest
from octavo_server import serving
from tiny_oracle import Oracle

Json = dict[str, Any]
NEAR = 2e-4  # two float32 computations of one probability, relatively
TEMPLATES = Path(__file__).parents[2] / "fixtures" / "templates"
OPTIONS = [
    {"name": "billing", "description": "about money"},
    {"name": "bug"},
    {"name": "other", "description": ["x", 1]},
]
CHOICE: Json = {"id": "team", "type": "choice", "question": "Who answers?", "options": OPTIONS}
SCORE: Json = {"id": "anger", "type": "score", "question": {"how": "angry?"}, "levels": ["calm", "cross", "furious"]}
YES_NO: Json = {"id": "refund", "type": "yes_no", "question": "They want money back.", "no": "They want help."}
INPUT = "I was charged twice."
PROMPTS = {  # PROMPT_FORMAT_VERSION 1, as SGLang asks these
    "team": 'I was charged twice.\n\nQuestion: Who answers?\nA: billing - about money\nB: bug\nC: other - ["x",1]\n'
    "Answer with the letter of one option only.",
    "anger": 'I was charged twice.\n\nQuestion: {"how":"angry?"}\n0: calm\n1: cross\n2: furious\n'
    "Answer with the number of one level only.",
    "refund": "I was charged twice.\n\nIs the following true? They want money back.\nno: They want help.\n"
    "Answer with yes or no only.",
}


def decide(client: httpx.Client, *questions: Json, **fields: Any) -> Json:
    response = client.post("/v1/decisions", json={"input": INPUT, "questions": questions, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def system_one(client: httpx.Client, **questions: Json) -> Json:
    body = {"model": "tiny", "state": INPUT, "questions": questions}
    response = client.post("/v1/systemone", json=body)
    assert response.status_code == 200, response.text
    return response.json()


class Truth:
    """What transformers says of a prompt's answers."""

    def __init__(self, oracle: Oracle, prompt: str, labels: str) -> None:
        self.ids = oracle.chat_ids([{"role": "user", "content": prompt}])
        self.label_ids = [oracle.ids(label)[0] for label in labels]
        self.logprobs = [float(oracle.logprobs(self.ids)[-1][token]) for token in self.label_ids]

    def probabilities(self, temperature: float = 1.0) -> list[float]:
        weights = [math.exp(logprob / temperature) for logprob in self.logprobs]
        return [weight / sum(weights) for weight in weights]

    @property
    def mass(self) -> float:
        return sum(map(math.exp, self.logprobs))


def test_a_choice_and_a_score(client: httpx.Client, oracle: Oracle) -> None:
    found = decide(client, CHOICE, SCORE, return_prompt_token_ids=True)
    assert (found["object"], found["model"], found["prompt_format_version"]) == ("decisions", "tiny", 1)
    answers = found["answers"]
    assert list(answers) == ["team", "anger"]
    truth = Truth(oracle, PROMPTS["team"], "ABC")
    team = answers["team"]
    assert (team["prompt_token_ids"], team["label_token_ids"]) == (truth.ids, truth.label_ids)
    assert list(team["probabilities"]) == ["billing", "bug", "other"]
    assert list(team["probabilities"].values()) == pytest.approx(truth.probabilities(), rel=NEAR)
    assert team["label_mass"] == pytest.approx(truth.mass, rel=NEAR)
    assert team["choice"] == ["billing", "bug", "other"][max(range(3), key=truth.logprobs.__getitem__)]
    truth = Truth(oracle, PROMPTS["anger"], "012")
    anger = answers["anger"]
    assert anger["prompt_token_ids"] == truth.ids
    assert list(anger["probabilities"]) == ["0", "1", "2"]
    levels = truth.probabilities()
    assert anger["score"] == pytest.approx(levels[1] + 2 * levels[2], abs=NEAR)
    assert "choice" not in anger
    total = len(team["prompt_token_ids"]) + len(truth.ids)
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (total, 0, total)


def test_the_temperature_is_of_the_options_alone(client: httpx.Client, oracle: Oracle) -> None:
    truth = Truth(oracle, PROMPTS["team"], "ABC")
    for temperature in (0.25, 4):
        team = decide(client, CHOICE, temperature=temperature)["answers"]["team"]
        assert list(team["probabilities"].values()) == pytest.approx(truth.probabilities(temperature), rel=4 * NEAR)
        assert team["label_mass"] == pytest.approx(truth.mass, rel=NEAR)
        assert "prompt_token_ids" not in team


def test_system_one_says_the_same(client: httpx.Client) -> None:
    team: Json = {
        "type": "choice",
        "instructions": "Who answers?",
        "criteria": {"billing": "about money", "bug": None, "other": ["x", 1]},
    }
    anger: Json = {"type": "score", "instructions": {"how": "angry?"}, "criteria": ["calm", "cross", "furious"]}
    found = system_one(client, team=team, anger=anger)
    native = decide(client, CHOICE, SCORE)
    assert found["usage"] == {"input_tokens": native["usage"]["prompt_tokens"], "output_tokens": 0}
    answers = found["answers"]
    assert answers["team"]["probabilities"] == pytest.approx(native["answers"]["team"]["probabilities"], rel=NEAR)
    assert answers["team"]["choice"] == native["answers"]["team"]["choice"]
    assert answers["team"]["x_label_mass"] == pytest.approx(native["answers"]["team"]["label_mass"], rel=NEAR)
    best = max(answers["team"]["probabilities"].values())
    assert answers["team"]["confidence"] == pytest.approx((3 * best - 1) / 2)
    assert answers["anger"]["score"] == pytest.approx(native["answers"]["anger"]["score"], rel=NEAR)
    assert answers["anger"]["legend"] == {"0": "calm", "1": "cross", "2": "furious"}
    levels = list(answers["anger"]["probabilities"].values())
    top = levels.index(max(levels))
    spread = sum(probability * abs(level - top) for level, probability in enumerate(levels))
    assert answers["anger"]["confidence"] == pytest.approx(max(0.0, 1 - spread / (2 / 3)))
    only = system_one(client, sure={"type": "choice", "criteria": {"one": None}})["answers"]["sure"]
    assert (only["choice"], only["confidence"], only["probabilities"]) == ("one", 1.0, {"one": 1.0})


@pytest.fixture(scope="module")
def with_words(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, dict[str, int]]]:
    """A server whose tokenizer has tokens for yes and no, and for some pairs of letters."""
    directory = tmp_path_factory.mktemp("tokenizer")
    ids = fim_tokenizer.write_tokenizer(directory, ["yes", "no", *(f"Q{letter}" for letter in ascii_uppercase)])
    with serving("--served-model-name", "tiny", "--tokenizer", str(directory)) as server, server.client() as client:
        yield client, ids


def test_yes_or_no(with_words: tuple[httpx.Client, dict[str, int]], oracle: Oracle) -> None:
    client, ids = with_words
    found = decide(client, YES_NO, return_prompt_token_ids=True)["answers"]["refund"]
    prompt: list[int] = found["prompt_token_ids"]
    rendered = client.post("/detokenize", json={"tokens": prompt}).json()["prompt"]
    assert rendered == f"<|im_start|>user\n{PROMPTS['refund']}<|im_end|>\n<|im_start|>assistant\n"
    assert found["label_token_ids"] == [ids["yes"], ids["no"]]
    row = oracle.logprobs(prompt)[-1]
    yes, no = (math.exp(float(row[ids[name]])) for name in ("yes", "no"))
    assert found["probabilities"] == pytest.approx({"yes": yes / (yes + no), "no": no / (yes + no)}, rel=NEAR)
    assert found["label_mass"] == pytest.approx(yes + no, rel=NEAR)
    noul = {"type": "noul", "instructions": "They want money back.", "criteria": {"false": "They want help."}}
    answer = system_one(client, refund=noul)["answers"]["refund"]
    assert answer.pop("type") == "noul"
    assert answer == pytest.approx({"noul": yes / (yes + no), "x_label_mass": yes + no}, rel=NEAR)


def test_more_options_than_letters_have_pairs_of_them(with_words: tuple[httpx.Client, dict[str, int]]) -> None:
    client, _ = with_words
    names = [f"o{number}" for number in range(27)]
    answer = system_one(client, many={"type": "choice", "criteria": dict.fromkeys(names)})["answers"]["many"]
    assert list(answer["probabilities"]) == names
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert len(set(answer["probabilities"].values())) > 20
    most = {"type": "choice", "criteria": dict.fromkeys(map(str, range(128)))}
    refused = client.post("/v1/systemone", json={"model": "tiny", "state": INPUT, "questions": {"most": most}})
    assert refused.status_code == 400
    assert "has labels for" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"questions": []}, "questions"),
        ({"questions": [CHOICE, CHOICE]}, "questions"),
        ({"questions": [CHOICE | {"options": OPTIONS[:1]}]}, "options"),
        ({"questions": [CHOICE | {"options": [{"name": str(number)} for number in range(27)]}]}, "options"),
        ({"questions": [CHOICE | {"options": [{"name": "a"}, {"name": " A"}]}]}, "two options are called"),
        ({"questions": [CHOICE | {"options": [{"name": "a\nb"}, {"name": "c"}]}]}, "line breaks"),
        ({"questions": [CHOICE | {"question": " "}]}, "blank"),
        ({"questions": [CHOICE | {"extra": 1}]}, "extra"),
        ({"questions": [SCORE | {"levels": [*"0123456789", "10"]}]}, "levels"),
        ({"questions": [YES_NO]}, "'yes' is not one token"),
        ({"input": ""}, "input"),
        ({"input": 5}, "input"),
        ({"input": "x y z " * 400}, "maximum context length"),
        ({"temperature": 0}, "temperature"),
        ({"prompt_format_version": 2}, "prompt_format_version"),
        ({"images": ["x"]}, "images"),
        ({"model": "another"}, "another"),
        ({"stream": True}, "stream"),
    ],
)
def test_what_can_t_be_decided_is_refused_by_name(client: httpx.Client, fields: Json, name: str) -> None:
    response = client.post("/v1/decisions", json={"input": INPUT, "questions": [CHOICE]} | fields)
    error = response.json()["error"]
    assert response.status_code == (404 if name == "another" else 400)
    assert name in error["message"] or error["param"] == name, error


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ({"type": "noul"}, "instructions"),
        ({"type": "choice", "criteria": {}}, "criteria"),
        ({"type": "choice", "criteria": {"a": None, "A": None}}, "two options are called"),
        ({"type": "score", "criteria": [""]}, "blank"),
        ({"type": "predicate", "instructions": "x"}, "type"),
    ],
)
def test_system_one_refuses_by_name_too(client: httpx.Client, question: Json, name: str) -> None:
    body = {"model": "tiny", "state": INPUT, "questions": {"q": question}}
    response = client.post("/v1/systemone", json=body)
    assert response.status_code == 400
    assert name in response.json()["error"]["message"]


@contextmanager
def with_template(name: str) -> Iterator[httpx.Client]:
    with (
        serving("--chat-template", str(TEMPLATES / name), "--served-model-name", "tiny") as server,
        server.client() as client,
    ):
        yield client


def test_the_answer_is_read_behind_no_thoughts() -> None:
    body = {"input": INPUT, "questions": [CHOICE]}
    with with_template("Qwen-Qwen3-0.6B.jinja") as client:
        found = decide(client, CHOICE, return_prompt_token_ids=True)["answers"]["team"]
        text = client.post("/detokenize", json={"tokens": found["prompt_token_ids"]}).json()["prompt"]
        assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        error = client.post("/v1/decisions", json=body | {"chat_template_kwargs": {"enable_thinking": True}}).json()
        assert error["error"]["param"] == "chat_template_kwargs"
        assert "enable_thinking" in error["error"]["message"]
    with with_template("deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja") as client:
        refused = client.post("/v1/decisions", json=body)
        assert refused.status_code == 400
        assert "thinks before it answers" in refused.json()["error"]["message"]
