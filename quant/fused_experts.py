"""Views transformers 5's fused tensors of experts as one tensor per expert, as checkpoints on the Hub have them.

In memory, and on disk after `save_pretrained(save_original_format=False)`, a layer's experts are
`mlp.experts.gate_up_proj` [E, 2 I, H] and `mlp.experts.down_proj` [E, H, I]. Their bytes are those of the experts' own
weights one after another, so nothing is copied. Other architectures (gpt-oss, Llama 4) have the same names for
transposed or interleaved weights: only model types whose `ModelLayout` names the experts are divided.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from octavo.quant.model_layout import ExpertNames
from octavo.quant.safetensors_file import SafetensorsError
from octavo.quant.tensor_file import TensorFile

FUSED = re.compile(r"^(?P<layer>.+)\.mlp\.experts\.(?P<kind>gate_up_proj|down_proj)$")
ROUTER = re.compile(r"^(?P<layer>.+)\.mlp\.gate\.weight$")
MAX_EXPERTS = 1 << 16


def divide_experts(files: list[TensorFile], names: ExpertNames) -> None:
    """Replace each tensor of experts by one tensor per expert of these names, and rename routers to match.

    Raises SafetensorsError if the files have an expert's own tensor as well.
    """
    stored = {name for file in files for name in file.specs}
    layers = {match["layer"] for name in stored if (match := FUSED.match(name))}
    for file in files:
        for name, spec in list(file.specs.items()):
            parts: dict[str, tuple[int, ...]] = {}
            if (match := FUSED.match(name)) and len(spec.shape) == 3 and spec.numel:
                if spec.shape[0] > MAX_EXPERTS:
                    raise SafetensorsError(
                        f"{file.path.name}: {name} has {spec.shape[0]:,} experts; {MAX_EXPERTS:,} are the most"
                    )
                parts = dict(_parts(f"{match['layer']}.{names.owner}.experts", match["kind"], spec.shape, names))
            elif (match := ROUTER.match(name)) and match["layer"] in layers:
                parts = {f"{match['layer']}.{names.owner}.gate.weight": spec.shape}
            if twice := (parts.keys() - {name}) & stored:
                raise SafetensorsError(f"{file.path.name} has {name}, but there is {min(twice)} as well")
            if parts:
                file.divide(name, parts)


def _parts(
    experts: str, kind: str, shape: tuple[int, ...], names: ExpertNames
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the experts' weights, in the order of their bytes."""
    count, rows, columns = shape
    for i in range(count):
        if kind == "down_proj":
            yield f"{experts}.{i}.{names.down}.weight", (rows, columns)
        else:
            yield f"{experts}.{i}.{names.gate}.weight", (rows - rows // 2, columns)
            yield f"{experts}.{i}.{names.up}.weight", (rows // 2, columns)
