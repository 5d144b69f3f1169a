"""An adapter's directory as far as no tensor of it is needed: whether it is one, and what it is known by.

Imports no torch: the server's process asks too.
"""

from __future__ import annotations

import stat
from hashlib import sha256
from pathlib import Path

from octavo.quant.model_files import CheckpointError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")


class AdapterError(CheckpointError):
    """An adapter that can't be served; the message says why, and names the file."""


def digest_of(directory: Path) -> str:
    """What an adapter is known by: sha256 of its two files, in hexadecimal. Raises AdapterError."""
    digest = sha256()
    for name in (CONFIG, TENSORS):
        path = regular(directory / name)
        one = sha256()
        try:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    one.update(chunk)
        except OSError as error:
            raise AdapterError(f"{path} can't be read: {error.strerror}") from None
        digest.update(one.digest())
    return digest.hexdigest()


def regular(path: Path) -> Path:
    """One of the two files. Raises AdapterError where it isn't there, or would block whoever reads it."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        pickles = [name for name in PICKLES if (path.parent / name).exists()]
        if path.name == TENSORS and pickles:
            raise AdapterError(
                f"{path.parent} has {pickles[0]}, a pickle, which can run any code and is never opened; save the "
                "adapter with safe_serialization=True"
            ) from None
        raise AdapterError(f"{path.parent} has no {path.name}, so it is no adapter that PEFT has saved") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise AdapterError(f"{path} can't be read: {error}") from None
    if not stat.S_ISREG(mode):
        raise AdapterError(f"{path} is not a regular file")
    return path
