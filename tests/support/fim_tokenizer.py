"""The tiny checkpoint's tokenizer with special tokens for filling in the middle, and <|endoftext|> as its end token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from octavo_server import TINY


def write_tokenizer(directory: Path, special: Sequence[str], places: Sequence[int] | None = None) -> dict[str, int]:
    """Write it with these special tokens in place of the last ones of the vocabulary, or of those at `places`.

    Returns their ids.
    """
    content = json.loads((TINY / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = content["model"]["vocab"]
    names = {token_id: name for name, token_id in vocabulary.items()}
    ids = dict(zip(special, places or range(max(names), 0, -1), strict=False))
    dropped = {names[token_id] for token_id in ids.values()}
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in content["model"]["merges"]]
    content["model"]["merges"] = [pair for pair in merges if not {*pair, "".join(pair)} & dropped]
    for name, token_id in ids.items():
        del vocabulary[names[token_id]]
        vocabulary[name] = token_id
        content["added_tokens"].append(content["added_tokens"][0] | {"id": token_id, "content": name})
    (directory / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}))
    return ids
