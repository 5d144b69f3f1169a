"""An optional field that is null is as one that is left out, in every object of every request."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

import octavo.server.app  # noqa: F401  (which imports the requests of all dialects)
from octavo.server.dialects.fields import RequestObject


def subclasses(kind: type[BaseModel]) -> set[type[BaseModel]]:
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


KINDS = sorted(subclasses(RequestObject), key=lambda kind: (kind.__module__, kind.__name__))


def blamed(kind: type[BaseModel], fields: dict[str, Any]) -> set[object]:
    """The fields that errors are about; what is missing, or wrong in all of it, is no error of one of these."""
    try:
        kind.model_validate(fields)
    except ValidationError as error:
        return {each["loc"][0] for each in error.errors() if each["loc"] and each["loc"][0] in fields}
    return set()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}")
def test_any_optional_field_may_be_null(kind: type[BaseModel]) -> None:
    optional = [field.alias or name for name, field in kind.model_fields.items() if not field.is_required()]
    assert blamed(kind, dict.fromkeys(optional)) == set()


def test_every_body_of_a_route_is_covered(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    names = {kind.__name__ for kind in KINDS}
    bodies = [
        route["requestBody"]["content"]["application/json"]["schema"]
        for methods in document["paths"].values()
        for route in methods.values()
        if "application/json" in route.get("requestBody", {}).get("content", {})
    ]
    options = [option for body in bodies for option in body.get("oneOf", body.get("anyOf", [body]))]
    found = {option["$ref"].rpartition("/")[2].rpartition("__")[2] for option in options if "$ref" in option}
    assert len(found) > 10
    assert found <= names


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "The", "max_tokens": 1, "add_special_tokens": None, "min_tokens": None}),
        ("/v1/completions", {"prompt": "The", "max_tokens": 1, "ignore_eos": None, "skip_special_tokens": None}),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "Hi"}],
                "max_tokens": 1,
                "echo": None,
                "add_generation_prompt": None,
                "continue_final_message": None,
            },
        ),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 1, "include_stop_str_in_output": None}),
        ("/generate", {"text": "The", "stream": None, "sampling_params": {"max_new_tokens": 1, "stop": None}}),
        ("/tokenize", {"prompt": "The", "add_special_tokens": None}),
        ("/api/generate", {"model": "tiny", "prompt": "The", "raw": None, "options": {"num_predict": 1}}),
    ],
)
def test_the_server_takes_them(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    assert client.post(path, json=body).status_code == 200
