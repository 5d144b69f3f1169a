"""The calibration of an encoder-decoder of text: what its encoder reads, and what its decoder does beside it.

The encoder reads windows of the data set's text. The decoder reads what it will when it serves: the model's own answer
to each window, sampled at temperature 1.0 from a seed, as long as the window. A translator's answers are in another
language than what it reads, and a copy of the window would give its decoder inputs that it never has. Where an answer
would end the model has to go on, so that no text has padding.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from octavo.calibration.layers import QuantizeError
from octavo.calibration.prepare import Calibration
from octavo.calibration.progress import Progress, silent
from octavo.calibration.text.data import CalibrationData
from octavo.calibration.text.documents import DataError, NoTextError
from octavo.jobs.calibration_data import DataOptions, make_data
from octavo.jobs.self_text import GenerationError, GenerationRequest, generated
from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.model.encdec_blocks import EncDecBlockRunner
from octavo.runtime.model.encdec_spec import EncDecSpec
from octavo.runtime.source_messages import TextSource
from octavo.server.encoder_text import EncoderText, read_encoder_text
from octavo.server.served_model import end_token_ids
from octavo.text.tokenizer import Tokenizer


def encdec_calibration(
    checkpoint: Checkpoint, options: DataOptions, offload_dir: Path | None, progress: Progress = silent
) -> Calibration:
    """Text for both halves, and the model block by block. The model is checked first: text may take long.

    Raises NoTextError where no text is given, DataError, QuantizeError.
    """
    if options.dataset is None:
        raise NoTextError("an encoder-decoder answers what it is given; give a text with --dataset")
    if options.self_generated_samples:
        raise DataError("--self-generated-samples: an encoder-decoder answers what it is given; leave it out")
    length = options.length_of(checkpoint.config)
    try:
        runner = EncDecBlockRunner(checkpoint, length)
    except ValueError as e:
        raise QuantizeError(str(e)) from e
    data = make_data(checkpoint.directory, options, "cpu", progress)
    if data.samples[0].numel() != length:
        raise DataError(
            f"{data.source}: samples have {data.samples[0].numel()} tokens; --max-seq-length says {length}, which both "
            "must be"
        )
    return Calibration(with_answers(checkpoint, data, progress), runner, offload_dir)


def with_answers(checkpoint: Checkpoint, data: CalibrationData, progress: Progress = silent) -> CalibrationData:
    """Each sample, and behind it the tokens [as many] that the decoder reads. Raises DataError."""
    directory = checkpoint.directory
    sources = [sample.tolist() for sample in data.samples]
    length = len(sources[0])
    vocab_size = EncDecSpec.from_hf(checkpoint.config).vocab_size
    try:
        encoder = read_encoder_text(directory, TextSource(length, 1), vocab_size)
        ends = end_token_ids(directory, Tokenizer.open(directory))
        asked = GenerationRequest(
            str(directory),
            [_begin(encoder)] * len(sources),
            length,
            data.seed,
            "cpu",
            sources,
            encoder.forbidden + tuple((end,) for end in sorted(ends)),
        )
        answers = generated(asked, progress)
    except (GenerationError, ValueError) as e:
        raise DataError(f"the decoder is calibrated on what the model answers, and it can't: {e}") from e
    samples = [torch.tensor(source + answer) for source, answer in zip(sources, answers, strict=True)]
    return replace(data, samples=samples, source=f"{data.source}; and as many tokens of the model's own answer to each")


def _begin(encoder: EncoderText) -> list[int]:
    """What the decoder begins with."""
    return [encoder.start_id] if encoder.first_id is None else [encoder.start_id, encoder.first_id]
