"""Whether a checkpoint is one that can be quantized as asked, by its config and its tensors' names and shapes."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

from octavo.calibration.layers import QuantizeError
from octavo.calibration.recipe import Recipe
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.model_layout import ModelLayout
from octavo.runtime.model.blocks import why_uncalibrated
from octavo.runtime.model.config_types import ModelConfigError
from octavo.runtime.model.encdec_spec import EncDecSpec
from octavo.runtime.model.encoder_spec import EncoderSpec, UnsupportedEncoderError
from octavo.runtime.model.families.registry import SPEECH
from octavo.runtime.model.families.translating import Stack
from octavo.runtime.model.inventory import check_dense
from octavo.runtime.model.rope import RopeError
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.spec import UnsupportedModelError
from octavo.runtime.model.speech_spec import SpeechSpec

_WHAT = {
    "encoder": "is an encoder",
    "speech": "hears, and is calibrated on no text",
}
_WITHOUT = "algorithm rtn with a scheme whose activations are dynamic, such as W4A16 or W8A8, needs no calibration"


class Checked(NamedTuple):
    """notes: for the report. uncalibrated: why blocks of a decoder that octavo knows can't be run; None: they can."""

    notes: list[str]
    uncalibrated: str | None


def check_options(recipe: Recipe, layout: ModelLayout, *, measures: bool) -> None:
    """Refuse what is done with decoders alone. measures: layers' sensitivity. Raises QuantizeError."""
    if layout.is_decoder:
        return
    kind = "an encoder" if layout.is_encoder else "an encoder-decoder" if layout.reads_text else "a speech model"
    if measures:
        raise QuantizeError(
            f"the sensitivity of {kind}'s layers isn't measured, so that no target can choose its schemes; --scheme "
            "says one for all, and a recipe's layers others"
        )
    if recipe.kv is not None:
        raise QuantizeError(f"kv_cache: {kind}'s keys and values aren't measured; leave it out")
    if recipe.rotations:
        raise QuantizeError(f"rotations: {kind} isn't rotated; leave them out")
    if recipe.lm_head is not None:
        raise QuantizeError(f"lm_head: {kind}'s stays as it is, or it has none; leave it out")


def check_source(checkpoint: Checkpoint, *, runs_blocks: bool, max_kl: float | None = None) -> Checked:
    """Refuse an incomplete model before anything is done, and a limit of what isn't measured of it.

    runs_blocks: the job does, as calibration has it. The layout of a model without code here gets the linear layers
    that transformers' code has.
    """
    is_speech = checkpoint.config.get("model_type") in SPEECH
    uncalibrated = None
    try:
        layout = checkpoint.layout
        if max_kl is not None and not layout.is_decoder:
            raise QuantizeError(
                f"--max-kl {max_kl:g}: a KL is measured of decoders alone, and this is none; leave it out"
            )
        if layout.is_decoder:
            uncalibrated = why_uncalibrated(check_dense(checkpoint))
            if runs_blocks and uncalibrated is not None:
                raise QuantizeError(f"{uncalibrated}; {_WITHOUT}")
        elif runs_blocks and not layout.is_calibrated:
            kind = "encoder" if layout.is_encoder else "speech"
            raise QuantizeError(f"calibration runs a decoder's blocks, and this model {_WHAT[kind]}; {_WITHOUT}")
        elif layout.is_encoder:
            EncoderSpec.from_hf(checkpoint.config)
        elif is_speech:
            SpeechSpec.from_hf(checkpoint.config)
        else:
            _check_layers(checkpoint, EncDecSpec.from_hf(checkpoint.config))
    except (UnsupportedModelError, UnsupportedEncoderError, RopeError) as e:
        if runs_blocks:
            raise QuantizeError(
                f"calibration runs the model block by block, which this one can't be: {e}; {_WITHOUT}"
            ) from e
        return Checked([_linears_by_use(checkpoint, str(e))], None)
    except (LoadError, ModelConfigError) as e:
        raise QuantizeError(f"{checkpoint.directory.name} is not a whole model: {e}") from e
    return Checked([], uncalibrated)


def _check_layers(checkpoint: Checkpoint, spec: EncDecSpec) -> None:
    """Raise LoadError where a stack of an encoder-decoder lacks a layer, or has more than its config says."""
    stacks: tuple[tuple[Stack, int], ...] = (
        ("encoder", spec.encoder.num_layers),
        ("decoder", spec.decoder.num_layers),
    )
    for stack, count in stacks:
        begin, end = spec.names.layer.format(stack, "#").split("#")
        layer = re.compile(rf"{re.escape(begin)}(\d{{1,9}}){re.escape(end)}")
        found = {int(match[1]) for name in checkpoint.names if (match := layer.match(name)) is not None}
        lacking = next((index for index in range(count) if index not in found), None)
        if lacking is not None:
            raise LoadError(f"its {stack} has {count} layers, and there is no layer {lacking} in the files")
        if max(found) >= count:
            raise LoadError(f"its {stack} has {count} layers, and there is a layer {max(found)} in the files")


def _linears_by_use(checkpoint: Checkpoint, why: str) -> str:
    """Take the linear layers from transformers' code of the model, which has none here; a note of what was done."""
    from octavo.runtime.model.hf.linear_layers import NotFoundError, find_linear_modules

    begun = f"octavo doesn't have this model's code, so that its weights are rounded to nearest: {why}"
    if not checkpoint.layout.is_decoder:
        return begun
    try:
        found = find_linear_modules(checkpoint)
    except NotFoundError as e:
        return f"{begun}; its linear layers were told by their tensors' names: {e}"
    checkpoint.layout = replace(checkpoint.layout, linears=found.names, kept=found.kept)
    return f"{begun}; its linear layers are those of transformers' {found.architecture}"
