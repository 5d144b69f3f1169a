"""`octavo quantize` of an encoder: its layers are rounded, all else goes along, and the loss is told in cosines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_oracle import SIZES, made
from tiny_encoders import CrossEncoder, SentenceModel, save_tokenizer

from octavo.calibration.layers import QuantizeError
from octavo.calibration.recipe import parse_scheme
from octavo.jobs import encoder_layers
from octavo.jobs.embedding_quality import measure_embeddings, vectors_of
from octavo.jobs.measured_text import QualityError
from octavo.jobs.quantize import quantize
from octavo.kernels.attention.step import StepInputs
from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.config import Dtype, EngineConfig
from octavo.runtime.messages import PoolingParams
from octavo.runtime.model.encoder import Encoder
from octavo.runtime.model.weights import load_model
from octavo.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def sentence(tmp_path_factory: pytest.TempPathFactory) -> SentenceModel:
    return SentenceModel(tmp_path_factory.mktemp("sentence"))


@pytest.mark.parametrize(("scheme", "least"), [("W8A8", 0.98), ("W8A16@32", 0.995)])
def test_an_encoder_is_quantized_and_served(scheme: str, least: float, sentence: SentenceModel, tmp_path: Path) -> None:
    report = quantize(str(sentence.directory), tmp_path / "out", scheme=scheme, algorithm="rtn", ignore="lm_head")
    quality = measure_embeddings(sentence.directory, tmp_path / "out")
    assert quality == report.embeddings
    assert least < quality.least < quality.mean < 1
    quantized = Checkpoint.open(tmp_path / "out").quantization
    assert quantized is not None
    model = load_model(EngineConfig(model=str(tmp_path / "out"), dtype="float32"))
    assert isinstance(model, Encoder)
    assert {linear.scheme for layer in model.linears() for linear in layer.values()} == {str(parse_scheme(scheme))}
    ids = sentence.tokenizer.encode("the cat sat on a mat").ids
    step = StepInputs.prefill([len(ids)], 64, token_ids=ids, logits_index=torch.arange(len(ids)))
    (found,) = model.pooler.pool([model.hidden(step, [])], [PoolingParams()])
    assert float(found @ sentence.embedding(ids)) > least


def test_what_labels_are_computed_from_is_compared(tmp_path: Path) -> None:
    """A single logit has a sign and no direction: its cosine would be 1 or -1."""
    cross = CrossEncoder(tmp_path / "plain")
    texts = ["the cat sat on a mat", "red"]
    own = vectors_of(_loaded(cross.directory, "float32"), texts, Tokenizer.open(cross.directory))
    with torch.inference_mode():
        ids = [torch.tensor([cross.tokenizer.encode(text).ids]) for text in texts]
        theirs = torch.cat([cross.model.bert(each).pooler_output for each in ids])
    torch.testing.assert_close(own, theirs, rtol=0, atol=1e-5)
    quantize(str(cross.directory), tmp_path / "out", scheme="W8A8", algorithm="rtn", evaluate=False, ignore="lm_head")
    quality = measure_embeddings(cross.directory, tmp_path / "out")
    assert 0.98 < quality.least < quality.mean < 1


def test_layers_that_cost_most_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer reads a channel far above the others, and costs most. LEAST is made for a tiny model."""
    sentence = SentenceModel(tmp_path / "plain")
    with torch.no_grad():
        sentence.model.embeddings.LayerNorm.weight[5] *= 40
    sentence.model.save_pretrained(sentence.directory)
    how: dict[str, Any] = {"scheme": "W8A8", "algorithm": "rtn", "evaluate": False}
    quantize(str(sentence.directory), tmp_path / "all", **how, ignore="lm_head")
    loss = 1 - measure_embeddings(sentence.directory, tmp_path / "all", dtype="float32").mean
    monkeypatch.setattr(encoder_layers, "LEAST", 1 - loss / 4)
    monkeypatch.setattr(encoder_layers, "MARGIN", 0.0)
    report = quantize(str(sentence.directory), tmp_path / "out", **how)
    assert 1 - measure_embeddings(sentence.directory, tmp_path / "out", dtype="float32").mean < loss / 2
    (said,) = [note for note in report.warnings if "linear layers stay as they are" in note]
    assert "0.qkv" in said
    names = Checkpoint.open(tmp_path / "out").names
    assert "encoder.layer.0.attention.self.query.weight_scale" not in names
    assert any(name.endswith(".weight_scale") for name in names)


def test_another_model_is_no_quantization(sentence: SentenceModel, tmp_path: Path) -> None:
    """Whose vectors have as many numbers, too, of which the cosines would mean nothing."""
    made("Bert", SIZES, "Model", tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(QualityError, match=r"\(bert, 3 layers of 64, a vocabulary of 120\) is no quantization of"):
        measure_embeddings(sentence.directory, tmp_path)
    with pytest.raises(QualityError, match="is no quantization of"):  # whose tokens the other doesn't all have
        measure_embeddings(tmp_path, sentence.directory)


def test_what_calibrates_is_refused(sentence: SentenceModel, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="this model is an encoder; algorithm rtn"):
        quantize(str(sentence.directory), tmp_path / "out", scheme="W4A16@32", algorithm="gptq")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"bits_budget": 5.0}, "the sensitivity of an encoder's layers isn't measured, so that no target can"),
        ({"kv_cache": "fp8"}, "kv_cache: an encoder's keys and values aren't measured; leave it out"),
        ({"rotations": ["R1"]}, "rotations: an encoder isn't rotated; leave them out"),
    ],
)
def test_what_is_done_with_decoders_alone_is_refused_by_name(
    options: dict[str, Any], why: str, sentence: SentenceModel, tmp_path: Path
) -> None:
    with pytest.raises(QuantizeError, match=why):
        quantize(str(sentence.directory), tmp_path / "out", scheme="W8A8", **options)


def test_a_limit_of_what_is_not_measured_is_refused(sentence: SentenceModel, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=r"--max-kl 0.1: a KL is measured of decoders alone"):
        quantize(str(sentence.directory), tmp_path / "out", scheme="W8A8", max_kl=0.1)


def test_inputs_are_balanced_with_weights_where_they_are_rounded_at_load(tmp_path: Path) -> None:
    """A channel far above the others, as real encoders have some, takes a token's scale from all of its others."""
    sentence = SentenceModel(tmp_path / "plain")
    with torch.no_grad():
        sentence.model.embeddings.LayerNorm.weight[5] *= 40
    sentence.model.save_pretrained(sentence.directory)
    quantize(
        str(sentence.directory), tmp_path / "out", scheme="W8A8", algorithm="rtn", evaluate=False, ignore="lm_head"
    )
    truth = _loaded(sentence.directory, "float32")
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 40
    wanted = truth.stack.layers[0].attention.qkv.forward(x, None)
    plain = _loaded(tmp_path / "out", "bfloat16").stack.layers[0].attention
    balanced = _loaded(sentence.directory, "int8").stack.layers[0].attention
    assert plain.input_factor is None
    assert balanced.input_factor is not None
    errors = [
        float((layer.qkv.forward(own.bfloat16(), None).float() - wanted).norm())
        for layer, own in ((plain, x), (balanced, x * balanced.input_factor))
    ]
    assert errors[1] < errors[0] * 2 / 3  # 12.9 and 24.0


def _loaded(directory: Path, dtype: Dtype) -> Encoder:
    model = load_model(EngineConfig(model=str(directory), dtype=dtype))
    assert isinstance(model, Encoder)
    return model
