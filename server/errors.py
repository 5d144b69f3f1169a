"""Every error that a client sees, in the shape of the dialect whose path it asked for.

OpenAI's, {"error": {"message", "type", "param", "code"}}, is everybody's who has none of their own.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

from octavo.server.places import deepest
from octavo.server.store import StoreError

Json = dict[str, Any]

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
TOO_LONG = "context_length_exceeded"
_short = reprlib.Repr()  # of a client's value, when it is repeated to it
_short.maxstring = _short.maxother = 80


class ErrorDetail(BaseModel):
    """What went wrong; `param` is the field to blame, where there is one."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorResponse(BaseModel):
    """The body of every answer that isn't a success."""

    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    """What went wrong, in Anthropic's words."""

    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "timeout_error",
        "request_too_large",
        "rate_limit_error",
        "overloaded_error",
        "api_error",
    ]
    message: str


class AnthropicErrorResponse(BaseModel):
    """Anthropic's shape of it."""

    type: Literal["error"]
    error: AnthropicErrorDetail


class OllamaErrorResponse(BaseModel):
    """Ollama's shape of it."""

    error: str


class ApiError(Exception):
    """Raised anywhere under a route; becomes the response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self, path: str = "") -> Json:
        """The response's body at this path; also what a stream sends when it breaks off."""
        return error_body(self.status, self.message, self.param, self.code, path)


def bad_request(message: str, param: str | None = None) -> ApiError:
    """A 400 that blames `param`."""
    return ApiError(400, message, param=param)


def interrupted() -> ApiError:
    """For dialects without a word for an answer that the server's operator has ended: clients try again after a 503."""
    return ApiError(503, "the answer was ended before it was complete (/pause, /abort_request); send the request again")


def too_long(max_model_len: int, problem: str, param: str) -> ApiError:
    """A 400 that clients take for a full context: LiteLLM and LangChain look for this code, or for these words."""
    message = f"This model's maximum context length is {max_model_len} tokens. {problem}"
    return ApiError(400, message, param=param, code=TOO_LONG)


def field_error(name: str, message: str) -> PydanticCustomError:
    """For a validator that judges several fields together: the error that blames one of them."""
    return PydanticCustomError("field", "{message}", {"message": message, "field": name})


def error_body(
    status: int, message: str, param: str | None = None, code: str | int | None = None, path: str = ""
) -> Json:
    """An error in the shape of the dialect at this path; `code` is the status where there is no better name."""
    shape = next((shape for prefix, shape in SHAPES.items() if path.startswith(prefix)), openai_error)
    return shape(status, message, param, status if code is None else code)


def openai_error(status: int, message: str, param: str | None, code: str | int) -> Json:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_error(status: int, message: str, _param: str | None, code: str | int) -> Json:
    """Anthropic's shape. Claude Code shortens its conversation where it reads that the prompt is too long."""
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    if code == TOO_LONG:
        message = f"prompt is too long: {message}"
    return {"type": "error", "error": {"type": kind, "message": message}}


def ollama_error(_status: int, message: str, _param: str | None, _code: str | int) -> Json:
    """Ollama's shape."""
    return {"error": message}


SHAPES: dict[str, Callable[[int, str, str | None, str | int], Json]] = {
    "/v1/messages": anthropic_error,
    "/api/": ollama_error,
}
"""How errors look below a path, where it isn't as OpenAI's do."""


def error_json(status: int, message: str, param: str | None = None, code: str | None = None, path: str = "") -> bytes:
    """The body as it is sent."""
    return msgspec.json.encode(error_body(status, message, param, code, path))


def error_response(
    status: int, message: str, param: str | None = None, code: str | None = None, path: str = ""
) -> Response:
    """An error as a whole response."""
    return Response(error_json(status, message, param, code, path), status_code=status, media_type="application/json")


_MEANINGS: dict[int | str, str] = {
    400: "The request is malformed, or asks for what is not supported",
    401: "The API key is missing or wrong",
    404: "No such model",
    408: "The request's time was up",
    413: "The body is too large",
    429: "Too many requests wait; Retry-After says for how long",
    500: "The engine failed on this request",
    503: "The engine is dead, or the server is shutting down",
    "default": "Any other error",
}


def _responses(shape: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """FastAPI makes a validator of each model at each route, 40 ms in all: so one entry has it, and the rest refer."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape.__name__}"}}}
    said = {status: {"description": meaning, "content": content} for status, meaning in _MEANINGS.items()}
    return said | {"default": {"description": _MEANINGS["default"], "model": shape}}


RESPONSES = _responses(ErrorResponse)
"""What OpenAPI's document says of errors, for each shape."""

ANTHROPIC_RESPONSES = _responses(AnthropicErrorResponse)
OLLAMA_RESPONSES = _responses(OllamaErrorResponse)
CLOSED: dict[int | str, dict[str, Any]] = {
    403: {"model": ErrorResponse, "description": "The server doesn't let requests do that"}
}
ANY_ERROR: dict[int | str, dict[str, Any]] = {"default": RESPONSES["default"]}


def also_as(media_type: str) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI's document says of an answer that is JSON, or a stream of this type."""
    return {200: {"description": "Successful Response", "content": {"application/json": {}, media_type: {}}}}


EVENTS = also_as("text/event-stream")


def only_as(media_type: str) -> dict[int | str, dict[str, Any]]:
    """What it says of an answer that isn't JSON; with `response_class=Response`, or errors were said to be so too."""
    return {200: {"description": "Successful Response", "content": {media_type: {}}}}


TEXT = only_as("text/plain")


_OBJECT_ERRORS = ("model_type", "model_attributes_type", "dict_type")  # pydantic tells of classes and dictionaries


def install(app: FastAPI) -> None:
    """Make every exception under a route an answer in this shape."""

    @app.exception_handler(ApiError)
    async def api_error(http: Request, error: ApiError) -> Response:
        response = error_response(error.status, error.message, error.param, error.code, http.url.path)
        response.headers.update(error.headers)
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        """Of a route that FastAPI reads; its places begin with the part of the request that is wrong."""
        source, *place = error.errors()[0]["loc"]
        body = error.body if source == "body" else {name: error.errors()[0]["input"] for name in place}
        message, param = explain([{**each, "loc": each["loc"][1:]} for each in error.errors()], body)
        return error_response(400, message, param, path=http.url.path)

    @app.exception_handler(HTTPException)
    async def http_error(http: Request, error: HTTPException) -> Response:
        response = error_response(error.status_code, str(error.detail), path=http.url.path)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(StoreError)
    async def unusable_store(http: Request, error: StoreError) -> Response:
        return error_response(500, f"the store of responses can't be used: {error}", path=http.url.path)

    @app.exception_handler(Exception)
    async def unexpected(http: Request, error: Exception) -> Response:
        return error_response(500, f"internal error: {type(error).__name__}", path=http.url.path)


def _wrong_type(error: Mapping[str, Any], path: str) -> str:
    """What is wrong with an object whose `type` says of which kind it is. Tags in angle brackets are no types."""
    value = error["input"]
    if not isinstance(value, dict):
        return f"{path}: Input should be an object (got {_short.repr(value)})"
    tags = error["ctx"].get("expected_tags", "").split(", ")
    known = ", ".join(tag for tag in tags if tag and not tag.startswith("'<"))
    supported = f"; supported: {known}" if known else ""
    if value.get("type") is None:
        return f"{path}.type: this field is missing{supported}"
    return f"{path}.type: octavo does not support the value {_short.repr(value['type'])}{supported}"


def explain(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str | None]:
    """(message, field) of what pydantic found wrong with a body; a field that octavo doesn't know is named as such."""
    error, place = deepest(errors, body)
    kind = error["type"]
    context = error.get("ctx", {})
    if kind == "field":
        return error["msg"], context["field"]
    names = [str(part) for part in place]
    path = ".".join(names)
    param = names[0] if names else None
    if kind == "extra_forbidden":
        return f"{path}: octavo does not support this field, and refuses it rather than ignore it", param
    if kind == "none_required" or (kind == "too_long" and context["max_length"] == 0):
        return f"{path}: octavo does not support this field; only null is accepted", param
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_type(error, path), param
    if kind == "literal_error":
        given = _short.repr(error.get("input"))
        supported = context["expected"].replace("False", "false").replace("True", "true")
        return f"{path}: octavo does not support the value {given}; supported: {supported}", param
    if kind == "missing":
        return (f"{path}: this field is missing" if path else "the request has no JSON body"), param
    if not names and not isinstance(error.get("input"), dict):
        return "the body must be a JSON object, sent with content-type: application/json", None
    said = "Input should be an object" if kind in _OBJECT_ERRORS else error["msg"].removeprefix("Value error, ")
    message = f"{said} (got {_short.repr(error.get('input'))})"
    return (f"{path}: {message}" if path else message), param
