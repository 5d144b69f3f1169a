"""Which of a checkpoint's weights are linear layers' in transformers' code of it: for quantizing what has no code here.

The model is made on the meta device, without weights, and no code of the checkpoint's own is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.model.hf.attention import describe

MOST_MODULES = 4096  # layers or experts that are made without as many tensors in the files
COUNTED = re.compile(r"layer|expert|block")


@dataclass(frozen=True)
class LinearModules:
    """The linear layers of a model by their full names, as the files have them.

    architecture  the class of the model
    kept          of the class Linear, too, but not to be quantized: the head, routers, and those whose code reads the
                  weight itself, which compressed-tensors takes away (FalconLinear, torch's MultiheadAttention)
    """

    architecture: str
    names: frozenset[str]
    kept: frozenset[str]


class NotFoundError(ValueError):
    """A model whose modules can't be told; the message says why."""


def find_linear_modules(checkpoint: Checkpoint) -> LinearModules:
    """The modules of the class that config.json names. Raises NotFoundError."""
    from torch import nn

    model, head = _on_meta(checkpoint)
    prefix = f"{model.base_model_prefix}."
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    stored = {name: _stored(name, prefix, checkpoint) for name in modules}
    experts = set(_counts(model.config.to_dict(), re.compile("expert")))
    kept = {
        name
        for name, module in modules.items()
        if module is head or type(module).forward is not nn.Linear.forward or module.out_features in experts
    }
    kept |= {f"{name}.out_proj" for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    if missing := sorted(name for name in modules.keys() - kept if stored[name] is None):
        raise NotFoundError(
            f"{type(model).__name__} has {len(missing)} linear layers that the files don't have by these names, such "
            f"as {missing[0]}"
        )
    for name in sorted(modules.keys() - kept):
        spec = checkpoint.spec(f"{stored[name]}.weight")
        if tuple(spec.shape) != tuple(modules[name].weight.shape):
            raise NotFoundError(
                f"{stored[name]}.weight is {list(spec.shape)}, and {type(model).__name__} has "
                f"{list(modules[name].weight.shape)}"
            )
    return LinearModules(
        type(model).__name__,
        frozenset(found for name, found in stored.items() if name not in kept and found is not None),
        frozenset(stored.get(name) or name for name in kept),
    )


def _stored(name: str, prefix: str, checkpoint: Checkpoint) -> str | None:
    """A module's name in the files, which may be those of the model within; None: they don't have it."""
    names = (name, name.removeprefix(prefix), f"{prefix}{name}")
    return next((found for found in names if f"{found}.weight" in checkpoint.names), None)


def _on_meta(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The model without weights, and its head, if it has one. Raises NotFoundError."""
    import transformers

    most = max(MOST_MODULES, len(checkpoint.names))
    if any(count > most for count in _counts(checkpoint.config, COUNTED)):
        raise NotFoundError(f"config.json has more than {most:,} layers or experts")
    name = str((checkpoint.config.get("architectures") or [""])[0])
    version = f"transformers {transformers.__version__}"
    try:
        kind = getattr(transformers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise NotFoundError(f"{version} has no {name or 'architecture'} of this name")
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.directory, trust_remote_code=False, local_files_only=True
        )
        with torch.device("meta"):
            model = kind(config)
        return model, model.get_output_embeddings()
    except NotFoundError:
        raise
    except Exception as error:  # raised by code that octavo doesn't know, so of any type
        raise NotFoundError(f"{version} can't make {name} of config.json ({describe(error)})") from error


def _counts(config: Mapping[str, Any], key: re.Pattern[str]) -> Iterator[int]:
    """The numbers under keys of a config that a pattern finds, at any depth."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value, key)
        elif type(value) is int and key.search(str(name)):
            yield value
