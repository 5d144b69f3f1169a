"""The served model as the server sees it: names, tokenizer, templates, default sampling values and end tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from octavo.quant.model_files import read_object_if_any
from octavo.quant.printable import shown
from octavo.runtime.messages import StartupReport, Vocabulary
from octavo.server.dialects.fields import GenerationRequest
from octavo.server.draft_metrics import DraftReports
from octavo.server.encoder_text import EncoderText
from octavo.server.errors import explain
from octavo.server.fleet.adapters import AdapterNames, ServedAdapter
from octavo.server.hints import ALL_HINTS
from octavo.server.media.images import Images
from octavo.server.message.model_formats import ModelFormats
from octavo.server.options import SAMPLING_DEFAULTS, StructuredOutputsConfig
from octavo.server.pooled_text import PooledText
from octavo.server.speech_text import SpeechText
from octavo.server.template_renderer import TemplateRenderer
from octavo.text.tokenizer import Tokenizer

ANY_NAME = "*"
LARGEST_TOKEN_ID = 2**31 - 1


@dataclass
class WeightVersion:
    """What answers call the weights that are served now."""

    name: str = "default"


@dataclass(frozen=True)
class ServedModel:
    """One model.

    end_ids        the tokens that end an answer, unless a request ignores them
    defaults       values of the sampling fields that a request leaves out
    max_model_len  the engine's
    vocab_size     the engine's; the tokenizer may leave ids below it unused
    formats        how the model writes tool calls and reasoning
    aliases        further names, and the name of `names` that each one means
    serves_any     requests may use any name at all
    report         what the engine has loaded
    directory      the model's, where this process reads it
    stream_interval, tokens_as_token_ids: what requests get that don't say it
    template_variables  those of the chat template where a request doesn't set them
    tool_strict_level  how much of a call is enforced where a tool doesn't ask for it
    clamps_max_tokens  max_tokens above what the context leaves means what it leaves, in OpenAI's older dialects too
    reasoning_end_str  what a model is made to say where its budget of thoughts is spent, before their end
    weights        what answers call them
    adapters       those that are served beside the model itself; None: there are none
    draft_reports  what answers tell of their drafts
    pooled         what it does instead of generating; None: it generates
    images         how images of its prompts are read; None: it reads text alone
    speech         how it is asked to write down what it hears; None: it hears nothing
    encoder        what its decoder begins with, once its encoder has read the prompt; None: answers continue prompts
    server_name, response_ending  where several processes serve the model, what names of requests of this one begin with
                 (runtime/shared_link.py), and how ids of its responses end (processes/home.py)
    """

    names: tuple[str, ...]
    root: str
    tokenizer: Tokenizer
    renderer: TemplateRenderer
    end_ids: frozenset[int]
    defaults: dict[str, float]
    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    scheduling_policy: Literal["fcfs", "priority", "lpm"] = "fcfs"
    max_logprobs: int = 20
    clamps_max_tokens: bool = False
    trust_request_chat_template: bool = False
    structured_outputs: StructuredOutputsConfig = field(default_factory=StructuredOutputsConfig)
    formats: ModelFormats = field(default_factory=ModelFormats)
    aliases: Mapping[str, str] = field(default_factory=dict)
    serves_any: bool = False
    report: StartupReport | None = None
    directory: Path | None = None
    stream_interval: int = 1
    tokens_as_token_ids: bool = False
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    tool_strict_level: Literal["auto", "function", "parameter"] = "parameter"
    reasoning_end_str: str = ""
    draft_reports: DraftReports = field(default_factory=DraftReports)
    server_name: str = ""
    response_ending: str = ""
    adapters: AdapterNames | None = None
    pooled: PooledText | None = None
    images: Images | None = None
    speech: SpeechText | None = None
    encoder: EncoderText | None = None
    weights: WeightVersion = field(default_factory=WeightVersion)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        """The name in responses and metrics."""
        return self.names[0]

    @property
    def max_prompt_len(self) -> int:
        """Tokens that a prompt may have."""
        return self.max_model_len if self.encoder is None else self.encoder.max_tokens

    @property
    def all_names(self) -> tuple[str, ...]:
        """The names that are told: with the aliases."""
        adapters = () if self.adapters is None else self.adapters
        return (*self.names, *(alias for alias in self.aliases if alias not in self.names), *adapters)

    def serves(self, name: str) -> bool:
        """Whether a request for the model of this name is answered."""
        return self.serves_any or name in self.names or name in self.aliases or self.adapter(name) is not None

    def adapter(self, name: str | None) -> ServedAdapter | None:
        """The adapter of this name; None where that is the model's own, or nobody's."""
        return None if self.adapters is None or name is None else self.adapters.get(name)

    def name_lines(self) -> list[str]:
        """What is said of the names at start, where there is more to say than the first one."""
        lines = [f"model name: {self.name}, and any other"] if self.serves_any else []
        return lines + [f"model name: {alias} is {name}" for alias, name in self.aliases.items()]

    def token_id(self, token: int | str) -> int | None:
        """The id of a token that a request names, by id or by text; None where there is none."""
        if isinstance(token, str):
            return self.tokenizer.token_id(token)
        return token if 0 <= token < self.vocab_size else None

    def card(self, name: str) -> dict[str, Any]:
        """The entry in /v1/models of the model or an adapter, by name: OpenAI's fields, vLLM's and Anthropic's."""
        adapter = self.adapter(name)
        parent = self.aliases.get(name) if adapter is None else adapter.module.base_model_name or self.name
        created = self.created if adapter is None else adapter.created
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "octavo",
            "root": self.root if adapter is None else adapter.module.path,
            "parent": parent,
            "max_model_len": self.max_model_len,
            "type": "model",
            "display_name": name,
            "lifecycle": "active",
            "max_input_tokens": self.max_prompt_len,
            "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "x_octavo": {"ignored_hints": ALL_HINTS, "serves_any_name": self.serves_any},
        }


def checked_names(given: Sequence[str], aliases: Mapping[str, str], model: str) -> tuple[tuple[str, ...], bool]:
    """The names of --served-model-name, and whether any other name is served too. Raises ValueError for an alias of
    nothing.

    model: what the model is called where no name is given.
    """
    names = tuple(name for name in given if name != ANY_NAME) or (model,)
    wrong = next((name for name in aliases.values() if name not in names), None)
    if wrong is not None:
        raise ValueError(f"--model-aliases: {wrong!r} is not served here; {', '.join(names)} is")
    return names, ANY_NAME in given


def vocabulary_of(tokenizer: Tokenizer, end_ids: Iterable[int]) -> Vocabulary:
    """What the engine compiles grammars with; takes up to a second."""
    tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.num_tokens)]
    return Vocabulary(tokens, sorted(tokenizer.special_ids), sorted(end_ids), tokenizer.to_json())


def sampling_defaults(directory: Path, source: str, override: dict[str, float]) -> dict[str, float]:
    """Default sampling values: those of generation_config.json, replaced by those in `override`.

    source: 'auto' reads the checkpoint's generation_config.json, 'vllm' reads none, and anything else is the directory
    or the file to read instead. Raises ValueError, which names the file or the flag, for a value that no request may
    have.
    """
    defaults = {}
    if source != "vllm":
        file = generation_config_file(directory, source)
        config = read_object_if_any(file)
        if source != "auto" and not config:
            raise ValueError(
                f"--generation-config {source!r}: no generation_config.json there; 'auto' and 'vllm' are names"
            )
        defaults = {name: config[name] for name in SAMPLING_DEFAULTS if config.get(name) is not None}
        defaults = {name: value for name, value in defaults.items() if name not in override}
        _check_defaults(defaults, f"{file}", "; --generation-config vllm ignores the file")
    _check_defaults(override, "--override-generation-config", "")
    return defaults | override


def generation_config_file(directory: Path, source: str) -> Path:
    """The file that `source`, which is not 'vllm', means; see sampling_defaults."""
    path = directory if source == "auto" else Path(source)
    return path / "generation_config.json" if path.is_dir() else path


def _check_defaults(defaults: dict[str, float], where: str, remedy: str) -> None:
    try:
        GenerationRequest.model_validate(defaults)
    except ValidationError as error:
        message, _ = explain(error.errors(), defaults)
        raise ValueError(f"{where}: {message}{remedy}") from None


def end_token_ids(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """All tokens that end an answer: the tokenizer's, and those in generation_config.json or else in config.json.

    Raises ValueError, which names the file and the key, for anything that is not a token id.
    """
    generation = read_object_if_any(directory / "generation_config.json")
    config = read_object_if_any(directory / "config.json")
    text_config = config.get("text_config")
    places = [
        (directory / "generation_config.json", "eos_token_id", generation),
        (directory / "config.json", "eos_token_id", config),
        (directory / "config.json", "text_config.eos_token_id", text_config if isinstance(text_config, dict) else {}),
    ]
    ids = set()
    for file, key, content in places:
        if "eos_token_id" in content:
            ids = _token_ids(content["eos_token_id"], file, key)
            break
    if tokenizer.eos_id is not None:
        ids.add(tokenizer.eos_id)
    return frozenset(ids)


def _token_ids(value: object, file: Path, key: str) -> set[int]:
    """A token id, a list of them, or null for none."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    for token in listed:
        if type(token) is not int or not 0 <= token <= LARGEST_TOKEN_ID:
            raise ValueError(
                f"{file}: {key} is {shown(value)}; it must be a token id (an integer from 0 to "
                f"{LARGEST_TOKEN_ID}), a list of token ids, or null"
            )
    return set(listed)
