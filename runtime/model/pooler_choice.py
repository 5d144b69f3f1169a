"""Whether a model is served for pooled requests, and which pooler it gets: out of its files, its class, and flags.

vLLM's rules and names. --runner pooling, or a class that generates nothing; --convert says what a model becomes whose
class is another. What a checkpoint says of its pooling (sentence-transformers' modules.json, its config.json) holds,
and --pooler-config changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from octavo.runtime.config import EngineConfig, PoolerConfig
from octavo.runtime.model.families.encoding import HeadStep
from octavo.runtime.model.families.registry import ENCODERS
from octavo.runtime.model.pooling import Pooler, PoolingKind, Probabilities, Projection
from octavo.runtime.model.sentence_files import MODULES, SentenceModules, read_modules
from octavo.runtime.model.sources import LoadError

Purpose = Literal["embed", "classify", "token_classify"]
ReadHead = Callable[[HeadStep, int], Projection]  # (step, rows of its weight)
_KIND_OF: dict[str, PoolingKind] = {"CLS": "cls", "MEAN": "mean", "LAST": "last", "MAX": "max"}
_PURPOSES: dict[str, Purpose] = {
    "ForSequenceClassification": "classify",
    "ForRewardModel": "classify",
    "ForProcessRewardModel": "token_classify",
    "ForTokenClassification": "token_classify",
}
_EMBEDS = ("Model", "ForMaskedLM", "ForPreTraining", "ForCausalLM", "LMHeadModel")
MANY_LABELS = 1 << 16


def is_pooled(config: EngineConfig, hf_config: Mapping[str, Any]) -> bool:
    """Whether this model answers pooled requests alone. Raises LoadError where it can't be as asked."""
    is_encoder = hf_config.get("model_type") in ENCODERS
    if config.runner == "generate" and is_encoder:
        raise LoadError(
            f"--runner generate: {hf_config['model_type']} is an encoder, which generates nothing; leave it out"
        )
    pooled = config.runner == "pooling"
    if config.runner == "auto":
        pooled = is_encoder or config.convert in ("embed", "classify") or _is_pooled_class(class_of(hf_config))
    if not pooled and config.pooler_config != PoolerConfig():
        raise LoadError("--pooler-config: this model generates text; --runner pooling makes embeddings of it")
    return pooled


def class_of(hf_config: Mapping[str, Any]) -> str:
    """The first architecture that a config.json names; empty: it names none."""
    classes = hf_config.get("architectures") or [""]
    return str(classes[0])


def _is_pooled_class(name: str) -> bool:
    return name.endswith(tuple(_PURPOSES)) or (name.endswith("Model") and not name.endswith("LMHeadModel"))


def purpose_of(config: EngineConfig, hf_config: Mapping[str, Any]) -> Purpose:
    """What the model is served for. Raises LoadError for a class that makes nothing which is known here."""
    name = class_of(hf_config)
    own = next((purpose for ending, purpose in _PURPOSES.items() if name.endswith(ending)), None)
    if config.convert == "embed":
        return "embed"
    if config.convert == "classify":
        return own or "classify"
    if own is not None:
        return own
    if name and not name.endswith(_EMBEDS):
        raise LoadError(f"architecture {name!r} makes no embeddings and no scores; --convert embed leaves its head out")
    return "embed"


@dataclass(frozen=True)
class PoolerParts:
    """What a model offers to its pooler.

    kind            how vectors are made of its hidden states where nothing says it
    sequence, token the steps of its classifiers; classifier_kind: how the vector is made that the former reads
    read            reads one step's weights
    """

    hidden_size: int
    kind: PoolingKind
    sequence: Sequence[HeadStep]
    token: Sequence[HeadStep]
    classifier_kind: PoolingKind
    read: ReadHead


def make_pooler(config: EngineConfig, hf_config: Mapping[str, Any], parts: PoolerParts, notes: list[str]) -> Pooler:
    """The pooler of a model that `is_pooled`; what a person should know of it is added to notes."""
    modules = read_modules(Path(config.model))
    purpose = purpose_of(config, hf_config)
    pooler = (
        _embedder(hf_config, parts, modules, config, notes)
        if purpose == "embed"
        else _classifier(hf_config, parts, purpose)
    )
    given = config.pooler_config
    if given.kind is not None:
        pooler = replace(pooler, kinds=(_KIND_OF[given.kind],))
    if given.use_activation is not None:
        pooler = replace(pooler, normalizes=given.use_activation, activates=given.use_activation)
    return pooler


def _embedder(
    hf_config: Mapping[str, Any],
    parts: PoolerParts,
    modules: SentenceModules | None,
    config: EngineConfig,
    notes: list[str],
) -> Pooler:
    given = config.pooler_config
    kinds = () if modules is None else modules.kinds
    if not kinds:
        kinds = (parts.kind,)
        if given.kind is None:
            notes.append(
                f"the checkpoint has no {MODULES}: embeddings are the {parts.kind} hidden state, normalized, as vLLM "
                'has them (--pooler-config \'{"pooling_type": "MEAN"}\' makes them means)'
            )
    projections = () if modules is None else modules.projections
    size = parts.hidden_size * len(kinds)
    for projection in projections:
        if projection.weight.shape[1] != size:
            raise LoadError(f"{MODULES}: a Dense module reads {projection.weight.shape[1]} numbers; there are {size}")
        size = len(projection.weight)
    dimensions = _dimensions(hf_config)
    cut = given.dimensions
    if cut is not None and cut > size:
        raise LoadError(f"--pooler-config: dimensions {cut}: embeddings have {size}")
    return Pooler(
        tasks=("embed", "token_embed"),
        kinds=kinds,
        projections=projections,
        size=size,
        normalizes=modules is None or modules.normalizes,
        dimensions=dimensions,
        cut=cut,
    )


def _dimensions(hf_config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The sizes that Matryoshka embeddings may be cut to: any, where the config says no more."""
    listed = hf_config.get("matryoshka_dimensions")
    if isinstance(listed, list) and all(type(size) is int and size > 0 for size in listed):
        return tuple(sorted(listed))
    return None if hf_config.get("is_matryoshka") else ()


def _classifier(hf_config: Mapping[str, Any], parts: PoolerParts, purpose: Purpose) -> Pooler:
    steps = parts.sequence if purpose == "classify" else parts.token
    if not steps:
        raise LoadError(
            f"--convert classify: {class_of(hf_config) or 'this model'} has no classifier, and the checkpoint names "
            "no tokens to tell apart"
        )
    labels = num_labels(hf_config)
    projections = [parts.read(step, parts.hidden_size) for step in steps[:-1]]
    projections.append(parts.read(steps[-1], labels))
    return Pooler(
        tasks=("classify", "token_classify") if purpose == "classify" else ("token_classify",),
        kinds=(parts.classifier_kind,),
        projections=tuple(projections),
        size=labels,
        probabilities=probabilities_of(hf_config, labels),
    )


def num_labels(hf_config: Mapping[str, Any]) -> int:
    """Rows of a classifier; transformers' default is two."""
    labels = hf_config.get("id2label")
    count = len(labels) if isinstance(labels, dict) and labels else hf_config.get("num_labels", 2)
    if type(count) is not int or not 0 < count < MANY_LABELS:
        raise LoadError(f"config.json: num_labels is {count!r}; it must be a number from 1 up")
    return count


def probabilities_of(hf_config: Mapping[str, Any], labels: int) -> Probabilities:
    """What logits become: as sentence-transformers' CrossEncoder has it, or as the kind of problem says."""
    own = hf_config.get("sentence_transformers")
    named = own.get("activation_fn") if isinstance(own, dict) else None
    named = named or hf_config.get("sbert_ce_default_activation_function")
    if named is not None:
        last = str(named).rpartition(".")[2].lower()
        known: dict[str, Probabilities] = {"identity": "none", "sigmoid": "sigmoid", "softmax": "softmax"}
        if last not in known:
            raise LoadError(f"config.json: activation_fn {named!r} is unknown; Identity, Sigmoid and Softmax are known")
        return known[last]
    match hf_config.get("problem_type"):
        case "regression":
            return "none"
        case "multi_label_classification":
            return "sigmoid"
    return "sigmoid" if labels == 1 else "softmax"
