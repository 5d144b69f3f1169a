"""The tables of docs/models.md and docs/formats.md, made from the registry of families and the table of kernels.

`python tests/support/model_tables.py` writes all of them anew.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from doc_tables import DocTables

from octavo.quant.kernel import LayerShape
from octavo.quant.kernel_table import choose_kernel
from octavo.quant.scheme import PRESETS
from octavo.quant.target import Target
from octavo.runtime.model.families.family import Architecture, both_sublayers, no_states, nothing_beside
from octavo.runtime.model.families.registry import ARCHITECTURES, VISION

NORMS = {"pre": "before", "sandwich": "before and after", "post": "after"}
QK_NORMS = {None: "", "head": "each head", "width": "all heads together", "unweighted": "each head"}
WINDOWS = {"none": "", "all": "all layers", "layer_types": "as the config says", "chunks": "chunks of positions"}
EXPERTS = {
    "none": "",
    "all": "all layers",
    "sparse_step": "as the config says",
    "behind_dense": "behind dense layers",
    "named": "as the config says",
    "beside_mlp": "beside each MLP, if the config says",
    "kinds": "as the config says",
}

BF16 = torch.bfloat16
TARGETS = {
    "CPU with AVX-512 VNNI and BF16": Target(torch.device("cpu"), BF16, has_dot_products=True),
    "other CPU": Target(torch.device("cpu"), BF16),
    "GPU of 8.0 to 8.8": Target(torch.device("cuda"), BF16, 80),
    "GPU from 8.9 up": Target(torch.device("cuda"), BF16, 89),
}
SHAPE = LayerShape(4096, 4096)


def architectures() -> str:
    """What octavo's decoder serves, by model_type."""
    outer: dict[str, list[str]] = {}
    for name, texts in VISION.items():
        for text in texts:
            outer.setdefault(text, []).append(f"`{name}`")
    heads = ("`model_type`", "norms", "q and k normalized over", "sliding window", "experts", "in attention's place")
    rows = [
        (
            f"`{name}`" + (f", also the text part of {' and '.join(outer[name])}" if name in outer else ""),
            *_traits(architecture),
        )
        for name, architecture in sorted(ARCHITECTURES.items())
    ]
    return table(heads, rows)


def _traits(architecture: Architecture) -> tuple[str, ...]:
    return (
        NORMS[architecture.norms],
        QK_NORMS[architecture.qk_norm],
        WINDOWS[architecture.windows],
        EXPERTS[architecture.experts],
        _in_place(architecture),
    )


def _in_place(architecture: Architecture) -> str:
    if architecture.latent:
        return "latents" if architecture.state_mixers is no_states else "states, in most layers; latents"
    if architecture.beside is not nothing_beside:
        return "states beside it"
    if architecture.sublayers is not both_sublayers:
        return "states, attention or an MLP in each layer" if architecture.experts == "kinds" else "states"
    return "states, in most layers" if architecture.state_mixers is not no_states else ""


def kernels() -> str:
    """What multiplies a layer of each scheme, by device. A layer of some other shape may have another one."""
    rows = [
        (f"`{name}`", *(_kernel(name, target) for target in TARGETS.values())) for name in PRESETS if name != "INT8"
    ]
    return table(("scheme", *TARGETS), rows)


def _kernel(scheme: str, target: Target) -> str:
    choice = choose_kernel(PRESETS[scheme], SHAPE, target)
    if choice.kernel.dequantizes:
        return "dequantized to bf16 at load"
    kept = ", inputs not rounded" if choice.departs else ""
    return f"{choice.kernel.how}{kept}"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [tuple(heads), *map(tuple, rows)]
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


TABLES = DocTables("table", {"architectures": architectures, "kernels": kernels})


if __name__ == "__main__":
    TABLES.write()
