"""The calibration set of a job: out of files, of what a caller has in memory, or written by the model itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from octavo.calibration.choices import MOST_SAMPLES
from octavo.calibration.progress import Progress, silent

if TYPE_CHECKING:
    from octavo.calibration.text.data import CalibrationData
    from octavo.jobs.model_text import ModelText

NUM_SAMPLES = 32
TOKENS_PER_INPUT = 4  # of the widest layer; see default_num_samples
MAX_DEFAULT_SAMPLES = 512
TUNED_SAMPLES = 128
"""Windows that tuning has at least: of fewer it learns what is particular to them. Of three blocks of SmolLM2 in
W3A16@64, KL on text of other kinds is 0.0811 with 32 windows of docstrings, and 0.0647 with 96 of its own text, too."""
LENGTH = 512  # tokens of a window


class DataOptions(msgspec.Struct, frozen=True):
    """The choice of calibration text; its flags have llm-compressor's names.

    dataset: what --dataset takes; or a list of texts, or of dicts as a line of a .jsonl file holds them; or token ids,
    a list of tensors [max_seq_length] or one of all, taken as they are; or None, for text that the model generates.
    max_seq_length: None is 512, or the model's positions if they are fewer; see `length_of`.
    """

    dataset: Annotated[
        Any,
        Meta(
            description="a .txt, .jsonl, .json, .csv or .parquet file, a directory of them, or a data set of the Hub "
            "('owner/name', 'owner/name:split', 'owner/name:config/split')",
            extra={
                "group": "calibration data",
                "metavar": "DATA",
                "default": "none; the model generates its text itself",
            },
        ),
    ] = None
    num_samples: Annotated[
        int | None,
        Meta(
            ge=1,
            le=MOST_SAMPLES,
            description="windows of text",
            extra={
                "flag": "--num-calibration-samples",
                "metavar": "N",
                "default": f"{NUM_SAMPLES}; more for wide layers, so that there are {TOKENS_PER_INPUT} tokens for each "
                f"of their inputs; {TUNED_SAMPLES} where an algorithm tunes and the model generates its text itself",
            },
        ),
    ] = None
    max_seq_length: Annotated[
        int | None,
        Meta(
            ge=1,
            description="tokens of each window",
            extra={"metavar": "N", "default": f"{LENGTH}, or the model's positions if they are fewer"},
        ),
    ] = None
    seed: Annotated[
        int,
        Meta(
            ge=0,
            lt=2**32,
            description="seed of the choice of samples, and of text that the model generates",
            extra={"metavar": "N", "what": "a whole number from 0 to 2^32 - 1"},
        ),
    ] = 0
    chat_template: Annotated[
        str | None,
        Meta(
            description="a Jinja file, or a template itself, for conversations in the data",
            extra={"metavar": "TEMPLATE", "default": "the model's own"},
        ),
    ] = None
    self_generated_samples: Annotated[
        int | None,
        Meta(
            ge=0,
            le=MOST_SAMPLES,
            description="windows of text that the model generates itself, beside those of --dataset",
            extra={
                "metavar": "N",
                "default": f"0; where an algorithm tunes, as many as make {TUNED_SAMPLES} with those of --dataset",
            },
        ),
    ] = None

    def length_of(self, config: dict[str, Any]) -> int:
        """Tokens of each window: as many as this model can read where no number is given."""
        positions = (config.get("text_config") or config).get("max_position_embeddings")
        return self.max_seq_length or (min(LENGTH, positions) if type(positions) is int else LENGTH)

    def notes_of(self, config: dict[str, Any]) -> list[str]:
        """What a person should know of windows of this model's text."""
        length = self.length_of(config)
        if self.max_seq_length is not None or length == LENGTH:
            return []
        return [f"windows of calibration text have {length} tokens, not {LENGTH}: the model has no more positions"]


def make_data(
    source: Path,
    options: DataOptions,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    progress: Progress = silent,
    *,
    tunes: bool = False,
) -> CalibrationData:
    """Calibration data for the checkpoint in `source`.

    progress is called while the model generates text. tunes: the algorithm does, and has TUNED_SAMPLES by default; what
    the model can't generate is left out with a note, unless it is asked for. Raises DataError, and CheckpointError for
    a checkpoint that is none.
    """
    from octavo.calibration.text.data import Sizes, mixed
    from octavo.calibration.text.documents import DataError, NoTextError
    from octavo.jobs.model_text import ModelText
    from octavo.jobs.self_text import GenerationError, generate_data
    from octavo.quant.checkpoint import read_config

    dataset = options.dataset
    config = read_config(source)
    length = options.length_of(config)
    try:
        text = ModelText(source, options.chat_template)
    except DataError as e:
        raise e if dataset is not None or options.chat_template is not None else NoTextError(str(e)) from e
    least = TUNED_SAMPLES if tunes else 0
    if dataset is None:
        _check_positions(text, length)
        count = options.num_samples or max(least, default_num_samples(config, length))
        sizes = Sizes(count, length, options.seed)
        try:
            return generate_data(source, text, sizes, device=device, progress=progress)
        except GenerationError as e:
            raise NoTextError(
                f"without --dataset the model itself generates the calibration text, and it can't: {e}; give a text "
                "with --dataset"
            ) from None
    data = _given(text, options, config)
    asked = options.self_generated_samples
    count = max(0, least - len(data.samples)) if asked is None else asked
    if not count:
        return data
    sizes = Sizes(count, data.samples[0].numel(), options.seed)
    try:
        return mixed(data, generate_data(source, text, sizes, beside=data, device=device, progress=progress))
    except (GenerationError, DataError) as e:
        if asked is not None:
            raise DataError(f"--self-generated-samples {asked}: the model can't generate text: {e}") from e
        alone = f"tuned on the {len(data.samples)} samples given alone, since the model can't generate more: {e}"
        return replace(data, notes=(*data.notes, alone))


def _given(text: ModelText, options: DataOptions, config: dict[str, Any]) -> CalibrationData:
    """What the caller or a file has."""
    import torch

    from octavo.calibration.text.data import Sizes, check_disjoint, from_dataset, from_records, from_token_ids
    from octavo.calibration.verify import held_out_text

    dataset = options.dataset
    given = None if isinstance(dataset, str | Path) else list(dataset)
    if isinstance(dataset, torch.Tensor) or (given and isinstance(given[0], torch.Tensor)):
        source = "the token ids given"
        return from_token_ids(given or [], vocab_size=text.vocab_size, source=source, seed=options.seed)
    length = options.length_of(config)
    _check_positions(text, length)
    sizes = Sizes(options.num_samples or default_num_samples(config, length), length, options.seed)
    data = from_records(given, text, sizes) if given is not None else from_dataset(dataset, text, sizes)
    check_disjoint(data, text.encode(held_out_text(), add_special_tokens=False), "octavo's held-out text")
    return data


def _check_positions(text: ModelText, max_seq_length: int) -> None:
    from octavo.calibration.text.documents import DataError

    if text.max_position is not None and max_seq_length > text.max_position:
        raise DataError(
            f"--max-seq-length {max_seq_length}: the model has {text.max_position} positions; {text.max_position} works"
        )


def default_num_samples(config: dict[str, Any], max_seq_length: int) -> int:
    """The default number of windows: 32, or as many as give 4 tokens to each input of the widest layer.

    GPTQ inverts the second moments of a layer's K inputs, a K x K matrix that fewer than K tokens leave singular and
    somewhat more leave noisy. Peers take a fixed number: 512 x 384 tokens (llm-compressor's examples), 128 x 2048
    (GPTQ, AutoRound), which is more than a small model needs and a CPU has time for.
    """
    text_config = config.get("text_config") or config
    keys = ("hidden_size", "intermediate_size", "d_model", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")
    widths = [text_config.get(key) for key in keys]
    heads = text_config.get("num_attention_heads")
    head_dim = text_config.get("head_dim")
    widths.append(heads * head_dim if isinstance(heads, int) and isinstance(head_dim, int) else None)
    widest = max((width for width in widths if isinstance(width, int)), default=0)
    needed = -(-TOKENS_PER_INPUT * widest // max_seq_length)
    return min(MAX_DEFAULT_SAMPLES, max(NUM_SAMPLES, needed))
