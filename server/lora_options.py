"""The options of LoRA adapters that the server needs: which are served, and who may load more."""

# No `from __future__ import annotations`: each option would be compiled again at each start, to make its flag.

from typing import Annotated

import msgspec
from msgspec import Meta


class LoraModule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter to be served: vLLM's keys. base_model_name: what /v1/models says that its parent is."""

    name: str
    path: str
    base_model_name: str = ""


class _Named(msgspec.Struct, forbid_unknown_fields=True):
    """The same with SGLang's keys. pinned: never lets go of its slot, which no adapter can be promised."""

    lora_name: str
    lora_path: str
    pinned: bool = False


def _parse_module(text: str) -> LoraModule:
    if not text.startswith("{"):
        name, _, path = text.rpartition("=")
        return LoraModule(name or path, path)  # SGLang names an adapter by its path where no name is given
    try:
        return msgspec.json.decode(text, type=LoraModule)
    except msgspec.DecodeError as error:
        found = _of_sglang(text)
        if found is None:
            raise ValueError(f"{text} is no adapter: {error}") from None
        return found


def _of_sglang(text: str) -> LoraModule | None:
    try:
        named = msgspec.json.decode(text, type=_Named)
    except msgspec.DecodeError:
        return None
    if named.pinned:
        raise ValueError(f"{text}: adapters are not pinned; one that is used keeps its slot")
    return LoraModule(named.lora_name, named.lora_path)


class LoraServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which adapters there are."""

    lora_modules: Annotated[
        tuple[LoraModule, ...],
        Meta(
            description="adapters to serve, each under a name that requests give as their model: NAME=DIRECTORY, or "
            '\'{"name": ..., "path": ..., "base_model_name": ...}\'; implies --enable-lora',
            extra={
                "group": "LoRA adapters",
                "aliases": ("--lora-paths",),
                "metavar": "NAME=DIR",
                "parse_each": _parse_module,
                "default": "none",
            },
        ),
    ] = ()
    enable_runtime_lora: Annotated[
        bool,
        Meta(
            description="let requests load and unload adapters: POST /v1/load_lora_adapter names a directory of this "
            "machine; so does VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in the environment"
        ),
    ] = False
    lora_root: Annotated[
        str | None,
        Meta(
            description="where the directories of adapters must lie, links resolved",
            extra={"metavar": "DIR", "default": "anywhere"},
        ),
    ] = None
