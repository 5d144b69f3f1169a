"""The language-model head and the embedding, quantized, too: where the two are tied, the head gets its own weight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from octavo.calibration.layers import LinearLayer, QuantizeError
from octavo.calibration.recipe import means_layer
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.derived_file import Derived, DerivedFile
from octavo.quant.formats.reading import FLOATS
from octavo.quant.head_name import head_name
from octavo.quant.mtp_names import is_mtp
from octavo.quant.tensor_file import TensorFile

HEADS = ("lm_head", "language_model.lm_head")
EMBEDDING = "embed_tokens.weight"
OF_NO_BLOCK = -1


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether a model's head is its embedding; one whose names have no prefix has no head, whatever its config says."""
    config = checkpoint.config
    tied = _text(config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return bool(tied) and not checkpoint.has(EMBEDDING)


def with_own_head(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with a head that is not tied. Raises QuantizeError where neither it nor the embedding is found."""
    stored = next((f"{head}.weight" for head in HEADS if checkpoint.has(f"{head}.weight")), None)
    config = checkpoint.config
    if stored is not None and not is_tied(checkpoint):
        return checkpoint
    embedding = _embedding(checkpoint)
    head = stored or f"{head_name(embedding.removesuffix(EMBEDDING))}.weight"
    files: dict[str, TensorFile] = {}
    for shard, file in checkpoint.files.items():
        hidden = {head} & file.specs.keys()
        derived = {}
        if embedding in file.specs:
            derived[head] = Derived(file.specs[embedding], partial(file.read, embedding))
        files[shard] = DerivedFile(file, derived, hidden) if derived or hidden else file
    own = Checkpoint(
        checkpoint.directory,
        untied(config),
        files,
        None,
        checkpoint.layout,
        source=checkpoint.source,
        transforms=checkpoint.transforms,
    )
    own.notes.append(
        f"{head.removesuffix('.weight')} was tied to the embedding, and has a weight of its own now, which counts as "
        f"{own.spec(head).nbytes / 1e6:,.1f} MB of those before"
    )
    return own


def select_head(checkpoint: Checkpoint, patterns: Sequence[str]) -> dict[str, LinearLayer]:
    """The head of a checkpoint as `with_own_head` gives it, by its module.

    Raises QuantizeError for one that a pattern of what is left as it is names, too.
    """
    module = next(head for head in HEADS if checkpoint.has(f"{head}.weight"))
    if named := [pattern for pattern in patterns if means_layer(pattern, module, "lm_head")]:
        raise QuantizeError(f"--lm-head quantizes {module}, and --ignore {' '.join(named)} leaves it: one of both")
    spec = checkpoint.spec(f"{module}.weight")
    if len(spec.shape) != 2 or spec.dtype not in FLOATS:
        raise QuantizeError(f"lm_head: {module}.weight is {spec.dtype} {list(spec.shape)}, and no matrix of floats")
    return {module: LinearLayer(module, OF_NO_BLOCK, "lm_head", *spec.shape)}


def select_embedding(checkpoint: Checkpoint, patterns: Sequence[str]) -> dict[str, LinearLayer]:
    """The embedding, by its module. Raises QuantizeError for one that a pattern of what is left names, too."""
    module = _embedding(checkpoint, "--embedding").removesuffix(".weight")
    if named := [pattern for pattern in patterns if means_layer(pattern, module, module)]:
        raise QuantizeError(f"--embedding quantizes {module}, and --ignore {' '.join(named)} leaves it: one of both")
    return {module: LinearLayer(module, OF_NO_BLOCK, "embedding", *checkpoint.spec(f"{module}.weight").shape)}


def other_embeddings(checkpoint: Checkpoint) -> list[str]:
    """The modules of further tables, of positions, of layers or of towers, which are of the embedding's class."""
    own = _embedding(checkpoint, "--embedding")
    names = [name for name in sorted(checkpoint.names) if name != own and "embed" in name and name.endswith(".weight")]
    return [name.removesuffix(".weight") for name in names if len(checkpoint.spec(name).shape) == 2]


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a model whose head has a weight of its own."""
    found = config | {"tie_word_embeddings": False}
    if isinstance(text := found.get("text_config"), dict):
        found["text_config"] = text | {"tie_word_embeddings": False}
    return found


def _text(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _embedding(checkpoint: Checkpoint, flag: str = "--lm-head") -> str:
    found = [
        name for name in sorted(checkpoint.names) if name.endswith(EMBEDDING) and not is_mtp(name, checkpoint.config)
    ]
    if len(found) != 1:
        there = ", ".join(found) or "none"
        what = "" if flag == "--embedding" else f"no {HEADS[0]}.weight of its own, and "
        raise QuantizeError(f"{flag}: the checkpoint has {what}{there} of what is called {EMBEDDING}; leave {flag} out")
    return found[0]
