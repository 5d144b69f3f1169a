"""Everything that is checked and planned before a quantization writes its first byte, as one value.

`open_source` and `plan_model` need no calibration text: they find at once what is wrong with source, output and recipe.
`complete` adds the text and checks what depends on it. `quantize_model` takes the result and checks nothing again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.calibration.auxiliary_files import other_files
from octavo.calibration.block import Runner
from octavo.calibration.head import is_tied, with_own_head
from octavo.calibration.hidden_states_file import Shape
from octavo.calibration.layers import QuantizeError
from octavo.calibration.output import quantization_config
from octavo.calibration.plan import Plan, make_plan, source_digest
from octavo.calibration.preflight import Estimate, estimate
from octavo.calibration.recipe import Recipe, to_json
from octavo.calibration.text.data import CalibrationData
from octavo.calibration.workspace import check_output, check_space, recover
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.dequantized import open_dequantized
from octavo.quant.model_layout import NO_LAYOUTS, Layouts
from octavo.version import VERSION

MAX_STARTS = 1024  # tokens that tuning sees as the first of a text
SMALL_FILES = 64_000_000  # bytes of what is copied beside the weights, at most


@dataclass(frozen=True)
class Calibration:
    """The inputs of algorithms that use data: text as token ids, and the model block by block.

    offload_dir  where hidden states are kept while the run lasts; None: beside the output
    num_workers  processes that share the samples; as many others add sums up in another order
    """

    data: CalibrationData
    runner: Runner
    offload_dir: Path | None = None
    num_workers: int = 1

    @cached_property
    def token_ids(self) -> Tensor:
        """int64 [num_samples, seq_len]."""
        return torch.stack(self.data.samples)

    @cached_property
    def starts(self) -> Tensor | None:
        """int64 [N, 1]: the text's most frequent tokens, as sequences of one; None where every text begins alike."""
        first = self.token_ids[:, 0]
        if not self.runner.is_causal or bool((first == first[0]).all()):
            return None
        counts = torch.bincount(self.token_ids.flatten())
        used = counts.argsort(descending=True, stable=True)[: int(counts.count_nonzero())]
        return used[:MAX_STARTS].unsqueeze(1)

    def sequences(self, recipe: Recipe) -> dict[str, Tensor]:
        """The token ids whose hidden states go from block to block, by the name of the states: through the model as
        quantized so far, and where an algorithm tunes also through the original.
        """
        found = {"hidden": self.token_ids}
        if recipe.tunes:
            found["original"] = self.token_ids
            if self.starts is not None:
                found |= {"starts": self.starts, "original-starts": self.starts}
        return found

    def shape(self, sequences: Tensor) -> Shape:
        """Shape of the hidden states of some token ids between two blocks."""
        num_samples, seq_len = sequences.shape
        return Shape(num_samples, seq_len, self.runner.hidden_size, self.runner.dtype)

    def hidden_nbytes(self, recipe: Recipe) -> int:
        """The hidden states between two blocks."""
        return sum(self.shape(sequences).nbytes for sequences in self.sequences(recipe).values())


@dataclass(frozen=True)
class Prepared:
    """A quantization that was checked and planned. calibration: None where the recipe needs none."""

    checkpoint: Checkpoint
    out: Path
    recipe: Recipe
    plan: Plan
    other_files: Mapping[str, Path]  # that go along beside the weights
    max_shard_bytes: int
    overwrite: bool
    resume: bool
    calibration: Calibration | None = None
    text: CalibrationData | None = None  # that was looked at, also where it only chose the recipe
    notes: tuple[str, ...] = ()  # for the report
    seconds: Mapping[str, float] = field(default_factory=dict)  # that preparing took, by phase

    @cached_property
    def estimate(self) -> Estimate:
        """The memory, disk and time that it will take."""
        if self.calibration is None:
            return estimate(self.plan, self.recipe, 0, 0)
        hidden_nbytes = self.calibration.hidden_nbytes(self.recipe)
        return estimate(self.plan, self.recipe, self.calibration.token_ids.numel(), hidden_nbytes)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the result, for the manifest; a run resumes only work with the same identity."""
        data = None if self.calibration is None else self.calibration.data
        return {
            "source": source_digest(self.checkpoint),
            "recipe": to_json(self.recipe),
            "shards": {name: len(specs) for name, specs in self.plan.shards.items()},
            "data": data and {"fingerprint": data.fingerprint, "samples": len(data.samples), "tokens": data.num_tokens},
            "versions": {"octavo": VERSION, "torch": torch.__version__},
            "workers": 1 if self.calibration is None else self.calibration.num_workers,
        }


def prepare(
    source: Path,
    out: Path,
    recipe: Recipe,
    *,
    calibration: Calibration | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    resume: bool = False,
    layouts: Layouts = NO_LAYOUTS,
) -> Prepared:
    """Check and plan a quantization of the checkpoint in `source` whose text is there already.

    Algorithm auto is rtn without calibration.
    Raises QuantizeError, CheckpointError or OSError; nothing but the output's parent directory has been made then.
    """
    if recipe.rotations:
        raise QuantizeError("rotations need a model's wiring, which `octavo.quantize` has: it folds them in beforehand")
    recipe = recipe.resolved(calibrates=calibration is not None)
    checkpoint = open_source(source, out, overwrite=overwrite, resume=resume, layouts=layouts)
    planned = plan_model(checkpoint, out, recipe, max_shard_bytes=max_shard_bytes, overwrite=overwrite, resume=resume)
    return complete(planned, recipe, calibration)


def open_source(source: Path, out: Path, *, overwrite: bool, resume: bool, layouts: Layouts = NO_LAYOUTS) -> Checkpoint:
    """The original checkpoint, once `out` may be written; layouts as of `Checkpoint.open`.

    One that is quantized already is the model that its numbers stand for. Raises QuantizeError or CheckpointError.
    """
    recover(out)
    check_output(source, out, overwrite, resume)
    return open_dequantized(source, layouts)


def plan_model(
    checkpoint: Checkpoint, out: Path, recipe: Recipe, *, max_shard_bytes: int, overwrite: bool, resume: bool
) -> Prepared:
    """Everything but what depends on calibration text."""
    if recipe.lm_head is not None or (recipe.embedding is not None and is_tied(checkpoint)):
        checkpoint = with_own_head(checkpoint)
    plan = _plan(checkpoint, recipe, max_shard_bytes)
    files = other_files(checkpoint.directory)
    return Prepared(checkpoint, out, recipe, plan, files, max_shard_bytes, overwrite, resume)


def complete(planned: Prepared, recipe: Recipe, calibration: Calibration | None) -> Prepared:
    """Add the text, and perhaps another recipe that was made with it; check that the disk holds all."""
    if recipe.needs_data and calibration is None:
        raise QuantizeError(f"{recipe.algorithm} with scheme {recipe.scheme} needs calibration text")
    plan = planned.plan
    if recipe != planned.recipe:
        plan = _plan(planned.checkpoint, recipe, planned.max_shard_bytes)
    prepared = replace(planned, recipe=recipe, plan=plan, calibration=calibration)
    _check_disk(prepared)
    return prepared


def _plan(checkpoint: Checkpoint, recipe: Recipe, max_shard_bytes: int) -> Plan:
    """The plan, whose schemes the output format's config can say."""
    plan = make_plan(checkpoint, recipe, max_shard_bytes)
    try:
        quantization_config(recipe, plan.schemes, plan.selection.ignore)
    except ValueError as e:
        raise QuantizeError(f"format {recipe.format}: {e}") from e
    return plan


def _check_disk(prepared: Prepared) -> None:
    """Refuse what doesn't fit on the disk: the result, and the hidden states before and behind a block."""
    parent = prepared.out.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    needs = {parent: int(prepared.plan.bytes_after * 1.01) + SMALL_FILES}
    if prepared.calibration is not None:
        offload_dir = prepared.calibration.offload_dir or parent
        if not offload_dir.is_dir():
            raise QuantizeError(f"--offload-dir {offload_dir} is not a directory that is there; make it first")
        needs[offload_dir] = needs.get(offload_dir, 0) + 2 * prepared.calibration.hidden_nbytes(prepared.recipe)
    check_space(needs)
