"""The options of `octavo serve` beside the engine's configuration; flags, help and docs are made from these structs.

See octavo/flags.py. Flags have vLLM's names; SGLang's are hidden aliases.
"""

# No `from __future__ import annotations`: each option would be compiled again at each start, to make its flag.

import json
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from octavo.flags import configuration, parse_json_object, parse_size
from octavo.quant.scheme import AT_LOAD
from octavo.server.draft_metrics import Level

FairBy = Literal["key", "user", "none"]
MAX_SERVERS = 64
RESERVED_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")  # of chat templates
SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def _parse_strings(text: str) -> tuple[str, ...]:
    """A JSON list of strings."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{text} is not JSON: {error}") from None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{text} is not a JSON list of strings")
    return tuple(values)


def _parse_sampling_values(text: str) -> dict[str, Any]:
    values = parse_json_object(text)
    if not set(values) <= set(SAMPLING_DEFAULTS):
        raise ValueError(f"{text} is not a JSON object of {', '.join(SAMPLING_DEFAULTS)}")
    return values


def _parse_aliases(text: str) -> dict[str, str]:
    values = parse_json_object(text)
    if not all(isinstance(value, str) and value for value in values.values()) or "*" in values:
        raise ValueError(f'{text} is not a JSON object of names, such as {{"claude-haiku-4-5": "my-model"}}')
    return values


def _parse_template_variables(text: str) -> dict[str, Any]:
    values = parse_json_object(text)
    reserved = [name for name in RESERVED_VARIABLES if name in values]
    if reserved:
        raise ValueError(f"{text}: {reserved[0]} is what the request itself says; name variables of the template")
    return values


def _parse_host_pattern(text: str) -> str:
    name = text.removeprefix("*.")
    if text != "*" and (not name or any(character in name for character in "*/, ")):
        raise ValueError(f"{text!r} is not a host name, *.name, or *")
    return text


class StructuredOutputsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How answers are constrained where a request doesn't say it. Keys and backends are vLLM's.

    There is one backend, llguidance, which enforces a constraint exactly or refuses it; so there is nothing to fall
    back to. enable_in_reasoning: a constraint holds from the first token on, and not behind the model's reasoning.
    """

    backend: Literal["auto", "xgrammar", "guidance", "outlines", "lm-format-enforcer"] = "auto"
    disable_fallback: bool = False
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    enable_in_reasoning: bool = False


class ReasoningConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How reasoning ends whose budget is spent: vLLM's keys. The markers themselves are the model's own.

    reasoning_start_str is taken for vLLM's sake: what begins the reasoning is known from the chat template.
    """

    reasoning_start_str: str = ""
    reasoning_end_str: str = ""


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which model, and its text side."""

    model: Annotated[
        str | None,
        Meta(
            description="a local directory, or a Hugging Face Hub id",
            extra={"group": "model", "positional": True},
        ),
    ] = None
    model_flag: Annotated[
        str | None,
        Meta(
            description="the same, as a flag",
            extra={"flag": "--model", "aliases": ("--model-path",), "metavar": "MODEL"},
        ),
    ] = None
    revision: Annotated[
        str | None,
        Meta(
            description="branch, tag or commit of a Hub id",
            extra={"metavar": "REVISION", "default": "its main branch"},
        ),
    ] = None
    download_dir: Annotated[
        str | None,
        Meta(
            description="where snapshots of Hub ids are kept, and looked for",
            extra={"metavar": "DIR", "default": "the cache of huggingface_hub"},
        ),
    ] = None
    config: Annotated[
        str | None,
        Meta(
            description="a YAML file of these options, without their dashes; the command line wins",
            extra={"metavar": "FILE"},
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        Meta(
            description="another directory's tokenizer",
            extra={"aliases": ("--tokenizer-path",), "metavar": "DIR", "default": "MODEL's"},
        ),
    ] = None
    served_model_name: Annotated[
        tuple[str, ...],
        Meta(
            description="names that requests may use; the first is the one in answers and metrics; * is any name, for "
            "clients that ask for models of their own",
            extra={"metavar": "NAME", "default": "MODEL as written"},
        ),
    ] = ()
    model_aliases: Annotated[
        dict[str, str],
        Meta(
            description='other names for served ones, such as \'{"claude-haiku-4-5": "my-model"}\'',
            extra={"metavar": "JSON", "parse": _parse_aliases, "default": "none"},
        ),
    ] = {}
    quantization: Annotated[
        str | None,
        Meta(
            description="the same as --dtype fp8, int8 or int4 (vLLM's name)",
            extra={"flag": ("-q", "--quantization"), "choices": AT_LOAD},
        ),
    ] = None


class TextOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Chat templates, and the sampling values that stand in for those that a request leaves out."""

    chat_template: Annotated[
        str | None,
        Meta(
            description="a jinja template, or a file with one",
            extra={"group": "text and sampling", "metavar": "FILE", "default": "the checkpoint's"},
        ),
    ] = None
    default_chat_template_kwargs: Annotated[
        dict[str, Any],
        Meta(
            description="variables of the chat template where a request doesn't set them, such as "
            "'{\"enable_thinking\": false}'",
            extra={"metavar": "JSON", "parse": _parse_template_variables, "default": "none"},
        ),
    ] = {}
    allowed_local_media_path: Annotated[
        str | None,
        Meta(
            description="images of requests may be file:// URLs of files below this directory",
            extra={"metavar": "DIR", "default": "requests can name no file"},
        ),
    ] = None
    tool_call_parser: Annotated[
        str | None,
        Meta(
            description="how the model writes tool calls, by vLLM's or SGLang's name for it",
            extra={"metavar": "NAME", "default": "inferred from the chat template"},
        ),
    ] = None
    reasoning_parser: Annotated[
        str | None,
        Meta(
            description="how the model writes its reasoning, by vLLM's or SGLang's name for it",
            extra={"metavar": "NAME", "default": "inferred from the chat template"},
        ),
    ] = None
    reasoning_config: Annotated[
        ReasoningConfig,
        Meta(
            description="what a model is made to say when its budget of thinking tokens is spent, before the end of "
            'its thoughts, such as \'{"reasoning_end_str": "Time is up; I answer now."}\'',
            extra={
                "metavar": "JSON",
                "parse": configuration(ReasoningConfig, "reasoning"),
                "default": "only the end itself",
            },
        ),
    ] = ReasoningConfig()
    tool_strict_level: Annotated[
        Literal["auto", "function", "parameter"],
        Meta(
            description="what of a tool call is enforced: parameter (its form, the tool's name and its arguments), "
            "function (form and name, arguments of tools with strict: true), auto (calls of requests with such tools)",
        ),
    ] = "parameter"
    trust_request_chat_template: Annotated[
        bool,
        Meta(description="let requests bring a template of their own, which is code, though sandboxed and limited"),
    ] = False
    generation_config: Annotated[
        str,
        Meta(
            description="default sampling values: auto (the checkpoint's generation_config.json), vllm (none), or a "
            "directory",
            extra={"metavar": "SOURCE"},
        ),
    ] = "auto"
    override_generation_config: Annotated[
        dict[str, Any],
        Meta(
            description="default sampling values, such as '{\"temperature\": 0.7}', before those of "
            "--generation-config",
            extra={"metavar": "JSON", "parse": _parse_sampling_values},
        ),
    ] = {}
    structured_outputs_config: Annotated[
        StructuredOutputsConfig,
        Meta(
            description="how answers are constrained, such as '{\"disable_any_whitespace\": true}'; also "
            "disable_additional_properties, enable_in_reasoning, and vLLM's backend, of which there is one, llguidance",
            extra={
                "metavar": "JSON",
                "parse": configuration(StructuredOutputsConfig, "structured outputs"),
                "default": "any JSON that the schema allows",
            },
        ),
    ] = StructuredOutputsConfig()
    max_tokens_policy: Annotated[
        Literal["refuse", "clamp"],
        Meta(
            description="max_tokens above what the context leaves, in completions and chat: refuse (400), or clamp to "
            "what it leaves, as all other dialects do",
        ),
    ] = "refuse"
    max_logprobs: Annotated[
        int,
        Meta(
            ge=-1,
            description="most logprobs that a request may ask for; -1 is the whole vocabulary",
            extra={"metavar": "N"},
        ),
    ] = 20
    stream_interval: Annotated[
        int,
        Meta(
            ge=1,
            description="new tokens that an event of a stream waits for; the first and the last come at once",
            extra={"metavar": "N"},
        ),
    ] = 1
    return_tokens_as_token_ids: Annotated[
        bool, Meta(description="log-probabilities name tokens as token_id:ID, where a request doesn't say how")
    ] = False
    per_request_spec_decode_metrics: Annotated[
        Level,
        Meta(
            description="what answers tell of their drafts, as metrics.speculative_decoding: nothing, a summary, or "
            "also what each step has checked; with --speculative-config",
        ),
    ] = "none"


class ListenOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where to listen, how long to wait, and what to log while serving."""

    host: Annotated[
        str,
        Meta(
            description="address to listen on; 0.0.0.0 is every network's", extra={"group": "HTTP", "metavar": "HOST"}
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int, Meta(ge=0, le=65535, description="port to listen on; 0 takes a free one", extra={"metavar": "PORT"})
    ] = 8000
    uds: Annotated[str | None, Meta(description="listen on a Unix socket instead", extra={"metavar": "PATH"})] = None
    api_server_count: Annotated[
        int,
        Meta(
            ge=1,
            le=MAX_SERVERS,
            description="server processes that share the port and all engines; one streams some 10,000 tokens/s",
            extra={"flag": ("-asc", "--api-server-count"), "metavar": "N"},
        ),
    ] = 1
    ssl_keyfile: Annotated[str | None, Meta(description="TLS: the private key", extra={"metavar": "FILE"})] = None
    ssl_certfile: Annotated[str | None, Meta(description="TLS: the certificate", extra={"metavar": "FILE"})] = None
    ssl_ca_certs: Annotated[str | None, Meta(description="TLS: whom to trust", extra={"metavar": "FILE"})] = None
    shutdown_timeout: Annotated[
        float,
        Meta(
            ge=0,
            le=1e9,
            description="how long requests may go on after SIGTERM; what is left then ends with an error",
            extra={"metavar": "SECONDS"},
        ),
    ] = 30.0
    engine_timeout: Annotated[
        float,
        Meta(
            ge=0.1,
            le=1e9,
            description="how long an engine process may show no sign of life, or its step not get through one layer, "
            "before it is killed and counts as dead; however long the whole step takes. Also how long the event loop "
            "of one of several server processes may not turn",
            extra={"metavar": "SECONDS"},
        ),
    ] = 20.0
    keep_alive_on_engine_death: Annotated[
        bool, Meta(description="answer 503 when the engine has died, instead of ending with exit code 1")
    ] = False
    uvicorn_log_level: Annotated[
        Literal["critical", "error", "warning", "info", "debug"],
        Meta(
            description="level of the HTTP server's log",
            extra={"group": "logs", "aliases": ("--log-level", "--log-level-http")},
        ),
    ] = "warning"
    disable_uvicorn_access_log: Annotated[bool, Meta(description="no line for each request at level info")] = False
    disable_log_stats: Annotated[bool, Meta(description="no line of statistics every ten seconds")] = False


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP side."""

    api_key: Annotated[
        tuple[str, ...],
        Meta(
            description="serve only requests with one of these keys; /health and /ping need none, nor do /metrics, "
            "/version, /docs and /openapi.json without --protect-all",
            extra={"group": "HTTP", "metavar": "KEY", "default": "OCTAVO_API_KEY, or everybody"},
        ),
    ] = ()
    protect_all: Annotated[
        bool, Meta(description="ask for a key on /metrics, /version, /docs and /openapi.json too")
    ] = False
    allowed_hosts: Annotated[
        tuple[str, ...],
        Meta(
            description="Host headers to answer to, without a port: names, *.name, or * for any",
            extra={
                "metavar": "NAME",
                "parse_each": _parse_host_pattern,
                "default": "on a loopback address localhost, 127.0.0.1, [::1] and --host, so that no web page can ask "
                "by DNS rebinding; elsewhere any",
            },
        ),
    ] = ()
    allowed_origins: Annotated[
        tuple[str, ...],
        Meta(
            description="CORS: origins whose pages may call, such as '[\"*\"]'",
            extra={"metavar": "JSON", "parse": _parse_strings, "default": "none"},
        ),
    ] = ()
    max_body_bytes: Annotated[
        int,
        Meta(description="largest request", extra={"metavar": "SIZE", "parse": parse_size, "default": "32MiB"}),
    ] = 32 << 20
    max_audio_bytes: Annotated[
        int,
        Meta(
            description="largest file of /v1/audio: OpenAI's own limit",
            extra={"metavar": "SIZE", "parse": parse_size, "default": "25MiB"},
        ),
    ] = 25 << 20
    max_audio_seconds: Annotated[
        float,
        Meta(gt=0, le=86_400, description="longest recording of /v1/audio: half an hour", extra={"metavar": "SECONDS"}),
    ] = 1800.0
    max_total_body_bytes: Annotated[
        int,
        Meta(
            description="all requests that are being received, above 64 KiB each; what exceeds it gets 503",
            extra={"metavar": "SIZE", "parse": parse_size, "default": "256MiB"},
        ),
    ] = 256 << 20
    max_queued_requests: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="answers that may wait for the engine beyond the --max-num-seqs that it computes; what exceeds "
            "them gets 429 with Retry-After",
            extra={"metavar": "N", "default": "no limit", "aliases": ("--max-num-queued-reqs",)},
        ),
    ] = None
    max_queued_tokens: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="tokens of the prompts of answers that have not begun; what exceeds them gets 429",
            extra={"metavar": "N", "default": "no limit", "aliases": ("--max-num-queued-tokens",)},
        ),
    ] = None
    queue_timeout: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="how long a request may wait for its first token, before it gets 408; a client's "
            "X-Request-Timeout limits all of its answer",
            extra={"metavar": "SECONDS", "default": "no limit"},
        ),
    ] = None
    response_store: Annotated[
        str,
        Meta(
            description="where /v1/responses keeps its responses: a file, memory, or off",
            extra={"metavar": "PLACE"},
        ),
    ] = "memory"
    response_store_size: Annotated[
        int,
        Meta(
            description="how much is kept there; what was used longest ago goes first",
            extra={"metavar": "SIZE", "parse": parse_size, "default": "256MiB"},
        ),
    ] = 256 << 20
    response_store_ttl: Annotated[
        float,
        Meta(
            gt=0, le=1e9, description="how long what is not used is kept there: 30 days", extra={"metavar": "SECONDS"}
        ),
    ] = 2592000.0
    max_sessions: Annotated[
        int,
        Meta(ge=0, description="sessions of SGLang's API that may be open, of all keys", extra={"metavar": "N"}),
    ] = 4096
    max_session_tokens: Annotated[
        int,
        Meta(
            ge=1,
            description="tokens that all of them may keep; what exceeds either gets 429",
            extra={"metavar": "N"},
        ),
    ] = 1 << 22
    session_timeout: Annotated[
        float,
        Meta(
            gt=0,
            le=1e9,
            description="how long one may be open without use: an hour; a session's own timeout may be shorter",
            extra={"metavar": "SECONDS"},
        ),
    ] = 3600.0
    batch_dir: Annotated[
        str | None,
        Meta(
            description="where /v1/files and /v1/batches keep what they have, over a restart",
            extra={"metavar": "DIR", "default": "a temporary directory"},
        ),
    ] = None
    batch_size: Annotated[
        int,
        Meta(
            description="largest total of their files; what exceeds it gets 413",
            extra={"metavar": "SIZE", "parse": parse_size, "default": "1GiB"},
        ),
    ] = 1 << 30
    batch_files: Annotated[int, Meta(ge=1, description="most files of theirs", extra={"metavar": "N"})] = 1000
    fair_by: Annotated[
        FairBy,
        Meta(
            description="who gets a fair share of the engine while requests wait: each API key, each `user` of a key, "
            "or nobody (first come, first served)"
        ),
    ] = "key"
    root_path: Annotated[
        str,
        Meta(
            description="prefix that a proxy in front strips from paths",
            extra={"metavar": "PATH", "aliases": ("--fastapi-root-path",)},
        ),
    ] = ""
    disable_fastapi_docs: Annotated[bool, Meta(description="no /docs and no /openapi.json")] = False
    ui: Annotated[bool, Meta(description="no page at /", extra={"flag": "--no-ui", "aliases": ("--no-webui",)})] = True
    enable_log_requests: Annotated[
        bool,
        Meta(
            description="a line for each request, without its text",
            extra={"group": "logs", "aliases": ("--log-requests",)},
        ),
    ] = False
