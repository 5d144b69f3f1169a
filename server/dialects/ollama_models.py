"""Ollama's /api about models: the one that is served, and what a server of one model can't do.

Ollama keeps a store of models, and loads them as they are asked for. octavo serves the model that it was started with,
so what would change the store is answered with 501 and the command that does it.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from octavo.server.dialects.fields import Flag, Open, Text
from octavo.server.dialects.thinking import can_think
from octavo.server.encoding import JsonResponse, encode_json
from octavo.server.errors import OLLAMA_RESPONSES, ApiError, bad_request
from octavo.server.fim import fim_of
from octavo.server.served_model import ServedModel
from octavo.server.service import Service
from octavo.server.strict_json import StrictRoute
from octavo.version import VERSION

SPOKEN = "0.12.6"
"""The version of Ollama whose API this is; clients ask for it to know what they may send."""

NEVER = "9999-12-31T23:59:59Z"
LATEST = ":latest"
Json = dict[str, Any]

_ELSEWHERE = {
    "pull": "this server serves the model that it was started with; `octavo serve OWNER/MODEL` fetches one from the "
    "Hugging Face Hub",
    "push": "this server uploads nothing; `hf upload OWNER/MODEL DIRECTORY` does",
    "create": "this server makes no models; `octavo quantize MODEL` makes a quantized one, and `--chat-template FILE` "
    "gives a model another template",
    "delete": "this server deletes nothing; `hf cache rm` clears fetched models, and `rm -r` directories",
    "copy": "this server copies nothing; `--model-aliases JSON` gives its model further names",
    "blobs": "this server stores no files",
}


class ShowRequest(Open):
    """POST /api/show."""

    model: Text | None = None
    name: Text | None = None
    verbose: Flag | None = None


class OllamaRoute(StrictRoute):
    """Ollama's clients don't say that what they send is JSON."""

    any_content_type = True


def plain_name(name: str, model: ServedModel) -> str:
    """A model's name without the tag that Ollama's clients put behind it."""
    return name if name in model.all_names else name.removesuffix(LATEST)


def routes(service: Service) -> APIRouter:
    """/api/version, tags, ps, show, and what can't be done here."""
    router = APIRouter(route_class=OllamaRoute, responses=OLLAMA_RESPONSES)
    model = service.model

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def alive() -> Response:
        """Ollama's command, and programs on a desktop, ask so whether a server is there."""
        return PlainTextResponse("Ollama is running")  # the words that they look for

    @router.api_route("/api/version", methods=["GET", "HEAD"])
    async def version() -> Response:
        """The version of Ollama's API, and octavo's."""
        return JsonResponse(encode_json({"version": SPOKEN, "octavo": VERSION}))

    @router.api_route("/api/tags", methods=["GET", "HEAD"])
    async def tags() -> Response:
        """The models that there are."""
        return JsonResponse(encode_json({"models": [_entry(name, model) for name in model.all_names]}))

    @router.get("/api/ps")
    async def ps() -> Response:
        """The models that are loaded: the one that is served, for as long as it is."""
        on_gpu = model.report is not None and not model.report.device.startswith("cpu")
        loaded = {"expires_at": NEVER, "size_vram": _num_bytes(model) if on_gpu else 0}
        entry = _entry(model.name, model) | loaded | {"context_length": model.max_model_len}
        return JsonResponse(encode_json({"models": [entry]}))

    @router.post("/api/show")
    async def show(body: ShowRequest, http: Request) -> Response:
        """What is known of a model."""
        del http
        name = body.model or body.name
        if name is None:
            raise bad_request("model: this field is missing", "model")
        service.check_name(plain_name(name, model))
        return JsonResponse(encode_json(_shown(model)))

    for path, methods in (
        ("pull", ["POST"]),
        ("push", ["POST"]),
        ("create", ["POST"]),
        ("delete", ["DELETE"]),
        ("copy", ["POST"]),
    ):
        _refuse(router, f"/api/{path}", methods, _ELSEWHERE[path])
    _refuse(router, "/api/blobs/{digest}", ["POST", "HEAD"], _ELSEWHERE["blobs"])
    return router


def _refuse(router: APIRouter, path: str, methods: list[str], why: str) -> None:
    async def refused() -> Response:
        raise ApiError(501, why)

    router.add_api_route(path, refused, methods=methods, include_in_schema=False)


def _entry(name: str, model: ServedModel) -> Json:
    """A model in a list. The digest stands for the model's name: its files are not read for it."""
    return {
        "name": name,
        "model": name,
        "modified_at": datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "size": _num_bytes(model),
        "digest": hashlib.sha256(model.root.encode()).hexdigest(),
        "details": _details(model),
    }


def _details(model: ServedModel) -> Json:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": _family(model),
        "families": [_family(model)],
        "parameter_size": "",
        "quantization_level": _scheme(model),
    }


def _num_bytes(model: ServedModel) -> int:
    return 0 if model.report is None else model.report.weight_bytes


def _family(model: ServedModel) -> str:
    """The architecture as Ollama writes it: llama."""
    return "" if model.report is None else model.report.architecture.partition("For")[0].lower()


def _scheme(model: ServedModel) -> str:
    """In what most layers are stored."""
    schemes = [] if model.report is None else [scheme for _, scheme, _ in model.report.layers]
    return max(schemes, key=schemes.count, default="")


def _shown(model: ServedModel) -> Json:
    found = model.formats.found
    family = _family(model)
    capabilities = ["completion"] if model.pooled is None else ["embedding"]
    if model.speech is not None:  # Ollama has no word for it
        capabilities = []
    if found.tools is not None:
        capabilities.append("tools")
    if can_think(model):
        capabilities.append("thinking")
    if fim_of(model) is not None:
        capabilities.append("insert")
    return {
        "modelfile": f"# served by octavo {VERSION}\nFROM {model.root}\n",
        "parameters": "\n".join(f"{name} {value}" for name, value in model.defaults.items()),
        "template": model.renderer.template.templates.get("default", ""),
        "details": _details(model),
        "model_info": {
            "general.architecture": family,
            "general.basename": model.name,
            f"{family}.context_length": model.max_model_len,
            f"{family}.vocab_size": model.vocab_size,
        },
        "capabilities": capabilities,
        "modified_at": datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
