"""A tokenizer.json as a GGUF file's metadata: what `tokenizer` reads, the other way.

A byte-level BPE is told by how it splits text, which must be one of the ways that have a name there. A BPE over spaces
(SentencePiece's) is told by scores, from which the reader makes all merges: they must come out as the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.quant.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NAMED,
    NORMAL,
    SPLITS,
    UNKNOWN,
    UNUSED,
    USER,
    WHOLE_WORDS,
    merges_by_score,
    split_by,
)
from octavo.quant.model_files import CheckpointError, read_object, read_object_if_any, read_text

IGNORED = {"trim_offsets", "invert"}  # of a tokenizer's parts: what moves no token
LOWEST = -1e6  # the score of a piece that no merge makes


def vocabulary_of(directory: Path, config: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
    """Metadata of the tokenizer and the chat template in a model's directory; num_tokens: rows of the embedding.

    Raises CheckpointError for a tokenizer that a GGUF file can't say.
    """
    if not (directory / "tokenizer.json").is_file():
        raise CheckpointError(f"{directory} has no tokenizer.json, which a GGUF file is made of")
    state = read_object(directory / "tokenizer.json")
    settings = read_object_if_any(directory / "tokenizer_config.json")
    model = state.get("model") or {}
    if model.get("type") != "BPE":
        raise CheckpointError(f"tokenizer.json has a model {model.get('type')}; a GGUF file is written of BPE")
    ids: dict[str, int] = dict(model["vocab"])
    added = {token["content"]: bool(token["special"]) for token in state.get("added_tokens") or []}
    ids |= {token["content"]: token["id"] for token in state.get("added_tokens") or []}
    tokens = [f"[PAD{i}]" for i in range(num_tokens)]
    kinds = [UNUSED] * num_tokens
    for token, i in ids.items():
        if i >= num_tokens:
            raise CheckpointError(f"token {i} of tokenizer.json is beyond the embedding's {num_tokens} rows")
        tokens[i] = token
        kinds[i] = NORMAL if token not in added else CONTROL if added[token] else USER
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in model["merges"]]
    if (state.get("pre_tokenizer") or {}).get("type") in (None, "Split") and model.get("byte_fallback"):
        own = _scored(state, tokens, kinds, merges)
    else:
        own = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _split_of(state),
            "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        }
    own |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    return own | _named(directory, settings, config, ids, state) | _template(directory, settings)


def _split_of(state: Mapping[str, Any]) -> str:
    """The name of the way in which text is split."""
    wanted = _bare(state.get("pre_tokenizer"))
    whole = bool((state.get("model") or {}).get("ignore_merges"))
    for name, split in SPLITS.items():
        own = json.loads(split_by(split).__getstate__())
        if _bare(own) == wanted and whole == (name in WHOLE_WORDS):
            return name
    raise CheckpointError(
        f"tokenizer.json splits text as no tokenizer.ggml.pre does that is known: {', '.join(SPLITS)}"
    )


def _bare(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _bare(value) for key, value in part.items() if key not in IGNORED}
    return [_bare(each) for each in part] if isinstance(part, list) else part


def _scored(
    state: Mapping[str, Any], tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]]
) -> dict[str, Any]:
    """Of a BPE over spaces: scores that fall with the rank of the first merge that makes a piece."""
    unknown = (state["model"] or {}).get("unk_token")
    for i, token in enumerate(tokens):
        if token == unknown:
            kinds[i] = UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[i] = BYTE
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault("".join(merge), len(ranks))
    scores = [float(-ranks[token]) if token in ranks else LOWEST for token in tokens]
    # Of pairs that make the same piece the first in a text comes first by scores; by merges, the first in their list.
    if ["".join(pair) for pair in merges_by_score(tokens, scores, kinds)] != ["".join(pair) for pair in merges]:
        raise CheckpointError("tokenizer.json joins pieces in an order that no scores of theirs give")
    prefixed = "Prepend" in json.dumps(state.get("normalizer"))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefixed,
    }


def _named(
    directory: Path,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    ids: Mapping[str, int],
    state: Mapping[str, Any],
) -> dict[str, Any]:
    """Ids of tokens with a role, and whether a text begins with one."""
    found: dict[str, Any] = {}
    for theirs, ours in NAMED.items():
        token = settings.get(ours)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            found[f"tokenizer.ggml.{theirs}_token_id"] = ids[token]
    generation = read_object_if_any(directory / "generation_config.json")
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    listed = ends if isinstance(ends, list) else [ends]
    for role, end in zip(("eos", "eot", "eom"), (end for end in listed if isinstance(end, int)), strict=False):
        found[f"tokenizer.ggml.{role}_token_id"] = end
    begins = ((state.get("post_processor") or {}).get("single") or [{}])[0]
    found["tokenizer.ggml.add_bos_token"] = settings.get("add_bos_token") is True or "SpecialToken" in begins
    return found


def _template(directory: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    path = directory / "chat_template.jinja"
    template = read_text(path) if path.exists() else settings.get("chat_template")
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}
