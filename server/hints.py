"""The fields of requests that ask for nothing that could change the text: taken, counted, and otherwise passed over.

Clients and gateways send them to every server, for billing, tracing, caching or display. All other fields that octavo
does not know are refused. GET /v1/models lists these names for each model.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

Hint = Annotated[Any, Field(description="Taken, and passed over: it changes nothing here.")]


class OpenAIHints(BaseModel):
    """Of completions and chat completions."""

    # OpenAI's: whose request it is, what it is billed as, and where it may be kept
    user: Hint = None
    metadata: Hint = None
    store: Hint = None
    service_tier: Hint = None
    safety_identifier: Hint = None
    prompt_cache_key: Hint = None
    prompt_cache_retention: Hint = None
    # gateways' and clients' own: LiteLLM, OpenRouter, Open WebUI
    session_id: Hint = None
    chat_id: Hint = None
    message_id: Hint = None
    background_tasks: Hint = None
    features: Hint = None
    usage: Hint = None
    provider: Hint = None
    transforms: Hint = None
    route: Hint = None
    # Ollama's: how long a model stays loaded, and for how long a context
    keep_alive: Hint = None
    num_ctx: Hint = None
    # vLLM's: arguments of plug-ins, of which there are none here
    vllm_xargs: Hint = None
    kv_transfer_params: Hint = None


class PooledHints(BaseModel):
    """Of embeddings, scores and labels."""

    user: Hint = None
    metadata: Hint = None
    service_tier: Hint = None
    safety_identifier: Hint = None
    keep_alive: Hint = None


class ChatHints(OpenAIHints):
    """Of chat completions alone."""

    verbosity: Hint = None  # OpenAI's own models are told by it how much to say


class ResponsesHints(OpenAIHints):
    """Of /v1/responses, which honours some of the names above: they are no hints there. Codex sends client_metadata."""

    client_metadata: Hint = None
    # vLLM's and SGLang's; the id of a response says where it is kept, so that the server makes it
    request_id: Hint = None
    rid: Hint = None
    prompt_cache_options: Hint = None


class AnthropicHints(BaseModel):
    """Of /v1/messages. Any block and any tool may have a cache_control, which is not counted.

    context_management asks for old thoughts and results to be left out of a long conversation: for cost, and for room
    that Anthropic's models have and others don't. Nothing is left out here.
    """

    metadata: Hint = None
    cache_control: Hint = None
    context_management: Hint = None
    service_tier: Hint = None
    inference_geo: Hint = None
    speed: Hint = None
    betas: Hint = None
    user_profile_id: Hint = None
    workspace_id: Hint = None
    billing_policy: Hint = None
    fallback_credit_token: Hint = None
    fallbacks: Hint = None  # models to ask where one declines a request, which none here does
    diagnostics: Hint = None


class OllamaOptionHints(BaseModel):
    """Of the `options` of Ollama's API: how a model is loaded and placed, which is decided when octavo starts."""

    num_ctx: Hint = None
    num_batch: Hint = None
    num_gpu: Hint = None
    num_keep: Hint = None  # of a context that is shifted, which none is here
    main_gpu: Hint = None
    num_thread: Hint = None
    numa: Hint = None
    low_vram: Hint = None
    f16_kv: Hint = None
    use_mmap: Hint = None
    use_mlock: Hint = None


class OllamaHints(BaseModel):
    """Of Ollama's API. What doesn't fit into the context is refused or ends there, and nothing is cut or shifted."""

    keep_alive: Hint = None
    truncate: Hint = None
    shift: Hint = None


class NativeHints(BaseModel):
    """Of SGLang's /generate."""

    log_metrics: Hint = None
    conversation_id: Hint = None
    routed_dp_rank: Hint = None
    return_bytes: Hint = None


KINDS = (
    NativeHints,
    PooledHints,
    ChatHints,
    ResponsesHints,
    OpenAIHints,
    AnthropicHints,
    OllamaHints,
    OllamaOptionHints,
)
"""The hints of each dialect; a class stands before those that it is made of."""

PLACES: dict[type[BaseModel], str] = {OllamaOptionHints: "options."}
"""Where the fields stand that are not a request's own."""

SOMETIMES = ("anthropic-beta", "output_config.effort")
"""A header whose betas are in the fields that they bring, and a field that only some templates have a variable for."""

ALL_HINTS = sorted({*SOMETIMES, *(PLACES.get(kind, "") + name for kind in KINDS for name in kind.model_fields)})


def hints_in(body: BaseModel) -> list[str]:
    """The hints that a request has set to something."""
    known = next(kind for kind in KINDS if isinstance(body, kind)).model_fields
    own = type(body).model_fields
    hints = [name for name in body.model_fields_set if name in known and own[name].annotation is Any]
    return [name for name in hints if getattr(body, name) is not None]
