"""Every error that a client sees, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

_TYPES = {401: "authentication_error", 404: "not_found_error", 413: "invalid_request_error", 503: "overloaded_error"}
TEXT_TAG, CHAT_TAG = "<text>", "<chat>"  # which of its two kinds of body a request to /tokenize was taken for
_NOT_A_FIELD = frozenset({"body", "query", "path", "header", TEXT_TAG, CHAT_TAG})  # in pydantic's places of errors
_MAX_SHOWN = 80  # characters of a client's value that are repeated to it


class ErrorDetail(BaseModel):
    """What went wrong; `param` is the field to blame, where there is one."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorResponse(BaseModel):
    """The body of every answer that isn't a success."""

    error: ErrorDetail


class ApiError(Exception):
    """Raised anywhere under a route; becomes the response."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The response's body; also what a stream sends when it breaks off."""
        return error_body(self.status, self.message, self.param, self.code)


def bad_request(message: str, param: str | None = None) -> ApiError:
    """A 400 that blames `param`."""
    return ApiError(400, message, param=param)


def error_body(
    status: int, message: str, param: str | None = None, code: str | int | None = None
) -> dict[str, dict[str, str | int | None]]:
    """OpenAI's shape; `code` is the status where there is no better name."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status if code is None else code}}


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> Response:
    """An error as a whole response."""
    content = msgspec.json.encode(error_body(status, message, param, code))
    return Response(content, status_code=status, media_type="application/json")


RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The request is malformed, or asks for what is not supported"},
    401: {"model": ErrorResponse, "description": "The API key is missing or wrong"},
    404: {"model": ErrorResponse, "description": "No such model"},
    413: {"model": ErrorResponse, "description": "The body is too large"},
    500: {"model": ErrorResponse, "description": "The engine failed on this request"},
    503: {"model": ErrorResponse, "description": "The engine is dead, or the server is shutting down"},
}


def install(app: FastAPI) -> None:
    """Make every exception under a route an answer in this shape."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error_response(error.status, error.message, error.param, error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        message, param = explain(error.errors()[0])
        return error_response(400, message, param)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        response = error_response(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return error_response(500, f"internal error: {type(error).__name__}")


def explain(error: dict[str, Any]) -> tuple[str, str | None]:
    """(message, field) of one of pydantic's errors; a field that octavo doesn't know is named as such."""
    place = [part for part in error["loc"] if part not in _NOT_A_FIELD]
    path = ".".join(str(part) for part in place)
    param = str(place[0]) if place and isinstance(place[0], str) else None
    if error["type"] == "extra_forbidden":
        return f"{path}: octavo does not support this field, and refuses it rather than ignore it", param
    if error["type"] == "missing" and not place:
        return "the request has no JSON body (with content-type: application/json)", None
    if error["type"] == "model_attributes_type":
        return "the body must be a JSON object", None
    shown = repr(error.get("input"))
    got = f" (got {shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + '...'})"
    message = error["msg"].removeprefix("Value error, ")
    return (f"{path}: {message}{got}" if path else message), param
