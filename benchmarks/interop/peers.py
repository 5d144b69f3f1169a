"""What every engine is asked: the same prompts and the same texts; and how a peer in another environment is asked.

A peer is a script of this folder and the python that runs it. It gets a job, JSON in a file:

    prompts     token ids to continue greedily, max_tokens each; end tokens don't end them
    texts       token ids to score: at each place the log-probability of the next token, and of the most likely ones
    dtype       what to compute in
    attention   transformers' attn_implementation
    divisor     None, or what the largest element of an int8 activation is divided by (float64 only)

and answers on the last line of stdout: {"tokens": [[id]], "scores": [[[logprob, {id: logprob}]]], "version": ...}, or
{"error": its own words, "version": ...}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "<|im_start|>user\nWhat makes bread rise?<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, in a small village by the sea,",
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n",
)
TEXTS = Path(__file__).with_name("lm_eval_tasks") / "rolling.jsonl"
MAX_TOKENS = 32
TOP = 20  # most likely tokens that are reported at each place: what the servers allow by default

Place = tuple[float, dict[int, float]]  # log-probability of the text's next token; those of the most likely tokens


@dataclass(frozen=True)
class Questions:
    prompts: list[list[int]]
    texts: list[list[int]]


@dataclass(frozen=True)
class Peer:
    """A reader in an environment of its own."""

    name: str
    python: str
    script: str
    dtype: str
    environment: dict[str, str] = field(default_factory=dict)
    attention: str = "sdpa"
    divisor: float | None = None


@dataclass(frozen=True)
class Answer:
    """What an engine said. With an error there is nothing else."""

    version: str
    tokens: list[list[int]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)  # of all texts, one after another
    error: str | None = None


def questions(checkpoint: Path) -> Questions:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in TEXTS.read_text("utf-8").splitlines()]
    prompts, scored = (
        [tokenizer.encode(text, add_special_tokens=False).ids for text in some] for some in (PROMPTS, texts)
    )
    return Questions(prompts, scored)


def ask(peer: Peer, checkpoint: Path, asked: Questions, max_tokens: int = MAX_TOKENS) -> Answer:
    """The peer's answer, or its own words on why there is none."""
    print(f"{checkpoint.name}: {peer.name}", file=sys.stderr, flush=True)
    job = {"prompts": asked.prompts, "texts": asked.texts, "max_tokens": max_tokens, "top": TOP}
    job |= {"dtype": peer.dtype, "attention": peer.attention, "divisor": peer.divisor}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        command = [peer.python, str(Path(__file__).with_name(peer.script)), str(checkpoint), file.name]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | peer.environment)
    lines = [line for line in result.stdout.splitlines() if line.startswith('{"')]
    if not lines:
        return Answer(f"{peer.name}: version unknown", error="\n".join(result.stderr.splitlines()[-3:]))
    said = json.loads(lines[-1])
    places = [
        (logprob, {int(token): value for token, value in top.items()})
        for text in said.get("scores", [])
        for logprob, top in text
    ]
    return Answer(said["version"], said.get("tokens", []), places, said.get("error"))
