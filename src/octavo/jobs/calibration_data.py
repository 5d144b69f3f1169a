"""The calibration set of a job: out of files, of what a caller has in memory, or written by the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from octavo.calibration.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.calibration.text.data import CalibrationData

MAX_SEQ_LENGTH = 512
NUM_SAMPLES = 32
TOKENS_PER_INPUT = 4  # of the widest layer; see default_num_samples
MAX_DEFAULT_SAMPLES = 512


def make_data(
    source: Path,
    dataset: str | Path | Sequence[Any] | Tensor | None = None,
    *,
    num_samples: int | None = None,
    max_seq_length: int = MAX_SEQ_LENGTH,
    seed: int = 0,
    chat_template: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    progress: Progress = silent,
) -> CalibrationData:
    """Calibration data for the checkpoint in `source`.

    dataset: what --dataset takes; or a list of texts, or of dicts as a line of a .jsonl file holds them; or token ids,
    a list of tensors [max_seq_length] or one of all, taken as they are; or None, for text that the model generates.
    progress is called while it generates. Raises DataError, and CheckpointError for a checkpoint that is none.
    """
    import torch

    from octavo.calibration.text.data import Sizes, check_disjoint, from_dataset, from_records, from_token_ids
    from octavo.calibration.text.documents import DataError
    from octavo.calibration.verify import held_out_text
    from octavo.jobs.model_text import ModelText
    from octavo.jobs.self_text import generate_data
    from octavo.quant.checkpoint import read_config

    text = ModelText(source, chat_template)
    given = None if dataset is None or isinstance(dataset, str | Path) else list(dataset)
    if isinstance(dataset, torch.Tensor) or (given and isinstance(given[0], torch.Tensor)):
        return from_token_ids(given or [], vocab_size=text.vocab_size, source="the token ids given", seed=seed)
    if text.max_position is not None and max_seq_length > text.max_position:
        raise DataError(
            f"--max-seq-length {max_seq_length}: the model has {text.max_position} positions; {text.max_position} works"
        )
    count = num_samples if num_samples is not None else default_num_samples(read_config(source), max_seq_length)
    sizes = Sizes(count, max_seq_length, seed)
    if dataset is None:
        return generate_data(source, text, sizes, device=device, progress=progress)
    if isinstance(dataset, str | Path):
        data = from_dataset(dataset, text, sizes)
    else:
        data = from_records(given or [], text, sizes)
    check_disjoint(data, text.encode(held_out_text(), add_special_tokens=False), "octavo's held-out text")
    return data


def default_num_samples(config: dict[str, Any], max_seq_length: int) -> int:
    """How many windows when nobody says: 32, or as many as it takes for 4 tokens to each input of the widest layer.

    GPTQ inverts the second moments of a layer's K inputs, a K x K matrix that fewer than K tokens leave singular and
    somewhat more leave noisy. Peers take a fixed number: 512 x 384 tokens (llm-compressor's examples), 128 x 2048
    (GPTQ, AutoRound), which is more than a small model needs and a CPU has time for.
    """
    text_config = config.get("text_config") or config
    widths = [text_config.get(key) for key in ("hidden_size", "intermediate_size")]
    heads = text_config.get("num_attention_heads")
    head_dim = text_config.get("head_dim")
    widths.append(heads * head_dim if isinstance(heads, int) and isinstance(head_dim, int) else None)
    widest = max((width for width in widths if isinstance(width, int)), default=0)
    needed = -(-TOKENS_PER_INPUT * widest // max_seq_length)
    return min(MAX_DEFAULT_SAMPLES, max(NUM_SAMPLES, needed))
