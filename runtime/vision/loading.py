"""A checkpoint's tower with its weights.

A model whose tower or preprocessing isn't known here is served without images, with a note that says why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.quant.checkpoint import read_config
from octavo.quant.kernel_table import note_departures
from octavo.quant.target import Target
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.sources import CheckpointSource, LoadError, some
from octavo.runtime.vision.kinds import MAKERS, vision_model_of
from octavo.runtime.vision.linears import packed_linears, put_in_place, spellings, tower_target
from octavo.runtime.vision.preprocessing import Preprocessing, UnreadImagesError
from octavo.runtime.vision.towers import VisionTower

MOST_LAYERS = 1000
COUNTS_LAYERS = re.compile("layers?$|depth")
MOST_SIZE = 1 << 28  # of whatever else a tower's config counts
MOST_COMPUTED = 1 << 28  # bytes of what a tower computes at start, such as frequencies


def tower_of(
    config: EngineConfig,
    source: CheckpointSource,
    dtype: torch.dtype,
    device: torch.device,
    notes: list[str],
    *,
    generates: bool,
) -> VisionTower | None:
    """The tower of a vision checkpoint; None: its type is not known here, or images are not read, as a note says.

    generates: the model does. For the driver of an engine alone. Raises LoadError.
    """
    if read_config(Path(config.model)).get("model_type") not in MAKERS:
        return None
    most = config.limit_mm_per_prompt.image
    try:
        if most == 0:
            raise UnreadImagesError("--limit-mm-per-prompt allows no image")
        if not generates:
            raise UnreadImagesError("models that generate nothing read none here")
        if (stages := config.parallel.pipeline_parallel_size) > 1:
            raise UnreadImagesError(f"-pp {stages}: the stage with the embedding has no tower; -tp works")
        if device.type != "cpu":
            raise UnreadImagesError(
                "no GPU has read one yet, and its memory is planned without; --device cpu reads them"
            )
        tower = load_tower(Path(config.model), source, dtype, device, most)
        tokens = tower.facts.most_at_once
        if config.max_num_batched_tokens < tokens:
            raise UnreadImagesError(
                f"--max-num-batched-tokens {config.max_num_batched_tokens}: an image's {tokens} tokens see each other, "
                "and are computed in one step"
            )
        if config.deterministic and tower.facts.sees_ahead:
            raise UnreadImagesError("--deterministic: attention to an image's later tokens is not batch-invariant")
    except UnreadImagesError as error:
        notes.append(f"images are not read: {error}")
        return None
    parts = [part for linear in tower.linears.values() for part in linear.parts]
    note_departures((part.choice for part in parts), notes)
    return tower


def load_tower(
    directory: Path, source: CheckpointSource, dtype: torch.dtype, device: torch.device, most_images: int
) -> VisionTower:
    """A checkpoint's tower. Raises UnreadImagesError, and LoadError for weights that don't make it."""
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    given = Preprocessing(directory)
    with _refusing():
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        _check_sizes(config)
        facts, made = vision_model_of(config, given, most_images)
        with torch.device("meta"), no_init_weights():
            without_memory = made(config)
    linears = packed_linears(without_memory, source, tower_target(Target.of(device, dtype)))
    put_in_place(without_memory, linears)
    weights = _weights(without_memory, source, dtype)
    with _refusing(), no_init_weights():
        module = made(config)
    put_in_place(module, linears)
    module.load_state_dict(weights, assign=True)
    tower = VisionTower(facts, module.to(device), given.mean, given.std, linears)
    if problem := tower.problem(config.get_text_config().hidden_size):
        raise UnreadImagesError(f"the tower can't see an image: {problem}")
    return tower


@contextmanager
def _refusing() -> Iterator[None]:
    """Raise UnreadImagesError for errors of transformers' code, of any type, where numbers mean nothing to it."""
    try:
        yield
    except UnreadImagesError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())
        raise UnreadImagesError(f"config.json makes no tower: {type(error).__name__}: {why}") from error


def _check_sizes(config: Any) -> None:
    """Raise UnreadImagesError for a tower that no machine holds, before transformers begins to make it."""
    for key, value in _numbers("vision_config", config.vision_config.to_dict()):
        most = MOST_LAYERS if COUNTS_LAYERS.search(key) else MOST_SIZE
        if not abs(value) <= most:
            raise UnreadImagesError(f"vision_config: {key} {value}; {most} is the most")
    for key in ("image_token_id", "boi_token_index"):
        if not 0 <= getattr(config, key, 0) < config.get_text_config().vocab_size:
            raise UnreadImagesError(f"config.json: {key} {getattr(config, key)} is no token of the vocabulary")


def _numbers(key: str, value: object) -> Iterator[tuple[str, float]]:
    """All numbers in a config, with the keys under which they stand. Raises UnreadImagesError for a long list: some
    have a module for each.
    """
    match value:
        case dict():
            for name, one in value.items():
                yield from _numbers(str(name), one)
        case list() | tuple():
            if len(value) > MOST_LAYERS:
                raise UnreadImagesError(f"vision_config: {key} has {len(value)} values; {MOST_LAYERS} are the most")
            for one in value:
                yield from _numbers(key, one)
        case int() | float():
            yield key, value


def _weights(module: nn.Module, source: CheckpointSource, dtype: torch.dtype) -> dict[str, Tensor]:
    """The checkpoint's weights of a tower, in this type; those of layers that are quantized, and no linear ones,
    dequantized. What it computes at start itself, such as frequencies, is not among them.

    module: the tower on torch's meta device: its sizes are the config's, and are checked before they take memory.
    Raises UnreadImagesError and LoadError.
    """
    wanted = module.state_dict()
    computed = sum(buffer.nbytes for name, buffer in module.named_buffers() if name not in wanted)
    if computed > MOST_COMPUTED:
        raise UnreadImagesError(
            f"config.json: the tower computes {computed >> 20} MiB at start; {MOST_COMPUTED >> 20} are the most"
        )
    weights = {}
    missing = []
    for name, parameter in wanted.items():
        found = next((one for one in spellings(name) if source.has(one.rpartition(".")[0])), None)
        if found is None:
            missing.append(name)
            continue
        owner, _, kind = found.rpartition(".")
        if kind == "weight" and source.is_quantized(owner):
            weight, _ = source.dense(owner, *parameter.shape)
        else:
            weight = source.tensor(found, tuple(parameter.shape))
        weights[name] = weight.to(dtype, copy=True)
    if missing:
        raise LoadError(f"the checkpoint has no weights for {some(missing)} of the vision tower")
    return weights
