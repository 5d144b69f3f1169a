"""The chat templates of released models, and what octavo infers from them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import transformers

from octavo.server.message.infer import Inference, infer
from octavo.server.message.probe import TOOLS
from octavo.text.chat_template import ChatTemplate

FIXTURES = Path(__file__).parents[1] / "fixtures"
TOKENIZER = transformers.AutoTokenizer.from_pretrained(FIXTURES / "tiny", bos_token="<s>", eos_token="</s>")


def source(name: str) -> str:
    """A template's text."""
    return (FIXTURES / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def template(name: str) -> ChatTemplate:
    """The template, compiled."""
    return ChatTemplate({"default": source(name)}, dict(TOKENIZER.special_tokens_map))


@cache
def inference(name: str) -> Inference:
    """What is found out from it."""
    return infer(template(name).render, source(name))


def prompt_of(name: str) -> str:
    """The prompt of a user's turn, up to where the model goes on."""
    return template(name).render([{"role": "user", "content": "Hi"}], tools=TOOLS, add_generation_prompt=True)
