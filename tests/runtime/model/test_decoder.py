"""The decoder against Hugging Face's own modelling code, for each architecture, in chunks and mixed batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_oracle import CASES, make_hf, save, scattered_logits
from torch import Tensor

from octavo.kernels.attention.cache import QueryScale
from octavo.runtime.config import EngineConfig
from octavo.runtime.model import weights
from octavo.runtime.model.spec import DecoderSpec, Mixer
from octavo.runtime.model.state_mixers import Mamba2Spec

LENGTHS = (37, 21, 30)

Change = Callable[[DecoderSpec], DecoderSpec]


def changed(**fields: Any) -> Change:
    return lambda spec: dataclasses.replace(spec, **fields)


def layers_changed(**fields: Any) -> Change:
    """Change a field of every layer's attention that has something there."""

    def change(spec: DecoderSpec) -> DecoderSpec:
        key = next(iter(fields))
        mixers = [x.mixer for x in spec.layers]
        return with_mixers(
            spec, [dataclasses.replace(x, **fields) if getattr(x, key) is not None else x for x in mixers]
        )

    return change


def rope_changed(**fields: Any) -> Change:
    def change(spec: DecoderSpec) -> DecoderSpec:
        mixers = [x.mixer for x in spec.layers]
        ropes = [x.rope and dataclasses.replace(x.rope, **fields) for x in mixers]
        return with_mixers(spec, [dataclasses.replace(x, rope=r) for x, r in zip(mixers, ropes, strict=True)])

    return change


def routing_changed(**fields: Any) -> Change:
    def change(spec: DecoderSpec) -> DecoderSpec:
        assert spec.moe is not None
        return moe_changed(routing=dataclasses.replace(spec.moe.routing, **fields))(spec)

    return change


def moe_changed(**fields: Any) -> Change:
    def change(spec: DecoderSpec) -> DecoderSpec:
        assert spec.moe is not None
        return dataclasses.replace(spec, moe=dataclasses.replace(spec.moe, **fields))

    return change


# One wrong feature each: the comparison must see it.
MUTATIONS: dict[str, tuple[str, Change]] = {
    "theta": ("llama", rope_changed(theta=600.0)),
    "linear": ("llama-linear", rope_changed(factor=2.5)),
    "llama3": ("llama-llama3", rope_changed(high_freq_factor=5.0)),
    "llama3 factor": ("llama-llama3", rope_changed(factor=5.0)),
    "llama3 low": ("llama-llama3", rope_changed(low_freq_factor=1.5)),
    "yarn beta_fast": ("llama-yarn", rope_changed(beta_fast=1.5)),
    "yarn truncate": ("llama-yarn-mscale", rope_changed(truncate=True)),
    "yarn mscale": ("llama-yarn-mscale", rope_changed(attention_factor=0.1 * math.log(4.0) + 1)),
    "yarn ramp": ("llama-yarn", rope_changed(beta_slow=0.75)),
    "yarn attention factor": ("llama-yarn", rope_changed(attention_factor=1.0)),
    "longrope": ("phi3", rope_changed(original_max_position=64)),
    "longrope factors": ("phi3-short", rope_changed(original_max_position=16)),
    "longrope attention factor": ("phi3", rope_changed(attention_factor=1.0)),
    "partial rotary": ("phi3", rope_changed(rope_type="default", rotary_dim=16)),
    "window": ("mistral", layers_changed(window=8)),
    "window by layer": ("qwen2", layers_changed(window=None)),
    "window by parity": ("gemma2", lambda spec: windows_shifted(spec)),
    "window by pattern": ("gemma3_text", lambda spec: windows_shifted(spec)),
    "norm eps": ("olmo2", changed(norm_eps=1e-2)),
    "activation": ("llama", changed(activation="gelu_tanh")),
    "attention scale": ("granite", changed(attention_scale=0.29)),
    "attention soft cap": ("gemma2", changed(attention_soft_cap=2.1)),
    "final soft cap": ("gemma2", changed(final_soft_cap=3.1)),
    "norm offset": ("gemma2", changed(norm_offset=0.0)),
    "query scale": ("gemma3_text", changed(attention_scale=24**-0.5)),
    "local rope": ("gemma3_text", rope_changed(theta=1e6, rope_type="default")),
    "embedding scale": ("granite", changed(embedding_scale=11.0)),
    "embedding scale of Gemma": ("gemma2", changed(embedding_scale=8.1)),
    "residual multiplier": ("granite", changed(residual_multiplier=0.25)),
    "logits divisor": ("granite", changed(logits_divisor=0.26)),
    "layers without rope": ("smollm3", lambda spec: rope_everywhere(spec)),
    "experts' weights that sum to one": ("mixtral", routing_changed(normalize=False)),
    "experts' weights as they are": ("qwen2_moe", routing_changed(normalize=True)),
    "number of experts": ("qwen3_moe", routing_changed(top_k=2)),
    "scores of experts": ("glm4_moe", routing_changed(scores="softmax")),
    "factor of experts' weights": ("glm4_moe", routing_changed(factor=1.6)),
    "groups of experts": ("glm4_moe", routing_changed(num_groups=1, top_groups=1)),
    "scores of groups": ("glm4_moe", routing_changed(group_score="best")),
    "limit of a clamped SwiGLU": ("gpt_oss", changed(swiglu_limit=1.5)),
    "slope of a clamped SwiGLU": ("gpt_oss", changed(swiglu_alpha=1.5)),
    "slope of queries": ("ministral3", layers_changed(query_scale=QueryScale(0.6, 16))),
    "period of queries": ("ministral3", layers_changed(query_scale=QueryScale(0.7, 17))),
    "windows that don't slide": ("llama4_text", layers_changed(is_chunked=False)),
    "where windows that don't slide begin": ("llama4_text-blocks", layers_changed(window=9)),
    "neighbors that rotate": ("llama4_text", layers_changed(interleaved=False)),
    "first position of queries": ("llama4_text", layers_changed(query_scale=QueryScale(0.7, 5))),
    "norms without weights": ("llama4_text", changed(qk_norm=None)),
    "weights of experts' inputs": ("llama4_text", routing_changed(weighs="outputs")),
    "limits of time steps": ("granitemoehybrid-dense", lambda spec: time_steps_unlimited(spec)),
    "factor of gates": ("falcon_h1", changed(gate_factor=1.2)),
    "factor of the MLP": ("falcon_h1", changed(mlp_factor=0.65)),
    "factor of attention": ("falcon_h1", lambda spec: beside_changed(spec, attention_factor=0.7)),
    "factor of the state space": ("falcon_h1", lambda spec: beside_changed(spec, factor=0.8)),
    "limits of time steps of layers alone": ("nemotron_h", lambda spec: time_steps_unlimited(spec)),
    "rope of layers with a window": ("olmo3", lambda spec: one_rope(spec)),
    "window of alternate layers": ("qwen2_moe", lambda spec: windows_shifted(spec)),
    "norm of values": ("gemma4_text", changed(norms_values=False)),
    "pairs that turn": ("gemma4_text", rope_changed(turning_pairs=12)),
    "scales of experts' weights": ("gemma4_text-moe", routing_changed(normalize=False)),
    "gates that are left out": ("gemma3n_text", lambda spec: without_sparsity(spec)),
    "the part that layers compute": ("gemma3n_text", lambda spec: streams_changed(spec, active=0)),
    "numbers of the active part": ("gemma3n_text", lambda spec: streams_changed(spec, scales_corrected=False)),
    "whose cache is read": ("gemma4_text-small", lambda spec: source_shifted(spec)),
}


def time_steps_unlimited(spec: DecoderSpec) -> DecoderSpec:
    mixers = [layer.mixer for layer in spec.layers]
    return with_mixers(
        spec,
        [
            dataclasses.replace(mixer, shape=dataclasses.replace(mixer.shape, dt_limits=(0.0, math.inf)))
            if isinstance(mixer, Mamba2Spec)
            else mixer
            for mixer in mixers
        ],
    )


def beside_changed(spec: DecoderSpec, **fields: Any) -> DecoderSpec:
    layers = (
        dataclasses.replace(layer, beside=layer.beside and dataclasses.replace(layer.beside, **fields))
        for layer in spec.layers
    )
    return dataclasses.replace(spec, layers=tuple(layers))


def rope_everywhere(spec: DecoderSpec) -> DecoderSpec:
    rope = spec.layers[0].mixer.rope
    return with_mixers(spec, [dataclasses.replace(x.mixer, rope=rope) for x in spec.layers])


def one_rope(spec: DecoderSpec) -> DecoderSpec:
    """Each layer with the last one's."""
    mixers = [layer.mixer for layer in spec.layers]
    return with_mixers(spec, [dataclasses.replace(mixer, rope=mixers[-1].rope) for mixer in mixers])


def windows_shifted(spec: DecoderSpec) -> DecoderSpec:
    """Each layer with the window of the one before it."""
    mixers = [layer.mixer for layer in spec.layers]
    windows = [mixer.window for mixer in mixers]
    shifted = zip(mixers, windows[-1:] + windows, strict=False)
    return with_mixers(spec, [dataclasses.replace(mixer, window=window) for mixer, window in shifted])


def source_shifted(spec: DecoderSpec) -> DecoderSpec:
    """Layers with a window that read another one's cache with that of the first layer."""
    mixers = [layer.mixer for layer in spec.layers]
    return with_mixers(spec, [dataclasses.replace(x, source=0) if x.window and x.source else x for x in mixers])


def without_sparsity(spec: DecoderSpec) -> DecoderSpec:
    return dataclasses.replace(spec, layers=tuple(dataclasses.replace(x, sparsity=0.0) for x in spec.layers))


def streams_changed(spec: DecoderSpec, **fields: Any) -> DecoderSpec:
    assert spec.streams is not None
    return dataclasses.replace(spec, streams=dataclasses.replace(spec.streams, **fields))


def with_mixers(spec: DecoderSpec, mixers: list[Mixer]) -> DecoderSpec:
    layers = [dataclasses.replace(layer, mixer=mixer) for layer, mixer in zip(spec.layers, mixers, strict=True)]
    return dataclasses.replace(spec, layers=tuple(layers))


def bound(reference: Tensor) -> float:
    """What float32 rounding can do to a logit.

    A logit ends a chain of 4 layers of some 12 operators (norms, dot products of at most 96 terms, softmax). Each adds
    an error of about eps = 2^-24 times sqrt(96) ~ 10, relative to its vector, which later layers amplify at most some
    tenfold (their weights keep sizes, see `randomize`): 48 * 10 eps * 10 is 3e-4 of the logits' size.
    """
    return 3e-4 * float(reference.abs().max())


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 96, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.inference_mode()
def hf_logits(model: Any, token_ids: list[list[int]]) -> list[Tensor]:
    return [model(torch.tensor([ids]), use_cache=False).logits[0] for ids in token_ids]


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def config_for(name: str, directory: Path) -> EngineConfig:
    """phi3-short is served to the length of its pretraining, which chooses the short factors."""
    return EngineConfig(model=str(directory), dtype="float32", max_model_len=40 if name == "phi3-short" else None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each case's directory, filled by `oracle` when it is first asked for."""
    return {name: tmp_path_factory.mktemp(name) for name in CASES}


@pytest.fixture(scope="module")
def oracle(models: dict[str, Path]) -> Callable[[str], tuple[Path, list[Tensor]]]:
    """A case's checkpoint and Hugging Face's logits for the prompts."""
    known: dict[str, list[Tensor]] = {}

    def get(name: str) -> tuple[Path, list[Tensor]]:
        if name not in known:
            family, overrides = CASES[name]
            hf = make_hf(family, overrides)
            known[name] = hf_logits(hf, prompts())
            save(hf, models[name])
        return models[name], known[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_hugging_faces(name: str, oracle: Callable[[str], tuple[Path, list[Tensor]]]) -> None:
    """phi3's prompts are all longer than its pretraining, where HF too takes the long factors; phi3-short's none."""
    directory, theirs = oracle(name)
    ours = scattered_logits(weights.load_model(config_for(name, directory)), prompts())
    assert float(torch.cat(theirs).std()) > 0.3, "trivially small logits prove nothing"
    assert worst(ours, theirs) < bound(torch.cat(theirs))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_feature_is_seen(
    name: str, oracle: Callable[[str], tuple[Path, list[Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, change = MUTATIONS[name]
    directory, theirs = oracle(case)
    read = DecoderSpec.from_hf
    monkeypatch.setattr(weights.DecoderSpec, "from_hf", lambda config, **how: change(read(config, **how)))
    ours = scattered_logits(weights.load_model(config_for(case, directory)), prompts())
    assert worst(ours, theirs) > 3 * bound(torch.cat(theirs))
