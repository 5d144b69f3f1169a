"""Linear layers in formats whose numbers are no integers times scales: decoded whenever they are asked for.

They look like plain weights from then on, to who serves them as to who quantizes them: memory and speed are bfloat16's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Protocol

from torch import Tensor

from octavo.quant.derived_file import Derived, DerivedFile
from octavo.quant.formats.bitsandbytes import FourBitDecoder
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.hqq import HQQDecoder
from octavo.quant.model_files import CheckpointError
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.tensor_file import TensorFile


class Decoder(Protocol):
    """A format that is decoded. mark: the tensor that each of its layers has; suffixes: those that one may have."""

    @property
    def name(self) -> str: ...
    @property
    def mark(self) -> str: ...
    @property
    def suffixes(self) -> tuple[str, ...]: ...

    def spec(self, tensors: Mapping[str, Tensor]) -> TensorSpec:
        """Type and shape of the decoded weight [N, K]. Raises FormatError."""
        ...

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight. Raises FormatError."""
        ...


DECODERS: tuple[Decoder, ...] = (FourBitDecoder(), HQQDecoder())


def decode_layers(files: Mapping[str, TensorFile]) -> tuple[dict[str, TensorFile], str]:
    """The files with a plain `{layer}.weight` for each such layer, and the format's name, '' where there is none.

    Raises FormatError that names the layer.
    """
    names = {name for file in files.values() for name in file.specs}
    for decoder in DECODERS:
        modules = [name.removesuffix(f".{decoder.mark}") for name in names if name.endswith(f".{decoder.mark}")]
        if modules:
            return with_decoded(files, dict.fromkeys(modules, decoder)), decoder.name
    return dict(files), ""


def with_decoded(files: Mapping[str, TensorFile], decoders: Mapping[str, Decoder]) -> dict[str, TensorFile]:
    """The files with a plain `{module}.weight` for each of these modules. Raises FormatError that names the module."""
    owners = {name: file for file in files.values() for name in file.specs}
    hidden: set[str] = set()
    derived: dict[int, dict[str, Derived]] = {id(file): {} for file in files.values()}
    for module, decoder in decoders.items():
        names = {suffix: name for suffix in decoder.suffixes if (name := f"{module}.{suffix}") in owners}
        hidden |= set(names.values())
        make = partial(_decode, decoder, module, {suffix: (owners[name], name) for suffix, name in names.items()})
        try:
            spec = decoder.spec({suffix: owners[name].view(name) for suffix, name in names.items()})
        except FormatError as e:
            raise FormatError(f"{module}: {e}") from None
        derived[id(owners[f"{module}.{decoder.mark}"])][f"{module}.weight"] = Derived(spec, make)
    return {shard: DerivedFile(file, derived[id(file)], hidden) for shard, file in files.items()}


def _decode(decoder: Decoder, module: str, tensors: Mapping[str, tuple[TensorFile, str]]) -> Tensor:
    try:
        return decoder.decode({suffix: file.view(name) for suffix, (file, name) in tensors.items()})
    except FormatError as e:
        raise CheckpointError(f"{module}: {e}") from None
