"""A GGUF file's tensors under Hugging Face's names, as `SafetensorsFile` has those of a safetensors file.

Linear layers whose blocks are integers come as these blocks, `blocks` uint8 [N, bytes], and `kinds` says of what kind
they are. Everything else, and with `dtype` everything, comes as numbers, decoded when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from octavo.quant.fused_experts import MAX_EXPERTS
from octavo.quant.gguf.architectures import EXPERT, architecture_of, change_of, config_of, rename
from octavo.quant.gguf.blocks import BLOCK_TYPES, BlockType
from octavo.quant.gguf.header import GGUFHeader, StoredTensor, read_header
from octavo.quant.gguf.parts import read_parts, whole
from octavo.quant.model_files import CheckpointError
from octavo.quant.printable import printable
from octavo.quant.safetensors_file import TensorSpec

GGUF = "model.gguf"  # its name, or that of a link to it, in a model's directory
CHUNK = 1 << 22  # numbers decoded at a time
LINEAR = ("_proj.weight", "lm_head.weight", ".w1.weight", ".w2.weight", ".w3.weight")
BLOCKS = ".blocks"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def open_gguf(path: Path, dtype: torch.dtype | None = None) -> dict[str, GGUFFile]:
    """A model's file, or its files where it has several of which `path` is the first, by their names."""
    parts = read_parts(path)
    model = whole(parts)
    return {file.name: GGUFFile(file, dtype, header, model) for file, header in parts.items()}


class GGUFFile:
    """One file: its header is read at once, its tensors on demand.

    dtype  None: numbers in blocks are float32, others as they are stored, and linear layers of integers are integers.
           Else every number is of this type: what a quantizer takes for the original
    model  what all parts of the model say, of which the file is one with this header
    """

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype | None = None,
        header: GGUFHeader | None = None,
        model: GGUFHeader | None = None,
    ) -> None:
        """Raises CheckpointError for a file that is damaged, or has what isn't known."""
        self.path = path
        self.size = path.stat().st_size
        self.specs: dict[str, TensorSpec] = {}
        header = header or read_header(path)
        model = model or header
        try:
            self._architecture = architecture_of(model.metadata)
            self._config = config_of(model)
            self._stored = {
                ours: (name, own)
                for name, tensor in header.tensors.items()
                for ours, own in _by_expert(rename(name, model.metadata), name, tensor)
            }
            has_head = any(rename(name, model.metadata) == HEAD for name in model.tensors)
        except CheckpointError as e:
            raise CheckpointError(f"{path.name}: {e}") from None
        self._dtype = dtype
        self._map: Tensor | None = None
        self._kinds: dict[str, str] = {}  # of linear layers' blocks, by module
        for name, (_, tensor) in self._stored.items():
            self._announce(name, tensor)
        embedding = self._stored.get(EMBEDDING)
        if dtype is None and embedding is not None and not has_head:
            self._tie(embedding)

    def _tie(self, embedding: tuple[str, StoredTensor]) -> None:
        """Have the head multiply by the codes of an embedding in blocks of integers."""
        if BLOCK_TYPES[embedding[1].kind].integers is not None:
            self._stored[HEAD] = embedding
            self._announce(HEAD, embedding[1])

    def _announce(self, name: str, tensor: StoredTensor) -> None:
        block = BLOCK_TYPES[tensor.kind]
        is_linear = name.endswith(LINEAR) and len(tensor.shape) == 2
        if self._dtype is None and is_linear and block.integers is not None:
            n, k = tensor.shape
            module = name.removesuffix(".weight")
            self._kinds[module] = tensor.kind
            self.specs[module + BLOCKS] = TensorSpec(torch.uint8, (n, k // block.columns * block.nbytes))
        else:
            self.specs[name] = TensorSpec(self._dtype or block.plain or torch.float32, tensor.shape)

    @property
    def kinds(self) -> dict[str, str]:
        """Of what blocks the linear layers are that are integers, by module."""
        return dict(self._kinds)

    def view(self, name: str) -> Tensor:
        """The tensor in its own memory."""
        spec = self.specs[name]
        module = name.removesuffix(BLOCKS)
        original, tensor = self._stored[name if module == name else f"{module}.weight"]
        block = BLOCK_TYPES[tensor.kind]
        raw = self._blocks(tensor, block)
        change = change_of(original, self._architecture, self._config)
        if module != name:
            rows = raw.reshape(spec.shape)
            return rows if change is None else change(rows)
        out = torch.empty(spec.numel, dtype=spec.dtype if change is None else torch.float32)
        step = max(1, CHUNK // block.columns)
        for begin in range(0, len(raw), step):
            part = block.decode(raw[begin : begin + step]).flatten()
            at = begin * block.columns
            out[at : at + part.numel()] = part
        out = out.view(spec.shape)
        return out if change is None else change(out).to(spec.dtype).contiguous()

    def read(self, name: str) -> Tensor:
        return self.view(name)

    def unmap(self) -> None:
        self._map = None

    def chunks(self, name: str, chunk_bytes: int = 1 << 24) -> Iterator[Tensor]:
        yield from torch.split(self.view(name).flatten().view(torch.uint8), chunk_bytes)

    def divide(self, name: str, parts: Mapping[str, tuple[int, ...]]) -> None:  # noqa: ARG002
        raise CheckpointError(f"{self.path.name}: {name} is of several experts under a name that no GGUF file has")

    def _blocks(self, tensor: StoredTensor, block: BlockType) -> Tensor:
        """A tensor's blocks, [n, bytes] uint8, as a view of the mapped file."""
        if self._map is None:
            self._map = torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)
        raw = self._map[tensor.begin : tensor.begin + tensor.nbytes].view(-1, block.nbytes)
        return raw.clone() if block.plain is not None and tensor.begin % block.nbytes else raw


def _by_expert(ours: str, name: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """A tensor under its name, or a tensor of all experts as each one's own."""
    if EXPERT not in ours:
        if ours.endswith("shared_expert_gate.weight"):
            tensor = replace(tensor, shape=(1, tensor.shape[-1]))  # a vector in llama.cpp's files
        yield ours, tensor
        return
    if len(tensor.shape) != 3 or tensor.shape[0] > MAX_EXPERTS:
        raise CheckpointError(
            f"{printable(name, 100)} has the shape {list(tensor.shape)}; a matrix for each of at most {MAX_EXPERTS:,} "
            "experts is needed"
        )
    nbytes = tensor.nbytes // tensor.shape[0]
    for i in range(tensor.shape[0]):
        yield ours.format(i), replace(tensor, shape=tensor.shape[1:], begin=tensor.begin + i * nbytes, nbytes=nbytes)
