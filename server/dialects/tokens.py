"""POST /tokenize and /detokenize: vLLM's routes between text and token ids."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Body, Request
from fastapi.responses import Response
from pydantic import BaseModel, Discriminator, Field, Tag

from octavo.server.dialects.conversation import ChatOptions, chat_token_ids, images_of, render_request, rendered
from octavo.server.dialects.fields import MAX_TOKENS_SENT, Flag, Strict, Text, TokenId
from octavo.server.dialects.tools import Tools, as_functions, templated
from octavo.server.encoding import JsonResponse, encode_json
from octavo.server.errors import RESPONSES
from octavo.server.media.prompt import ReadImage
from octavo.server.prompts import encode, in_vocabulary
from octavo.server.served_model import ServedModel
from octavo.server.service import Service
from octavo.server.strict_json import StrictRoute


class TokenizeCompletionRequest(Strict):
    """POST /tokenize with a text."""

    model: Text | None = None
    prompt: Text
    add_special_tokens: Flag = True
    return_token_strs: Flag | None = None


class TokenizeChatRequest(ChatOptions):
    """POST /tokenize with messages."""

    model: Text | None = None
    tools: Tools | None = None
    return_token_strs: Flag | None = None


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: Text | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS_SENT, fail_fast=True)]


def _kind_of_text(body: object) -> str:
    return "<chat>" if isinstance(body, dict) and "messages" in body else "<text>"


TokenizeRequest = Annotated[
    Annotated[TokenizeCompletionRequest, Tag("<text>")] | Annotated[TokenizeChatRequest, Tag("<chat>")],
    Discriminator(_kind_of_text),
]


class TokenizeResponse(BaseModel):
    """vLLM's shape."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    """vLLM's shape."""

    prompt: str


def routes(service: Service) -> APIRouter:
    """/tokenize and /detokenize."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)
    model = service.model

    @router.post("/v1/tokenize", response_model=TokenizeResponse, include_in_schema=False)  # SGLang's names
    @router.post("/tokenize", response_model=TokenizeResponse)
    async def tokenize(body: Annotated[TokenizeRequest, Body()], http: Request) -> Response:
        """The token ids of a text, or of the prompt that the chat template makes of messages."""
        service.check_name(body.model)
        text = None
        images: list[ReadImage] = []
        if isinstance(body, TokenizeChatRequest):
            images = await images_of(body, model)
            tools = templated(as_functions(body.tools or []), model)
            asked = await service.off_loop(http, partial(render_request, body, model, None, tools))
            text = await rendered(asked, model)
        return JsonResponse(await service.off_loop(http, lambda: _tokenized(body, text, images, model)))

    @router.post("/v1/detokenize", response_model=DetokenizeResponse, include_in_schema=False)
    @router.post("/detokenize", response_model=DetokenizeResponse)
    async def detokenize(body: DetokenizeRequest, http: Request) -> Response:
        """The text of these token ids, special tokens written out."""
        service.check_name(body.model)
        return JsonResponse(await service.off_loop(http, lambda: _detokenized(body, model)))

    return router


def _tokenized(
    body: TokenizeCompletionRequest | TokenizeChatRequest,
    chat_text: str | None,
    images: list[ReadImage],
    model: ServedModel,
) -> bytes:
    """The answer to /tokenize; chat_text is what the chat template made of a TokenizeChatRequest."""
    if isinstance(body, TokenizeChatRequest):
        assert chat_text is not None
        ids = chat_token_ids(chat_text, body, model, images, must_fit=False)
    else:
        ids = encode(body.prompt, "prompt", model, add_special_tokens=body.add_special_tokens, must_fit=False)
    strings = [model.tokenizer.token_name(token_id) for token_id in ids] if body.return_token_strs else None
    return encode_json({"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids, "token_strs": strings})


def _detokenized(body: DetokenizeRequest, model: ServedModel) -> bytes:
    in_vocabulary(body.tokens, "tokens", model)
    return encode_json({"prompt": model.tokenizer.decode(body.tokens)})
