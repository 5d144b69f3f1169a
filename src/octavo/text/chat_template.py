"""Chat templates, rendered as transformers renders them, without importing transformers.

A template is code from a checkpoint or from a client: it runs in jinja2's immutable sandbox, and sees plain JSON
values only. Every way in which it can fail is a ChatTemplateError, which the server answers with 400.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

Message = dict[str, Any]

_CONTINUE_HERE = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplateError(ValueError):
    """No template, or one that refuses these messages or fails on them."""


class ChatTemplate:
    """The templates of one model: usually only 'default'. `special_tokens` are visible to them by name."""

    def __init__(self, templates: dict[str, str], special_tokens: dict[str, str]) -> None:
        self.templates = templates
        self._special_tokens = special_tokens

    @classmethod
    def open(cls, directory: Path, special_tokens: dict[str, str], override: str | None = None) -> ChatTemplate:
        """A model's templates: `override` (a file or the template itself), else chat_template.jinja and
        additional_chat_templates/*.jinja, else tokenizer_config.json's chat_template (a string, or a list by name).
        """
        if override is not None:
            return cls({"default": _inline_or_file(override)}, special_tokens)
        templates = _from_config(directory / "tokenizer_config.json")
        single = directory / "chat_template.jinja"
        if single.exists():
            templates["default"] = single.read_text(encoding="utf-8")
        for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            templates[file.stem] = file.read_text(encoding="utf-8")
        return cls(templates, special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        documents: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """The prompt for these messages. `template`: one by name, or a template's own text; else the default."""
        source = self._choose(template)
        try:
            chat = copy.deepcopy(list(messages))
            compiled, wants_parts = _compile(source)
            for message in chat:
                if isinstance(message.get("content"), list) and not wants_parts:
                    message["content"] = "\n".join(part["text"] for part in message["content"])
            text = _mark_end(chat, source) if continue_final_message else None
            rendered: str = compiled.render(
                **self._special_tokens
                | (variables or {})
                | {
                    "messages": chat,
                    "tools": None,
                    "documents": documents,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except ChatTemplateError:
            raise
        except Exception as error:  # a template can raise anything that Python can
            raise ChatTemplateError(
                f"the chat template refused these messages: {error or type(error).__name__}"
            ) from error
        return rendered if text is None else _cut_at_mark(rendered, text)

    def _choose(self, template: str | None) -> str:
        if template is not None:
            return self.templates.get(template, template)
        if "default" in self.templates:
            return self.templates["default"]
        if self.templates:
            raise ChatTemplateError(f"this model has no default chat template; name one of {sorted(self.templates)}")
        raise ChatTemplateError("this model has no chat template; see --chat-template, or use /v1/completions")


def _inline_or_file(override: str) -> str:
    if any(mark in override for mark in "{}\n"):
        return override
    path = Path(override)
    if not path.is_file():
        raise ChatTemplateError(f"--chat-template {override!r} is neither a file nor a template (it has no braces)")
    return path.read_text(encoding="utf-8")


def _from_config(file: Path) -> dict[str, str]:
    template = json.loads(file.read_text(encoding="utf-8")).get("chat_template") if file.exists() else None
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        return dict(template)
    return {"default": template} if isinstance(template, str) else {}


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> tuple[jinja2.Template, bool]:
    """The compiled template, and whether it walks over a message's content, and so wants its parts as a list."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source), _iterates_content(environment.parse(source))


def _iterates_content(tree: jinja2.nodes.Template) -> bool:
    def is_content(node: jinja2.nodes.Node) -> bool:
        match node:
            case jinja2.nodes.Getattr(attr="content"):
                return True
            case jinja2.nodes.Getitem(arg=jinja2.nodes.Const(value="content")):
                return True
            case jinja2.nodes.Filter(node=jinja2.nodes.Node() as inner):
                return is_content(inner)
            case jinja2.nodes.Name(name=name):
                return name in content_names
        return False

    content_names: set[str] = set()
    for assignment in tree.find_all(jinja2.nodes.Assign):
        if isinstance(assignment.target, jinja2.nodes.Name) and is_content(assignment.node):
            content_names.add(assignment.target.name)
    return any(is_content(loop.iter) for loop in tree.find_all(jinja2.nodes.For))


def _mark_end(chat: list[Message], source: str) -> str:
    """Put a mark behind the final message's text, and return that text."""
    content = chat[-1].get("content") if chat else None
    if not content or "content" not in source:
        raise ChatTemplateError("continue_final_message: the final message has no content to continue")
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_HERE
        return content
    text: str = content[-1]["text"]
    content[-1]["text"] = text + _CONTINUE_HERE
    return text


def _cut_at_mark(rendered: str, text: str) -> str:
    at = rendered.rfind(_CONTINUE_HERE.strip())
    if at < 0 or text.strip() not in rendered:
        raise ChatTemplateError("continue_final_message: the chat template leaves out or changes the final message")
    if rendered.startswith(_CONTINUE_HERE, at):
        return rendered[:at]
    return rendered[:at].rstrip()  # the template trims messages, so the end of this one is trimmed too


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which a prompt must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
