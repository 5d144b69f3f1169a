"""Rotations that are folded into weights: the same model before anything is rounded, and refused where it isn't."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import transformers
from calibrated import held_out_tokens
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix
from hf_oracle import CASES, make_hf, save
from rotated_copies import rotated_copy
from safetensors.torch import load_file, save_file
from served import logits_of
from slow_cases import slow

import octavo
from octavo.calibration.algorithms.rotation import make_rotation, paley
from octavo.calibration.layers import QuantizeError
from octavo.calibration.recipe import Recipe, RecipeError, read_recipe
from octavo.calibration.report.compare_checkpoints import compare_checkpoints
from octavo.calibration.rotated import rotated
from octavo.cli import main
from octavo.jobs.quantize_job import Listener
from octavo.jobs.rotated_source import rotated_source
from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.model.rotation_map import rotation_map

SAME = 1e-4  # of logits in float32: of each one, or of all against their size
QUICK = ("llama", "qwen2", "qwen3", "phi3", "gpt_oss", "qwen2_moe", "falcon_h1")
OF_R1 = [name for name in CASES if not name.startswith(("gemma", "olmo2", "olmo3"))]
COMPARED = [name for name in CASES if name != "phi3-short"]  # whose rope transformers chooses by a text's length
NO_R2 = [
    name
    for name in CASES
    if name.startswith(("deepseek", "glm4_moe_lite", "mistral4", "gemma4", "gemma3n", "qwen3_next", "qwen3_5"))
    or name in ("mamba2", "kimi_linear")
]


def ids(config: transformers.PretrainedConfig, length: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, config.vocab_size, (2, length), generator=generator)


def rotations_of(name: str) -> tuple[str, ...]:
    return tuple(r for r, refused in (("R1", name not in OF_R1), ("R2", name in NO_R2)) if not refused)


@pytest.mark.parametrize("order", [4, 12, 20, 28, 36, 60, 76, 108, 140, 148, 924])
def test_paleys_matrices_are_hadamards(order: int) -> None:
    matrix = paley(order)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [6, 10, 172, 92])
def test_what_paley_has_no_matrix_for(order: int) -> None:
    assert paley(order) is None


@pytest.mark.parametrize(
    ("size", "block_size", "span"),
    [
        (576, None, 576),
        (896, None, 896),
        (1536, None, 1536),
        (4864, None, 4864),
        (64, None, 64),
        (576, 32, 32),
        (1376, None, 32),
        (24, None, 24),
        (7, None, 1),
    ],
)
def test_a_rotation_is_orthogonal_and_spreads_a_channel_evenly(size: int, block_size: int | None, span: int) -> None:
    rotation = make_rotation(size, block_size=block_size, seed=5)
    rows = torch.eye(size, dtype=torch.float64)[: 2 * span : max(1, span // 3)]
    turned = rotation.apply(rows)
    torch.testing.assert_close(turned @ turned.t(), torch.eye(len(rows), dtype=torch.float64))
    assert rotation.span == span
    torch.testing.assert_close(turned.abs().amax(1), torch.full((len(rows),), span**-0.5, dtype=torch.float64))
    x = torch.randn(3, size, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(x).norm(dim=1), x.norm(dim=1))


def test_sylvesters_matrix_is_compressed_tensors_own() -> None:
    for size in (2, 64, 256):
        matrix = make_rotation(size).apply(torch.eye(size, dtype=torch.float64))
        torch.testing.assert_close(matrix, deterministic_hadamard_matrix(size, torch.float64) * size**-0.5)


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in COMPARED])
def test_rotated_it_is_the_same_model(name: str, tmp_path: Path) -> None:
    """Which transformers computes as it is, and octavo from what is rotated."""
    asked = rotations_of(name)
    if not asked:
        pytest.skip("nothing of it can be rotated, see below")
    model = make_hf(*CASES[name])
    tokens = ids(model.config)
    with torch.no_grad():
        expected = model(tokens).logits
    source = save(model, tmp_path / "model")
    turned = rotated_copy(source, tmp_path / "rotated", Recipe("W4A16", rotations=asked))
    found = logits_of(turned, tokens)
    assert (found - expected).norm() < SAME * expected.norm()
    before = load_file(source / "model.safetensors")
    after = load_file(turned / "model.safetensors")
    moved = {key for key in before.keys() & after.keys() if not torch.allclose(before[key], after[key])}
    assert any(key.endswith(("embed_tokens.weight", "embeddings.weight")) for key in moved) == ("R1" in asked)
    assert any(key.endswith(("o_proj.weight", "out_proj.weight")) for key in moved)


@pytest.mark.parametrize("how", [{}, {"transform_type": "hadamard"}, {"transform_block_size": 8}])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_transformers_loads_it_as_any_other(name: str, how: dict[str, object], tmp_path: Path) -> None:
    model = make_hf(*CASES[name])
    tokens = ids(model.config)
    source = save(model, tmp_path / "model")
    turned = rotated_copy(source, tmp_path / "rotated", Recipe("W4A16", rotations=("R1", "R2"), **how))
    again, told = transformers.AutoModelForCausalLM.from_pretrained(turned, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(tokens).logits, model(tokens).logits, atol=SAME, rtol=SAME)
    norms = [
        tensor for key, tensor in load_file(turned / "model.safetensors").items() if key.endswith("layernorm.weight")
    ]
    assert norms
    assert all(torch.equal(norm, torch.ones_like(norm)) for norm in norms)
    assert again.lm_head.weight.data_ptr() != again.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    ("name", "rotation", "reason"),
    [
        ("gemma3_text", "R1", "norms behind attention"),
        ("olmo2", "R1", "norms behind attention"),
        ("deepseek_v3", "R2", "latents"),
        ("qwen3_next", "R2", "a gate"),
        ("gemma4_text", "R2", "normed values"),
    ],
)
def test_what_would_be_another_model_is_refused(name: str, rotation: str, reason: str, tmp_path: Path) -> None:
    source = save(make_hf(*CASES[name]), tmp_path / "model")
    with pytest.raises(QuantizeError, match=f"{rotation}: .*{reason}"):
        rotated_copy(source, tmp_path / "rotated", Recipe("W4A16", rotations=(rotation,)))


def test_what_stands_beside_the_layers_is_refused(fixtures: Path, tmp_path: Path) -> None:
    """It would read a stream that is rotated, as an MTP head does."""
    checkpoint = Checkpoint.open(fixtures / "tiny")
    size = checkpoint.config["hidden_size"]
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(checkpoint.config))
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.names}
    save_file(tensors | {"mtp.fc.weight": torch.zeros(size, 2 * size)}, source / "model.safetensors")
    with pytest.raises(QuantizeError, match=r"R1: mtp.fc.weight .* stands beside the decoder's layers"):
        rotated_copy(source, tmp_path / "rotated", Recipe("W4A16", rotations=("R1",)))


def test_embeddings_are_made_of_what_is_rotated(tmp_path: Path) -> None:
    """sentence-transformers takes them behind the last norm, whose weight the head would have."""
    source = save(make_hf(*CASES["qwen3"]), tmp_path / "model")
    (source / "modules.json").write_text("[]")
    with pytest.raises(QuantizeError, match=r"R1: qwen3 has modules.json of sentence-transformers"):
        rotated_copy(source, tmp_path / "rotated", Recipe("W4A16", rotations=("R1",)))


def test_an_architecture_that_is_not_known_is_refused(fixtures: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(fixtures / "tiny")
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(checkpoint.config | {"model_type": "cohere"}))
    (source / "model.safetensors").symlink_to(fixtures / "tiny" / "model.safetensors")
    with pytest.raises(QuantizeError, match="model_type 'cohere' has no decoder here"):
        octavo.quantize(source, tmp_path / "out", scheme="W8A8", algorithm="rtn", rotations=("R1",))


def quantized(model: Path, out: Path, **how: object) -> dict[str, str]:
    """Hashes of what a job writes but its report, by the files' names."""
    tokens = list(held_out_tokens(model, 4, 64))
    data = {} if how.get("algorithm") == "rtn" else {"data": tokens}
    octavo.quantize(model, out, rotations=("R1", "R2"), evaluate=False, **data, **how)
    names = ("model.safetensors", "config.json", "recipe.json")
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq", pytest.param("tune", marks=pytest.mark.slow)])
def test_every_algorithm_takes_what_is_rotated(algorithm: str, fixtures: Path, tmp_path: Path) -> None:
    """transformers' logits of what is written are octavo's, and near those of the original."""
    out = tmp_path / "out"
    quantized(fixtures / "tiny", out, scheme="W8A16@32", algorithm=algorithm)
    tokens = held_out_tokens(fixtures / "tiny", 2, 64)
    ours = logits_of(out, tokens)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="float32").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=SAME, rtol=SAME)
    original = logits_of(fixtures / "tiny", tokens)
    assert (ours - original).norm() < 0.05 * original.norm()


def test_an_interrupted_run_goes_on_to_the_same_bytes(fixtures: Path, tmp_path: Path) -> None:
    how = {"scheme": "W4A16@32", "algorithm": "gptq"}
    whole = quantized(fixtures / "tiny", tmp_path / "whole", **how)

    def stop(_: float, __: float, what: str) -> None:
        if what.endswith("layers.1 inputs"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(fixtures / "tiny", tmp_path / "out", **how, listener=Listener(progress=stop))
    assert quantized(fixtures / "tiny", tmp_path / "out", **how, resume=True) == whole
    with pytest.raises(QuantizeError, match="another recipe"):
        quantized(fixtures / "tiny", tmp_path / "out", **how, resume=True, act_order="none")


def test_the_command_says_that_the_head_is_untied(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--scheme", "W8A8", "--algorithm", "rtn", "--rotations", "r1", "R2", "--transform-seed", "7", "--no-eval"]
    assert main(["quantize", str(fixtures / "tiny-qwen2"), "-o", str(out), *flags]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "lm_head is written beside the embedding that it was tied to" in said
    recipe = read_recipe(out / "recipe.json")
    assert (recipe.rotations, recipe.transform_seed) == (("R1", "R2"), 7)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head" in config["quantization_config"]["ignore"]


@pytest.mark.parametrize("rotation", ["R1", "R2"])
def test_what_lies_in_another_basis_is_not_compared(rotation: str, fixtures: Path, tmp_path: Path) -> None:
    """Hidden states behind blocks, and weights; logits are."""
    how = {"scheme": "W8A8", "algorithm": "rtn", "eval_tokens": 300, "compares_rtn": False}
    report = octavo.quantize(fixtures / "tiny", tmp_path / "out", rotations=(rotation,), **how)
    assert report.quality is not None
    assert report.verdict is not None
    assert report.verdict.passed
    assert bool(report.quality.blocks) == (rotation == "R2")
    found = compare_checkpoints(Checkpoint.open(fixtures / "tiny"), Checkpoint.open(tmp_path / "out"))
    (note,) = found.notes
    assert ("rotations into weights" if rotation == "R1" else "self_attn.v_proj") in note
    assert {row.kind.rpartition(".")[2] for row in found.rows}.isdisjoint({"v_proj", "o_proj"})


def test_weights_are_compared_as_their_inputs_are_rotated(fixtures: Path, tmp_path: Path) -> None:
    how = {"scheme": "W8A8", "algorithm": "rtn", "evaluate": False}
    octavo.quantize(fixtures / "tiny", tmp_path / "out", rotations=("R4",), **how)
    quantized = Checkpoint.open(tmp_path / "out", takes_transforms=True)
    found = compare_checkpoints(Checkpoint.open(fixtures / "tiny"), quantized)
    assert found.notes == ()
    assert len(found.rows) == 14
    assert all(row.snr_db is not None and row.snr_db > 35 for row in found.rows)


def test_rotated_heads_of_two_bits_are_no_broken_ones(fixtures: Path, tmp_path: Path) -> None:
    """And scales that are wrong make no rotation, though they move a weight as far as one does."""
    how = {"scheme": "W2A16@32", "algorithm": "rtn", "evaluate": False}
    octavo.quantize(fixtures / "tiny", tmp_path / "out", rotations=("R2",), **how)
    original = Checkpoint.open(fixtures / "tiny")
    found = compare_checkpoints(original, Checkpoint.open(tmp_path / "out"))
    assert len(found.rows) == 10
    assert len(found.notes) == 1
    octavo.quantize(fixtures / "tiny", tmp_path / "plain", **how)
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    broken = ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.o_proj"]
    for name in broken:
        tensors[f"{name}.weight_scale"] *= 2.4
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    found = compare_checkpoints(original, Checkpoint.open(tmp_path / "plain"))
    assert [row.module for row in found.rows if row.signal < row.noise < 3 * row.signal] == broken
    assert found.notes == ()


@pytest.mark.parametrize("scheme", ["W8A8", "W2A16@32"])
def test_rotated_values_of_fused_layers_are_no_broken_ones(scheme: str, tmp_path: Path) -> None:
    """Values are the last rows of qkv; what is rounded without a rotation, or has wrong scales there, is compared."""
    model = make_hf(*CASES["phi3"])
    source = save(model, tmp_path / "model")
    original = Checkpoint.open(source)
    for name, rotations in (("turned", ("R2",)), ("plain", ())):
        how = {"scheme": scheme, "algorithm": "rtn", "evaluate": False}
        octavo.quantize(source, tmp_path / name, rotations=rotations, **how)
    found = compare_checkpoints(original, Checkpoint.open(tmp_path / "turned"))
    (note,) = found.notes
    assert "self_attn.qkv_proj" in note
    assert {row.kind.rpartition(".")[2] for row in found.rows} == {"gate_up_proj", "down_proj"}
    plain = compare_checkpoints(original, Checkpoint.open(tmp_path / "plain"))
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    scales = tensors["model.layers.0.self_attn.qkv_proj.weight_scale"]
    scales[-scales.shape[0] // 4 :] *= 2.4
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    broken = compare_checkpoints(original, Checkpoint.open(tmp_path / "plain"))
    for comparison in (plain, broken):
        assert comparison.notes == ()
        assert len(comparison.rows) == 4 * model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"transform_seed": 3}, "transform_seed is of rotations, and there are none"),
        ({"rotations": ("R2",), "transform_block_size": 8}, "transform_block_size is R1's"),
        ({"rotations": ("R5",)}, "rotations is"),
    ],
)
def test_a_recipe_that_can_not_be(given: dict[str, object], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        Recipe("W4A16", **given)


@pytest.mark.parametrize(("hidden", "inner", "expected"), [(63, 35, {"R1", "R4"}), (60, 36, set())])
def test_an_odd_number_of_channels_is_not_spread_and_that_is_said(
    hidden: int, inner: int, expected: set[str], tmp_path: Path
) -> None:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "head_dim": 8}
    model = make_hf("Llama", sizes | {"num_attention_heads": 3, "num_key_value_heads": 3})
    checkpoint = Checkpoint.open(save(model, tmp_path / "model"))
    notes: list[str] = []
    rotated_source(checkpoint, Recipe("W4A16", rotations=("R1", "R2", "R4")), notes)
    assert {note.partition(":")[0] for note in notes if "an odd number of channels" in note} == expected


def test_blocks_that_do_not_divide_the_stream(fixtures: Path) -> None:
    checkpoint = Checkpoint.open(fixtures / "tiny")
    recipe = Recipe("W4A16", rotations=("R1",), transform_block_size=256)
    with pytest.raises(QuantizeError, match="transform_block_size 256 is no power of two that divides"):
        rotated(checkpoint, rotation_map(checkpoint, recipe.rotations), recipe)
