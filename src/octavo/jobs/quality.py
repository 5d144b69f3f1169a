"""Quality of a checkpoint, through the path that serves it: the wiring between calibration and runtime.

One model is in memory at a time. The original's logits and hidden states are kept as float32 in temporary files until
the quantized models have computed their own; TMPDIR names their directory.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from octavo.calibration.progress import Progress, silent
from octavo.calibration.verify import BlockNoise, Comparison, Likelihood, Perplexity, Quality
from octavo.jobs.measured_text import PAIR, MeasuredText, QualityError, Window, measured_text
from octavo.kernels.attention.step import NewSource, SourceRows, StepInputs
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.dequantized import open_dequantized
from octavo.quant.scheme import AT_LOAD
from octavo.runtime.config import Dtype, EngineConfig
from octavo.runtime.model.device import Device
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.model import Model, Tap
from octavo.runtime.model.weights import OnLayer, load_model
from octavo.runtime.source_messages import TextSource
from octavo.runtime.worker import kv_cache
from octavo.runtime.worker.device import choose_device, free_memory

WINDOW = 256
BLOCK = 16
MOST_OF_ROUNDING = 0.7  # of an embedding in two bits; two vectors of a size that have nothing in common differ by 1.4


def measure_quality(
    original: Path,
    quantized: Path,
    *,
    max_tokens: int,
    text: Path | None = None,
    dtype: Dtype = "auto",
    progress: Progress = silent,
    device: Device | None = None,
) -> Quality:
    """Run both models, one after the other, as the server would, and compare them over max_tokens tokens of a text.

    Inputs are rounded as checkpoints say, also on a GPU whose server leaves them as they are (`keeps_inputs`).
    text is a file; None is the built-in held-out text. dtype is for both models, except that fp8, int8 and int4, which
    quantize at load, are for `quantized` alone. Raises QualityError if memory or disk don't suffice, for a text that
    can't be read, and for models that differ too much or can't be served; CheckpointError; and NotFiniteError for a
    model that gives NaN.
    """
    configs = (
        EngineConfig(model=str(original), dtype="auto" if dtype in AT_LOAD else dtype),
        EngineConfig(model=str(quantized), dtype=dtype),
    )
    return compare(*configs, max_tokens=max_tokens, text=text, progress=progress, device=device)


def compare(
    original: EngineConfig,
    quantized: EngineConfig,
    *,
    max_tokens: int,
    text: Path | None = None,
    progress: Progress = silent,
    device: Device | None = None,
) -> Quality:
    """`measure_quality` with a server's whole configuration, such as the types of the KV cache and the output head."""
    for config in (original, quantized):  # before minutes are spent on the first
        Checkpoint.open(Path(config.model), LAYOUTS, takes_transforms=True)
    with recorded(original, max_tokens=max_tokens, text=text, progress=progress, device=device) as record:
        return record.compare(quantized, progress)


@contextmanager
def recorded(
    original: EngineConfig,
    *,
    max_tokens: int,
    text: Path | None = None,
    dequantized: bool = False,
    progress: Progress = silent,
    device: Device | None = None,
) -> Iterator[Recorded]:
    """What an original computes over max_tokens tokens of a text, for as many quantized models as are to be compared.

    text: as of `measure_quality`; device: also of those models. dequantized: an original that is quantized itself is
    the model that its weights stand for, inputs as they are. Raises what measure_quality does.
    """
    measured = measured_text(Path(original.model), text, max_tokens)
    with tempfile.TemporaryFile() as logits, tempfile.TemporaryFile() as hidden:
        with torch.inference_mode():  # not around the yield, or its caller would be in it
            loading = _loading(progress, "original")
            runner = _load(original, measured, loading, device=device, dequantized=dequantized)
            facts = runner.facts
            window = runner.window
            table_rows = runner.table_rows
            record = _Recording(logits), _Recording(hidden)
            _check_disk(runner)
            for number, window_of_text in enumerate(runner.windows):
                record[0].write(runner.run(window_of_text, lambda _, states: record[1].write(states)))
                _tell(progress, number, runner, "original")
            del runner
            gc.collect()
        directory = Path(original.model)
        yield Recorded(directory, measured, window, facts, table_rows, logits, hidden, device)


def perplexity_of(
    model: EngineConfig, *, max_tokens: int, text: Path | None = None, progress: Progress = silent
) -> Perplexity:
    """Perplexity of one model. Raises what measure_quality does."""
    Checkpoint.open(Path(model.model), LAYOUTS, takes_transforms=True)
    measured = measured_text(Path(model.model), text, max_tokens)
    likelihood = Likelihood()
    with torch.inference_mode():
        runner = _load(model, measured, _loading(progress, "model"))
        for number, window in enumerate(runner.windows):
            likelihood.add(window.token_ids, runner.run(window))
            _tell(progress, number, runner, "model")
    return Perplexity(measured.name, runner.window, likelihood.num_tokens, likelihood.perplexity)


class _Recording:
    """Tensors in a file, as float32, to be read back in the order in which they were written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._read = 0

    def write(self, tensor: Tensor) -> None:
        try:
            self._file.write(tensor.float().contiguous().cpu().numpy().data)
        except OSError as e:
            raise QualityError(f"{tempfile.gettempdir()} can't take the original's logits: {e.strerror}") from e

    def read(self, like: Tensor) -> Tensor:
        """The next tensor, of the same shape."""
        if self._read == 0:
            self._file.flush()
        self._file.seek(self._read)
        numbers = np.fromfile(self._file, dtype=np.float32, count=like.numel())
        self._read += numbers.nbytes
        return torch.from_numpy(numbers).view(like.shape)


@dataclass(frozen=True)
class Facts:
    """Properties that two models must share to be compared."""

    architecture: str
    vocab_size: int
    num_layers: int
    hidden_size: int

    @classmethod
    def of(cls, model: Model) -> Facts:
        return cls(model.architecture, model.vocab_size, model.num_layers, model.hidden_size)

    def __str__(self) -> str:
        return f"{self.architecture}, {self.num_layers} layers of {self.hidden_size}, a vocabulary of {self.vocab_size}"


class _Runner:
    """A model that runs window by window over a cache as the server would give it."""

    def __init__(self, model: Model, config: EngineConfig, measured: MeasuredText, window: int) -> None:
        self.model = model
        self.window = window
        self.windows = measured.windows(window)
        self._shows_hidden = model.gives_hidden and not measured.pairs
        notes: list[str] = []
        dtype = kv_cache.choose_dtype(model, config.kv_cache_dtype, notes)
        scales = kv_cache.choose_scales(model, dtype, notes)
        self._caches = kv_cache.allocate(model, -(-window // BLOCK), BLOCK, dtype, scales)  # of one group of layers
        self.facts = Facts.of(model)

    @property
    def num_blocks(self) -> int:
        """Number of blocks whose hidden states can be had."""
        return self.model.num_layers if self._shows_hidden else 0

    @property
    def table_rows(self) -> Tensor | None:
        """The embedding's rows [T, hidden] of the first window's tokens; None: the model doesn't show any."""
        return self.model.token_table[self.windows[0].token_ids].float().cpu() if self._shows_hidden else None

    def run(self, window: Window, tap: Tap | None = None) -> Tensor:
        """All logits [T, vocab] of one window, in one prefill step."""
        length = len(window.token_ids)
        step = StepInputs.prefill([length], BLOCK, token_ids=window.token_ids, logits_index=range(length))
        step = step.to(self.model.device)
        if window.source is not None:
            new = (NewSource((0,), window.source),)
            step = replace(step, sources=SourceRows((0,), (len(window.source),), new))
        return self.model.forward(step, self._caches, tap if self._shows_hidden else None).float().cpu()


@dataclass(frozen=True)
class Recorded:
    """An original's logits and hidden states over a text, in temporary files; see `recorded`.

    table_rows  the embedding's rows of the first window's tokens, or None
    device  where models that are compared with it run; None: where they would be served
    """

    directory: Path
    text: MeasuredText
    window: int
    facts: Facts
    table_rows: Tensor | None
    logits: IO[bytes]
    hidden: IO[bytes]
    device: Device | None

    @torch.inference_mode()
    def compare(self, quantized: EngineConfig, progress: Progress = silent) -> Quality:
        """Run a quantized model and compare it. Raises what measure_quality does."""
        loading = _loading(progress, "quantized")
        runner = _load(quantized, self.text, loading, self.window, self.device)
        check_alike(self.directory, self.facts, Path(quantized.model), runner.facts)
        logits = _Recording(self.logits)
        hidden = _Recording(self.hidden)
        comparison = Comparison()
        is_same_stream = _is_same_stream(self.table_rows, runner.table_rows)
        noise = BlockNoise(runner.num_blocks if is_same_stream else 0)

        def tap(block: int, states: Tensor) -> None:
            states = states.float().cpu()
            noise.add(block, hidden.read(states), states)

        for number, window in enumerate(runner.windows):
            after = runner.run(window, tap if is_same_stream else None)
            comparison.add(window.token_ids, logits.read(after), after)
            _tell(progress, number, runner, "quantized")
        return comparison.result(self.text.name, runner.window, noise.result())


def _is_same_stream(before: Tensor | None, after: Tensor | None) -> bool:
    """Whether embeddings differ by rounding at the most; those of a residual stream that is rotated don't."""
    if before is None or after is None:
        return False
    return bool((after - before).norm() <= MOST_OF_ROUNDING * before.norm())


def _loading(progress: Progress, which: str) -> OnLayer:
    return lambda loaded, layers: progress(loaded, layers, f"loading the {which}")


def _load(
    config: EngineConfig,
    measured: MeasuredText,
    on_layer: OnLayer,
    window: int | None = None,
    device: Device | None = None,
    *,
    dequantized: bool = False,
) -> _Runner:
    directory = Path(config.model)
    _check_memory(directory, dequantized=dequantized)
    try:
        model = load_model(config, device, rounds_inputs=True, dequantized=dequantized, on_layer=on_layer)
    except (ValueError, OSError) as e:
        raise QualityError(f"{directory.name} can't be run: {e}") from e
    if model.pooler is not None or (model.source is not None and not measured.pairs):
        raise QualityError(f"{directory.name} goes on from no text, as models that are compared must")
    largest = max(measured.token_ids)
    if largest >= model.vocab_size:
        raise QualityError(f"the tokenizer gives token {largest}, and {directory} has {model.vocab_size}")
    if measured.pairs:
        return _Runner(model, config, measured, _longest_answer(model, measured))
    if window is not None and window > model.max_position:
        raise QualityError(f"{directory} has {model.max_position} positions, and the original {window} or more")
    window = window or min(WINDOW, model.max_position)
    return _Runner(model, config, measured, window)


def _longest_answer(model: Model, measured: MeasuredText) -> int:
    """Tokens of the longest one. Raises QualityError for pairs that the model doesn't read."""
    if not isinstance(model.source, TextSource):
        raise QualityError(f"{model.architecture} has no encoder of text, and {measured.name} has prompts with answers")
    longest = measured.longest
    for found, most, whose in zip(longest, (model.source.positions, model.max_position), PAIR, strict=True):
        if found > most:
            raise QualityError(f"{measured.name}: a {whose} has {found} tokens, and {model.architecture} reads {most}")
    return longest[1]


def _tell(progress: Progress, number: int, runner: _Runner, which: str) -> None:
    progress(number + 1, len(runner.windows), which)


def check_alike(original: Path, before: Facts, quantized: Path, after: Facts) -> None:
    """Raise QualityError for a model that can't be a quantization of the other."""
    if before != after:
        raise QualityError(
            f"{quantized.name} ({after}) is no quantization of {original.name} ({before}): they can't be compared"
        )


def _check_memory(directory: Path, *, dequantized: bool) -> None:
    opened = open_dequantized(directory) if dequantized else Checkpoint.open(directory, takes_transforms=True)
    needed = 1.2 * _bytes_to_serve(opened)
    free = free_memory(choose_device("auto"))
    if needed > free:
        raise QualityError(
            f"{directory.name} takes some {needed / 1e9:.1f} GB of memory to run and {free / 1e9:.1f} GB are free"
        )


def _check_disk(runner: _Runner) -> None:
    tokens = sum(len(window.token_ids) for window in runner.windows)
    facts = runner.facts
    needed = 4 * tokens * (facts.vocab_size + runner.num_blocks * facts.hidden_size)
    directory = tempfile.gettempdir()
    free = shutil.disk_usage(directory).free
    if needed * 1.01 > free:
        raise QualityError(
            f"the original's logits and hidden states over {tokens} tokens take {needed / 1e9:.2f} GB and {directory} "
            f"has {free / 1e9:.2f} GB free; fewer tokens need less, and TMPDIR names another directory"
        )


def _bytes_to_serve(checkpoint: Checkpoint) -> int:
    """Bytes of a checkpoint's tensors in memory; a CPU keeps fp8 as bf16."""
    specs = [checkpoint.spec(name) for name in checkpoint.names]
    return sum(spec.nbytes * (2 if spec.dtype == torch.float8_e4m3fn else 1) for spec in specs)
