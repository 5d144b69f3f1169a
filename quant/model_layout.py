"""What a model type says about its files, for those who read checkpoints and know no architecture.

The values come from `runtime/model/families/`, where a family states them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class ExpertNames:
    """Where a layer's experts are: `{owner}.{router}`, `{owner}.experts.3.{gate}`, `{owner}.{shared}.gate_proj`.

    owner  empty: the layer itself
    gate, up, down  an expert's own
    shared          the expert that every token goes to, where there is one
    """

    owner: str
    gate: str
    up: str
    down: str
    router: str = "gate"
    shared: str = "shared_expert"

    def within(self, layer: str) -> str:
        """The owner in a layer."""
        return f"{layer}.{self.owner}" if self.owner else layer


@dataclass(frozen=True)
class ModelLayout:
    """What the files of a model type hold.

    experts       the names of each expert's own tensors, which one fused tensor [experts, rows, columns] may stand for
                  in the same order of bytes; None: a fused tensor is left as it is
    blocks_alike  each decoder block has the same linear layers, so that one which a block lacks was lost
    is_encoder    its blocks are those of an encoder, which in other models is another tower
    has_encoder   its blocks are those of a decoder and of the encoder before it, numbered alike
    reads_text    that encoder does, so that calibration can run both on text
    linears       full names of the linear layers, where the model's own code tells; None: their tensors' names do
    kept          full names of what that code has of the class Linear, too, and stays as it is: the head, routers
    """

    experts: ExpertNames | None = None
    blocks_alike: bool = False
    is_encoder: bool = False
    has_encoder: bool = False
    reads_text: bool = False
    linears: frozenset[str] | None = None
    kept: frozenset[str] = frozenset()

    @property
    def is_decoder(self) -> bool:
        """Its blocks are a decoder's alone."""
        return not (self.is_encoder or self.has_encoder)

    @property
    def is_calibrated(self) -> bool:
        """Calibration can run its blocks on text."""
        return self.is_decoder or self.reads_text


UNKNOWN = ModelLayout()
Layouts = Mapping[str, ModelLayout]
"""By model_type; a type that isn't in it is UNKNOWN."""
NO_LAYOUTS: Layouts = MappingProxyType({})
