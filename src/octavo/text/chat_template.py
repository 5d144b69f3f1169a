"""Chat templates, rendered as transformers renders them, without importing transformers.

A template is code from a checkpoint or from a client: it runs in jinja2's immutable sandbox and sees plain JSON values
only. The sandbox limits neither time nor memory, so the server renders in a process that does (template_process.py).
Every way in which a template can fail is a ChatTemplateError that names the template.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from octavo.quant.model_files import CheckpointError, read_object_if_any, read_text

Message = dict[str, Any]

REQUEST_ORIGIN = "the request's chat_template"
TESTS_OF_TEXT = ("string", "sequence", "iterable", "mapping")  # by which a template tells text from parts
_CONTINUE_HERE = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


WITHOUT_TEMPLATE = {
    "paligemma": (
        "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
}
"""Of model types that are published without one: what the messages say, one behind the other, as vLLM has it."""


class ChatTemplateError(ValueError):
    """No template, or one that refuses these messages or fails on them."""


class TemplateLimitError(ChatTemplateError):
    """A template exceeded its limit of time, memory or output."""


@dataclass(frozen=True)
class TemplateSource:
    """A template's text, and where it comes from, for errors."""

    text: str
    origin: str


class ChatTemplate:
    """The templates of one model: usually only 'default'. `special_tokens` are visible to them by name."""

    def __init__(
        self, templates: dict[str, str], special_tokens: dict[str, str], origins: dict[str, str] | None = None
    ) -> None:
        self.templates = templates
        self._special_tokens = special_tokens
        self._origins = origins or dict.fromkeys(templates, "chat template")

    @classmethod
    def open(cls, directory: Path, special_tokens: dict[str, str], override: str | None = None) -> ChatTemplate:
        """A model's templates: `override` (a file or the template itself), else chat_template.jinja and
        additional_chat_templates/*.jinja, else tokenizer_config.json's chat_template (a string, or a list by name).
        """
        if override is not None:
            source = _inline_or_file(override)
            return cls({"default": source.text}, special_tokens, {"default": source.origin})
        templates = _from_config(directory / "tokenizer_config.json")
        origins = dict.fromkeys(templates, "tokenizer_config.json, chat_template")
        files = [("default", directory / "chat_template.jinja")]
        files += [(file.stem, file) for file in sorted((directory / "additional_chat_templates").glob("*.jinja"))]
        for name, file in files:
            if file.exists():
                templates[name] = _read_template(file)
                origins[name] = str(file.relative_to(directory))
        model_type = str(read_object_if_any(directory / "config.json").get("model_type"))
        if not templates and model_type in WITHOUT_TEMPLATE:
            templates["default"] = WITHOUT_TEMPLATE[model_type]
            origins["default"] = f"octavo's for {model_type}"
        return cls(templates, special_tokens, origins)

    def check(self) -> None:
        """Compile every template. Raises ChatTemplateError with the file and the line of what is wrong."""
        for name in self.templates:
            _compiled(self.choose(name))

    def render(
        self,
        messages: Sequence[Message],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
        max_characters: int | None = None,
    ) -> str:
        """The prompt for these messages. `template`: one by name, or a template's own text; else the default.

        tools are in OpenAI's form: {"type": "function", "function": {...}}. Raises ChatTemplateError, and MemoryError
        where memory is limited.
        """
        source = self.choose(self.name_for(template, has_tools=bool(tools)))
        compiled, wants_parts, takes_text, wants_functions = _compiled(source)
        try:
            chat = [_with_reasoning_names(message) for message in copy.deepcopy(list(messages))]
            for message in chat:
                if isinstance(message.get("content"), list) and not wants_parts:
                    message["content"] = _as_text(message["content"])
                elif isinstance(message.get("content"), str) and not takes_text:
                    message["content"] = [{"type": "text", "text": message["content"]}]
            text = _mark_end(chat, source.text) if continue_final_message else None
            own = _functions(tools) if wants_functions else {}
            values = self._special_tokens | own | copy.deepcopy(variables or {})
            values |= {
                "messages": chat,
                "tools": copy.deepcopy(tools) or None,
                "documents": copy.deepcopy(documents),
                "add_generation_prompt": add_generation_prompt,
            }
            rendered = _written(compiled, values, source.origin, max_characters)
        except (ChatTemplateError, MemoryError):
            raise
        except Exception as error:  # a template can raise anything that Python can
            raise ChatTemplateError(
                f"the chat template refused these messages: {error or type(error).__name__} ({source.origin})"
            ) from error
        return rendered if text is None else _cut_at_mark(rendered, text)

    @property
    def has_default(self) -> bool:
        """Whether a conversation can be rendered without naming a template."""
        return "default" in self.templates

    def name_for(self, template: str | None, *, has_tools: bool) -> str | None:
        """With tools, `tool_use` is the default where a model has one, as in transformers."""
        return "tool_use" if template is None and has_tools and "tool_use" in self.templates else template

    def choose(self, template: str | None) -> TemplateSource:
        """The template of that name, else the text itself as a request's own; the default for None."""
        if template is not None and template not in self.templates:
            return TemplateSource(template, REQUEST_ORIGIN)
        name = "default" if template is None else template
        if name in self.templates:
            return TemplateSource(self.templates[name], self._origins[name])
        if self.templates:
            raise ChatTemplateError(f"this model has no default chat template; name one of {sorted(self.templates)}")
        raise ChatTemplateError("this model has no chat template; see --chat-template, or use /v1/completions")


def _as_text(parts: list[dict[str, str]]) -> str:
    if any(part["type"] != "text" for part in parts):
        raise ChatTemplateError("the chat template takes text alone, and the messages have images: see --chat-template")
    return "\n".join(part["text"] for part in parts)


def _inline_or_file(override: str) -> TemplateSource:
    if any(mark in override for mark in "{}\n"):
        return TemplateSource(override, "--chat-template")
    path = Path(override)
    if not path.is_file():
        raise ChatTemplateError(f"--chat-template {override!r} is neither a file nor a template (it has no braces)")
    return TemplateSource(_read_template(path), f"--chat-template {override}")


def _read_template(file: Path) -> str:
    try:
        return read_text(file)
    except CheckpointError as error:
        raise ChatTemplateError(f"the chat template {error}") from None


def _from_config(file: Path) -> dict[str, str]:
    template = read_object_if_any(file).get("chat_template")
    try:
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
        named = template if isinstance(template, dict) else {} if template is None else {"default": template}
        if all(isinstance(text, str) for text in named.values()):
            return dict(named)
    except (KeyError, TypeError):
        pass
    raise ChatTemplateError(
        f"{file}: chat_template must be a string, or a list of objects with 'name' and 'template'; "
        "--chat-template FILE stands in for it"
    )


class _Compiled(NamedTuple):
    """A template, whether it walks over a message's content, and so wants its parts as a list, whether content that is
    text may stand there too, and whether it shows tools under their older name.
    """

    template: jinja2.Template
    wants_parts: bool
    takes_text: bool
    wants_functions: bool


def _compiled(source: TemplateSource) -> _Compiled:
    """`_compile`, with errors that say where the template is wrong."""
    try:
        return _compile(source.text)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(f"{source.origin}, line {error.lineno}: {error.message}") from None
    except (RecursionError, ValueError, TypeError, OverflowError) as error:  # of expressions that are constant
        raise ChatTemplateError(f"{source.origin}: the template can't be compiled: {error}") from None


def _written(compiled: jinja2.Template, values: dict[str, Any], origin: str, max_characters: int | None) -> str:
    """The text that the template writes. Raises TemplateLimitError as soon as it is too long."""
    if max_characters is None:
        return compiled.render(values)
    pieces = []
    length = 0
    for piece in compiled.generate(values):
        length += len(piece)
        if length > max_characters:
            raise TemplateLimitError(
                f"the chat template wrote more than {max_characters} characters, the limit of a prompt ({origin})"
            )
        pieces.append(piece)
    return "".join(pieces)


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> _Compiled:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    tree = environment.parse(source)
    wants_parts = _iterates_content(tree)
    wants_functions = False
    if "functions" in source and "datetime" in source:  # to look closer takes as long as to compile it
        named = jinja2.meta.find_undeclared_variables(tree)
        wants_functions = {"functions", "datetime"} <= named and "tools" not in named
    takes_text = not wants_parts or any(test.name in TESTS_OF_TEXT for test in tree.find_all(jinja2.nodes.Test))
    return _Compiled(environment.from_string(tree), wants_parts, takes_text, wants_functions)


def _functions(tools: list[dict[str, Any]] | None) -> dict[str, str]:
    """What Firefunction takes in the place of tools, as its model card has it: their text, and the time."""
    functions = [tool["function"] for tool in tools or ()]
    return {"functions": json.dumps(functions, indent=4), "datetime": _strftime_now("%Y-%m-%d %H:%M:%S")}


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


def _with_reasoning_names(message: Message) -> Message:
    """The message with its reasoning under every name that templates read, as transformers has it."""
    found = [message[name] for name in _REASONING_NAMES if message.get(name) is not None]
    if not found:
        return message
    return {"thinking": found[0], **message, "reasoning_content": found[0]}


def _mark_end(chat: list[Message], source: str) -> str:
    """Append a mark to the final message's text, and return that text."""
    content = chat[-1].get("content") if chat else None
    if not content or "content" not in source:
        raise ChatTemplateError("continue_final_message: the final message has no content to continue")
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_HERE
        return content
    if content[-1]["type"] != "text":
        raise ChatTemplateError("continue_final_message: the final message ends in an image, not in text")
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


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """transformers' sandbox, and lists that a template may append to and pop from.

    Some copies of Kimi K2's templates keep the ids of their calls in a list. It is safe here, where a template sees
    nothing but copies made for it, and the process that it runs in has limits.
    """

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if type(obj) is list and attr in ("append", "pop"):
            return True
        return super().is_safe_attribute(obj, attr, value)


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
    if isinstance(value, Generator):  # `tools | map(attribute="function") | tojson`
        value = list(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
