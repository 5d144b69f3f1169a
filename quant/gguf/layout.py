"""Where a model's tensors lie in a GGUF file, and what stands before them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.quant.formats.gguf import BLOCKS, GGUFFormat
from octavo.quant.gguf.architectures import Change, GGUFArchitecture, stored_change, stored_name
from octavo.quant.gguf.description import architecture_for, describe
from octavo.quant.gguf.header import StoredTensor
from octavo.quant.gguf.vocabulary import vocabulary_of
from octavo.quant.gguf.writer import GGUFLayout, Piece
from octavo.quant.model_files import CheckpointError
from octavo.quant.qparams import quantize_weight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.scheme import GGUF, QuantScheme

PLAIN = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
SMALL = (".gate.weight", "shared_expert_gate.weight")  # routers, which llama.cpp has in F32
QUANTIZATION_VERSION = 2


def make_layout(
    directory: Path,
    config: Mapping[str, Any],
    plain: Mapping[str, TensorSpec],
    rounded: Mapping[str, str],
    linears: Mapping[str, tuple[str, tuple[int, int]]],
    file_type: int,
) -> GGUFLayout:
    """The layout of a model whose tokenizer is in a directory.

    plain    numbers, by Hugging Face's names; rounded: of which kind those are that become blocks on the way
    linears  the kind and the shape [N, K] of layers that come in blocks, by module
    Raises CheckpointError for what a GGUF file can't say.
    """
    name, architecture = architecture_for(config)
    pieces = {tensor: _piece(tensor, spec, rounded.get(tensor), architecture, config) for tensor, spec in plain.items()}
    for module, (kind, shape) in linears.items():
        blocks = GGUFFormat(kind).tensors(*shape)[BLOCKS]
        piece = _piece(f"{module}.weight", TensorSpec(torch.uint8, blocks.shape), kind, architecture, config, shape[1])
        pieces[f"{module}.{BLOCKS}"] = piece
    _check_experts(pieces.values())
    shapes = {p.name: StoredTensor(p.kind, (*p.rows, p.columns), 0, 0) for p in pieces.values()}
    metadata, factors = describe(config, shapes)
    metadata |= {
        "general.name": directory.name,
        "general.file_type": file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    num_tokens = metadata[f"{name}.vocab_size"]
    return GGUFLayout(metadata | vocabulary_of(directory, config, num_tokens), pieces, factors)


def _check_experts(pieces: Iterable[Piece]) -> None:
    """Raise CheckpointError for experts that one tensor can't hold."""
    first: dict[str, Piece] = {}
    for piece in pieces:
        other = first.setdefault(piece.name, piece)
        if piece.expert is not None and (piece.kind, piece.spec) != (other.kind, other.spec):
            raise CheckpointError(
                f"a layer's experts are one tensor in a GGUF file, {piece.name}, which can't be partly {other.kind} "
                f"and partly {piece.kind}: give all of them one scheme"
            )


def _piece(
    name: str,
    source: TensorSpec,
    kind: str | None,
    architecture: GGUFArchitecture,
    config: Mapping[str, Any],
    columns: int | None = None,
) -> Piece:
    """columns: of a layer that comes in blocks; None: it comes as numbers."""
    theirs, expert = stored_name(name, architecture.blocks)
    own = kind
    if own is None:
        own = "F32" if len(source.shape) == 1 or name.endswith(SMALL) else PLAIN[source.dtype]
    return Piece(
        theirs,
        own,
        source,
        source.shape[-1] if columns is None else columns,
        expert,
        stored_change(theirs, architecture, config),
        None if kind is None or columns is not None else _rounding(kind),
    )


def _rounding(kind: str) -> Change:
    def rounds(numbers: Tensor) -> Tensor:
        quantized = quantize_weight(numbers, QuantScheme(GGUF[kind]), "mse", torch.float16)
        return GGUFFormat(kind).write(quantized)[BLOCKS]

    return rounds
