"""What SGLang's /v1/decisions and /v1/systemone take: typed questions about a text, and how the model is asked them.

The wording of the question is a version of the API, PROMPT_FORMAT_VERSION: probabilities are comparable only under it.
"""

from __future__ import annotations

import json
import string
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator

from octavo.server.dialects.conversation import bounded_json
from octavo.server.dialects.fields import MAX_LOGPROB_TOKENS, Flag, Integer, Number, Strict, Text, named_twice
from octavo.server.errors import field_error

PROMPT_FORMAT_VERSION = 1
MAX_QUESTIONS = 1024
LETTERS = string.ascii_uppercase
MAX_LEVELS = 10

Kind = Literal["choice", "score", "yes_no"]


def is_blank(value: Any) -> bool:
    """Whether there is nothing to read."""
    return not (value.strip() if isinstance(value, str) else value)


def _not_blank(value: Any) -> Any:
    if is_blank(value):
        raise ValueError("must not be blank")
    return value


Content = Text | dict[str, Any] | list[Any]
Said = Annotated[Content, AfterValidator(_not_blank)]
Name = Annotated[str, StringConstraints(strict=True, max_length=256), AfterValidator(_not_blank)]
Variables = Annotated[dict[str, Any], BeforeValidator(bounded_json)]


@dataclass(frozen=True, slots=True)
class Question:
    """A question as it is asked and scored. names: of the answers; details: what each one means."""

    key: str
    kind: Kind
    text: Any
    names: tuple[str, ...]
    details: tuple[Any, ...]

    def prompt(self, about: str, labels: Sequence[str]) -> str:
        """What the user says to the model."""
        asked = "" if is_blank(self.text) else written(self.text)
        if self.kind == "yes_no":
            lines = [f"Is the following true? {asked}".rstrip()]
            meant = zip(labels, map(written, self.details), strict=True)
            lines += [f"{label}: {detail}" for label, detail in meant if detail]
            return "\n".join([about, "", *lines, "Answer with yes or no only."])
        lines = [f"Question: {asked}"] if asked else []
        if self.kind == "score":
            lines += [f"{label}: {written(level)}" for label, level in zip(labels, self.details, strict=True)]
            return "\n".join([about, "", *lines, "Answer with the number of one level only."])
        for label, name, detail in zip(labels, self.names, self.details, strict=True):
            meaning = written(detail)
            lines.append(f"{label}: {name} - {meaning}" if meaning else f"{label}: {name}")
        return "\n".join([about, "", *lines, "Answer with the letter of one option only."])


def written(value: Any) -> str:
    """A text as it is; an object or a list as compact JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _check_names(names: Iterable[str]) -> None:
    """Each option is a line of the prompt, and is told by its name."""
    seen: set[str] = set()
    for name in names:
        folded = name.strip().casefold()
        if not folded or any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in name):
            raise ValueError(f"the option name {name[:80]!r} is blank, or has control characters or line breaks")
        if folded in seen:
            raise ValueError(f"two options are called {name[:80]!r}")
        seen.add(folded)


class Option(Strict):
    """An answer to choose."""

    name: Text
    description: Content | None = None


class ChoiceQuestion(Strict):
    """Which of 2 to 26 options?"""

    id: Name
    type: Literal["choice"]
    question: Said
    options: Annotated[list[Option], Field(min_length=2, max_length=len(LETTERS))]

    @model_validator(mode="after")
    def _check_options(self) -> ChoiceQuestion:
        _check_names(option.name for option in self.options)
        return self

    def plain(self) -> Question:
        names = tuple(option.name for option in self.options)
        return Question(self.id, "choice", self.question, names, tuple(option.description for option in self.options))


class ScoreQuestion(Strict):
    """Which of 2 to 10 levels, the lowest first?"""

    id: Name
    type: Literal["score"]
    question: Said
    levels: Annotated[list[Said], Field(min_length=2, max_length=MAX_LEVELS)]

    def plain(self) -> Question:
        return Question(self.id, "score", self.question, _numbers(self.levels), tuple(self.levels))


class YesNoQuestion(Strict):
    """Is it true? yes and no may say what each of both means."""

    id: Name
    type: Literal["yes_no"]
    question: Said
    yes: Content | None = None
    no: Content | None = None

    def plain(self) -> Question:
        return Question(self.id, "yes_no", self.question, ("yes", "no"), (self.yes, self.no))


class DecisionRequest(Strict):
    """POST /v1/decisions. temperature scales the probabilities of the options, and no label_mass."""

    model: Text | None = None
    input: Said
    questions: Annotated[
        list[Annotated[ChoiceQuestion | ScoreQuestion | YesNoQuestion, Field(discriminator="type")]],
        Field(min_length=1, max_length=MAX_QUESTIONS),
    ]
    temperature: Annotated[Number, Field(gt=0)] = 1.0
    chat_template_kwargs: Variables | None = None
    prompt_format_version: Integer | None = None
    return_prompt_token_ids: Flag = False
    images: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _check_questions(self) -> DecisionRequest:
        twice = named_twice(question.id for question in self.questions)
        if twice is not None:
            raise field_error("questions", f"questions: two of them have the id {twice!r}")
        if self.prompt_format_version not in (None, PROMPT_FORMAT_VERSION):
            raise field_error(
                "prompt_format_version",
                f"prompt_format_version {self.prompt_format_version}: this server asks by version "
                f"{PROMPT_FORMAT_VERSION} alone",
            )
        return self

    def plain(self) -> list[Question]:
        return [question.plain() for question in self.questions]


class NoulCriteria(Strict):
    """What each of both answers means."""

    true: Content | None = None
    false: Content | None = None


class NoulQuestion(Strict):
    """Is it true?"""

    type: Literal["noul"]
    instructions: Content | None = None
    criteria: NoulCriteria | None = None

    @model_validator(mode="after")
    def _check_text(self) -> NoulQuestion:
        if all(is_blank(text) for text in (self.instructions, *self.meanings)):
            raise ValueError("instructions or criteria must say what is asked")
        return self

    @property
    def meanings(self) -> tuple[Any, Any]:
        """Of yes, and of no."""
        return (None, None) if self.criteria is None else (self.criteria.true, self.criteria.false)

    def plain(self, key: str) -> Question:
        return Question(key, "yes_no", self.instructions, ("yes", "no"), self.meanings)


class NamedChoiceQuestion(Strict):
    """Which of the options? criteria: what each one means, by its name."""

    type: Literal["choice"]
    instructions: Content | None = None
    criteria: Annotated[dict[str, Content | None], Field(min_length=1, max_length=MAX_LOGPROB_TOKENS)]

    @model_validator(mode="after")
    def _check_options(self) -> NamedChoiceQuestion:
        _check_names(self.criteria)
        return self

    def plain(self, key: str) -> Question:
        return Question(key, "choice", self.instructions, tuple(self.criteria), tuple(self.criteria.values()))


class LevelsQuestion(Strict):
    """Which level? criteria: the levels, the lowest first."""

    type: Literal["score"]
    instructions: Content | None = None
    criteria: Annotated[list[Said], Field(min_length=1, max_length=MAX_LEVELS)]

    def plain(self, key: str) -> Question:
        return Question(key, "score", self.instructions, _numbers(self.criteria), tuple(self.criteria))


class SystemOneRequest(Strict):
    """POST /v1/systemone. questions: each under the id that its answer gets."""

    model: Text
    state: Content
    questions: Annotated[
        dict[str, Annotated[NoulQuestion | NamedChoiceQuestion | LevelsQuestion, Field(discriminator="type")]],
        Field(min_length=1, max_length=MAX_QUESTIONS),
    ]
    chat_template_kwargs: Variables | None = None
    images: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> list[Question]:
        return [question.plain(key) for key, question in self.questions.items()]


def _numbers(levels: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(level) for level in range(len(levels)))
