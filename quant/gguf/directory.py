"""A GGUF file as a model's directory: its config and tokenizer as Hugging Face's files, beside a link to the file.

So whatever reads a directory reads a GGUF file. The directory lies in the user's cache, named by what the file says and
where it is; the numbers stay where they are.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from octavo.quant.gguf.architectures import config_of
from octavo.quant.gguf.file import GGUF
from octavo.quant.gguf.header import GGUFHeader
from octavo.quant.gguf.parts import part, read_parts, whole
from octavo.quant.gguf.tokenizer import end_tokens, tokenizer_of
from octavo.quant.model_files import CheckpointError


def directory_of(path: Path) -> Path:
    """The directory of a GGUF file, or of the first of several that are one model; made unless it is there.

    Raises CheckpointError, which names the file.
    """
    path = path.absolute()  # not what a link leads to: in the Hub's cache that is a hash without its other parts
    parts = read_parts(path)
    target = _cache() / f"{path.stem[:60]}-{_digest(parts)}"
    if target.is_dir():
        return target
    try:
        files = _files(whole(parts))
    except CheckpointError as e:
        raise CheckpointError(f"{path.name}: {e}") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        for name, text in files.items():
            (made / name).write_text(text, encoding="utf-8")
        (made / GGUF).symlink_to(path)
        for number, other in list(enumerate(parts, 1))[1:]:
            part(made / GGUF, number, len(parts)).symlink_to(other)
        made.rename(target)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        if not target.is_dir():  # else another process was faster
            raise
    return target


def _files(header: GGUFHeader) -> dict[str, str]:
    metadata = header.metadata
    config = config_of(header)
    tokenizer, tokenizer_config = tokenizer_of(metadata)
    ends = end_tokens(metadata)
    ids: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    if type(metadata.get("tokenizer.ggml.bos_token_id")) is int:
        ids["bos_token_id"] = metadata["tokenizer.ggml.bos_token_id"]
    return {
        "config.json": json.dumps(config | ids, indent=2),
        "generation_config.json": json.dumps(ids, indent=2),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2, ensure_ascii=False),
    }


def _cache() -> Path:
    """In XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo" / "gguf"


def _digest(parts: Mapping[Path, GGUFHeader]) -> str:
    """Of the headers' bytes, the files' places, and this code: whichever changes, the directory is another."""
    digest = sha256()
    for path, header in parts.items():
        with path.open("rb") as file:
            digest.update(file.read(header.nbytes))
        digest.update(f"\0{path}\0".encode())
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:16]
