"""What a head's config.json says: EAGLE's and SpecForge's, MiMo's, or that of speculators. Knows no tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.spec import DecoderSpec, UnsupportedModelError

OWN_KEYS = (
    "architectures",
    "draft_vocab_size",
    "eagle_aux_hidden_state_layer_ids",
    "eagle_config",
    "fc_norm",
    "norm_before_fc",
    "norm_before_residual",
    "norm_output",
    "target_hidden_size",
)
"""Those of a head, beside a decoder's, in the file of EAGLE and SpecForge."""
PARALLEL = ("parallel_drafting", "ptd_token_id", "mask_token_id")


@dataclass(frozen=True)
class EagleConfig:
    """An EAGLE-3 head.

    spec             its one layer
    draft_vocab_size  rows of its lm_head; None: as many as the model has
    layer_ids        what it reads: j is what the model's layer j - 1 says, as in vLLM; None: the usual ones
    state_norms      of each layer that it reads, of all side by side, or of none
    target_hidden_size  of the model; None: its own
    residual_normed, hidden_normed  as in EagleHead
    """

    spec: DecoderSpec
    draft_vocab_size: int | None
    layer_ids: tuple[int, ...] | None
    state_norms: Literal["none", "all", "each"]
    target_hidden_size: int | None
    residual_normed: bool
    hidden_normed: bool

    def ids_of(self, num_layers: int) -> tuple[int, ...]:
        """Of a model of so many layers. Raises LoadError."""
        ids = self.layer_ids or (2, num_layers // 2, num_layers - 3)
        if wrong := [number for number in ids if not 1 <= number <= num_layers]:
            named = "eagle_aux_hidden_state_layer_ids" if self.layer_ids else "it has no layer ids, whose default"
            raise LoadError(
                f"{named} {list(ids)}: {wrong[0]} is no layer's output of the model, which has {num_layers} layers; "
                f"1 to {num_layers} work"
            )
        return ids


def method_of(config: dict[str, Any]) -> str | None:
    """The method that drafts with what this config.json describes; None: it is no head."""
    kind = config.get("speculators_model_type")
    if isinstance(kind, str):
        return kind
    return "eagle3" if "draft_vocab_size" in config or "eagle_config" in config else None


def read_eagle_config(config: dict[str, Any]) -> EagleConfig:
    """Raises LoadError for what isn't an EAGLE-3 head, or one that can't be served, with the key that says so."""
    inner = _layer_config(config, "eagle3")
    eagle = config.get("eagle_config") or {}
    if not isinstance(eagle, dict):
        raise LoadError(f"eagle_config {eagle!r} is no object")
    if eagle.get("use_aux_hidden_state") is False:
        raise LoadError("eagle_config.use_aux_hidden_state false: that is EAGLE-1; EAGLE-3 and MTP are supported")
    if found := [key for key in PARALLEL if config.get(key)]:
        raise LoadError(f"{found[0]} = {config[found[0]]!r}: a head that says several tokens at once is not supported")
    ids = _layer_ids(config)
    if ids is None and (outputs := _layer_ids(eagle)):
        ids = [number + 1 for number in outputs]  # SpecForge and SGLang name layers, and not what stands before one
    return EagleConfig(
        spec=one_layer(inner),
        draft_vocab_size=_size(config, "draft_vocab_size"),
        layer_ids=None if not ids else tuple(ids),
        state_norms="all" if config.get("norm_before_fc") else "each" if config.get("fc_norm") else "none",
        target_hidden_size=_size(config, "target_hidden_size"),
        residual_normed=bool(config.get("norm_before_residual")),
        hidden_normed=bool(config.get("norm_output")),
    )


@dataclass(frozen=True)
class MtpConfig:
    """An MTP head. prefix: of its tensors. token_first: as in MtpHead. is_model: it lies in a model's checkpoint."""

    spec: DecoderSpec
    prefix: str
    token_first: bool
    is_model: bool


def read_mtp_config(config: dict[str, Any]) -> MtpConfig:
    """Raises LoadError for what has no MTP layer that is known here."""
    is_model = config.get("speculators_model_type") is None
    kind = config.get("model_type")
    if is_model and kind != "mimo":
        raise LoadError(
            f"model_type {kind!r} has no MTP layer that octavo reads; those of MiMo, and of speculators for Qwen3, work"
        )
    count = config.get("num_nextn_predict_layers", 0 if is_model else 1)
    if count != 1:
        raise LoadError(f"num_nextn_predict_layers {count}: heads of one layer are what is supported")
    spec = one_layer(_layer_config(config, "mtp") | {"num_hidden_layers": 1})
    return MtpConfig(spec, "model.mtp_layers.0." if is_model else "mtp_layers.0.", not is_model, is_model)


def _layer_ids(config: dict[str, Any]) -> list[int] | None:
    ids = config.get("eagle_aux_hidden_state_layer_ids")
    if ids is not None and not (isinstance(ids, list) and all(type(number) is int for number in ids)):
        raise LoadError(f"eagle_aux_hidden_state_layer_ids {ids!r} is no list of integers")
    return ids


def _size(config: dict[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise LoadError(f"{key} {value!r} is no size")
    return value


def _layer_config(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """The config of the decoder layer, which speculators keeps in an object of its own."""
    of_speculators = config.get("speculators_model_type")
    if of_speculators is None:
        return {key: value for key, value in config.items() if key not in OWN_KEYS}
    if of_speculators != kind:
        raise LoadError(f"speculators_model_type {of_speculators!r}: {kind!r} is what was asked for")
    inner = config.get("transformer_layer_config")
    if not isinstance(inner, dict):
        raise LoadError("there is no transformer_layer_config, which a head of speculators has")
    return {key: value for key, value in inner.items() if key != "architectures"}


def one_layer(config: dict[str, Any]) -> DecoderSpec:
    """The decoder layer of a head. Raises LoadError."""
    count = config.get("num_hidden_layers", 1)
    if count != 1:
        raise LoadError(f"num_hidden_layers {count}: heads of one layer are what is supported")
    kinds = config.get("layer_types")
    own = {"num_hidden_layers": 1} | ({"layer_types": kinds[:1]} if isinstance(kinds, list) else {})
    try:
        spec = DecoderSpec.from_hf(config | own)
    except UnsupportedModelError as error:
        raise LoadError(str(error).removeprefix("config.json: ").partition("; --model-impl")[0]) from error
    if spec.norms != "pre" or spec.moe is not None or spec.fused_qkv or spec.has_latents:
        raise LoadError(f"model_type {config.get('model_type')!r}: the layer of a head is Llama's or Qwen's")
    return replace(spec, tied=False)
