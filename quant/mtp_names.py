"""The tensors of multi-token prediction (MTP) heads by their names: layers behind the decoder that draft next tokens.

Checkpoints have them at `mtp.*` (Qwen3-Next, Qwen3.5), `model.mtp_layers.*` (MiMo), or as decoder layers behind the
last one (DeepSeek, GLM-4.5), where `num_nextn_predict_layers` counts them. Quantizers keep them as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

MTP = re.compile(r"(?:^|\.)(mtp|mtp_layers)\.")
DECODER_LAYER = re.compile(r"(?:model\.|language_model\.model\.|model\.language_model\.)?layers\.(\d+)\.")


def is_mtp(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is an MTP head's; config: the checkpoint's config.json."""
    layer = DECODER_LAYER.match(name)
    return MTP.search(name) is not None or (layer is not None and int(layer[1]) in _further_layers(config))


def mtp_patterns(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Regexes ('re:...') of all modules of the MTP heads that there are among tensors.

    As checkpoints spell them and as vLLM does, to which `model.mtp_layers.0` is `model.layers.N` behind the last one.
    """
    heads = [name for name in names if is_mtp(name, config)]
    found = {match[1] if (match := MTP.search(name)) else "layers" for name in heads}
    patterns = [rf"re:(.*\.)?{owner}\..*" for owner in sorted(found - {"layers"})]
    if found - {"mtp"}:
        further = _further_layers(config)[: len(heads)]  # each has a tensor at least, whatever the config counts
        patterns += [rf"re:(.*\.)?layers\.{index}\..*" for index in further]
    return patterns


def _further_layers(config: Mapping[str, Any]) -> range:
    """Indexes of the layers behind the decoder's own."""
    text = config.get("text_config") or config
    count, further = (text.get(key) for key in ("num_hidden_layers", "num_nextn_predict_layers"))
    return range(count, count + further) if type(count) is int and type(further) is int else range(0)
