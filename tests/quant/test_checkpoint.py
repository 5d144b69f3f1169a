"""Opening checkpoints: single and sharded, and every way in which one can be broken."""

from __future__ import annotations

import json
import pickle
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.quant import checkpoint
from octavo.quant.checkpoint import INDEX, Checkpoint, CheckpointError
from octavo.quant.hub import resolve_model
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import SafetensorsError, SafetensorsFile, SafetensorsWriter, TensorSpec


@pytest.fixture
def model(tmp_path: Path, fixtures: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    copy = tmp_path / "model"
    shutil.copytree(fixtures / "tiny", copy, ignore=shutil.ignore_patterns("expected.safetensors"))
    return copy


def shard(model: Path) -> None:
    """Split model.safetensors into two shards with an index."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    half = len(names) // 2
    weight_map = {}
    for i, part in enumerate((names[:half], names[half:])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file)
        weight_map.update(dict.fromkeys(part, file))
    (model / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (model / "model.safetensors").unlink()


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_are_those_of_the_safetensors_package(model: Path, sharded: bool) -> None:
    expected = load_file(model / "model.safetensors")
    if sharded:
        shard(model)
    checkpoint = Checkpoint.open(model)
    assert checkpoint.names == expected.keys()
    assert checkpoint.unread() == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.spec(name) == TensorSpec(tensor.dtype, tuple(tensor.shape))
    assert checkpoint.unread() == []
    assert checkpoint.quantization is None
    assert checkpoint.kv_scales("model.layers.0.self_attn") is None


def test_linear_marks_all_of_its_tensors_read(fixtures: Path) -> None:
    checkpoint = Checkpoint.open(fixtures / "tiny--llmc-w4a16-asym-g32")
    module = "model.layers.0.mlp.up_proj"
    assert isinstance(checkpoint.linear(module), QuantizedWeight)
    assert not [name for name in checkpoint.unread() if name.startswith(module)]
    assert isinstance(checkpoint.linear("lm_head"), torch.Tensor)


def with_scales(model: Path, scales: dict[str, torch.Tensor]) -> Checkpoint:
    """The checkpoint with these tensors more."""
    (model / "more").mkdir(exist_ok=True)
    shutil.copy(model / "config.json", model / "more")
    save_file(load_file(model / "model.safetensors") | scales, model / "more" / "model.safetensors")
    return Checkpoint.open(model / "more")


@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1), (2,)])
@pytest.mark.parametrize(
    "names",
    [
        ("k_scale", "v_scale"),
        ("attn.k_scale", "attn.v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("qkv_proj.k_scale", "qkv_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
        ("kv_scale",),
        ("attn.kv_scale",),
    ],
)
def test_kv_scales_in_every_spelling(model: Path, names: tuple[str, ...], shape: tuple[int, ...]) -> None:
    attention = "model.layers.0.self_attn"
    checkpoint = with_scales(model, {f"{attention}.{name}": torch.full(shape, 0.5) for name in names})
    scales = checkpoint.kv_scales(attention)
    assert scales is not None
    assert [scale.tolist() for scale in scales if scale is not None] == [[0.5] * (2 if 2 in shape else 1)] * 2
    assert not [name for name in checkpoint.unread() if "scale" in name]


def test_values_may_have_a_scale_alone_but_keys_may_not(model: Path) -> None:
    attention = "model.layers.0.self_attn"
    scales = with_scales(model, {f"{attention}.v_scale": torch.tensor([0.5])}).kv_scales(attention)
    assert scales is not None
    assert scales[0] is None
    assert scales[1].tolist() == [0.5]
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn has k_proj\.k_scale, but no v_proj\.v_scale"):
        with_scales(model, {f"{attention}.k_proj.k_scale": torch.tensor([0.5])}).kv_scales(attention)


def test_pickles_are_refused_by_name(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"pickle files \(pytorch_model\.bin\)"):
        Checkpoint.open(model)


@pytest.mark.parametrize("file", ["pytorch_model-00001-of-00002.bin", "../evil.safetensors", "/etc/x.safetensors"])
def test_an_index_names_safetensors_beside_it_only(model: Path, file: str) -> None:
    (model / "model.safetensors").unlink()
    (model / INDEX).write_text(json.dumps({"weight_map": {"a.weight": file}}))
    with pytest.raises(CheckpointError, match="not a safetensors file beside it"):
        Checkpoint.open(model)


def test_missing_shards_and_tensors_are_named(model: Path) -> None:
    shard(model)
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.layers.7.extra"] = "model-00001-of-00002.safetensors"
    (model / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors lacks model\.layers\.7\.extra"):
        Checkpoint.open(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00002.safetensors.*incomplete"):
        Checkpoint.open(model)


def test_a_tensor_in_two_shards_is_refused(model: Path) -> None:
    shard(model)
    shutil.copy(model / "model-00001-of-00002.safetensors", model / "model-00002-of-00002.safetensors")
    places = {
        "lm_head.weight": "model-00001-of-00002.safetensors",
        "model.embed_tokens.weight": "model-00002-of-00002.safetensors",
    }
    (model / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match="both have"):
        Checkpoint.open(model)


def test_tensors_of_all_shards_together_are_bounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard(model)
    num_tensors = len(Checkpoint.open(model).names)
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", num_tensors)
    Checkpoint.open(model)
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", num_tensors - 1)
    with pytest.raises(CheckpointError, match=f"have {num_tensors} tensors; {num_tensors - 1} are the most"):
        Checkpoint.open(model)


@pytest.mark.parametrize("keep", [0, 5, 100, 100_000])
def test_truncated_files_are_refused(model: Path, keep: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        Checkpoint.open(model)


def test_bytes_that_the_header_does_not_tell_of_are_refused(model: Path) -> None:
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="has 4 bytes more"):
        Checkpoint.open(model)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "not a JSON object"),
        (b"{not json", "not JSON"),
        (b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}', "dtype F4"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "8 bytes, but 4 are stored"),
        (b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 4]}}', "malformed header entry for a"),
        (b'{"a": {"shape": [2]}}', "malformed header entry for a"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "truncated"),
        (b'{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}', r"dtype \['F32'\]"),
        (b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "malformed header entry for a"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "a gap before a"),
        (
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
            b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
            "another tensor's bytes in b",
        ),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_malformed_headers_are_refused(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(SafetensorsError, match=message):
        SafetensorsFile(path)


def test_an_index_of_nothing_is_no_checkpoint(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="no tensor is in them"):
        Checkpoint.open(model)


def test_weights_may_be_links_as_in_the_hubs_cache(model: Path) -> None:
    blob = model.parent / "blob"
    (model / "model.safetensors").rename(blob)
    (model / "model.safetensors").symlink_to(blob)
    assert Checkpoint.open(model).names
    blob.unlink()
    with pytest.raises(CheckpointError, match="no safetensors file"):
        Checkpoint.open(model)


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    """The format allows it, although the safetensors package aligns what it writes."""
    data = bytes([7]) + torch.arange(3, dtype=torch.float32).numpy().tobytes()
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "b": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]},
        }
    ).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    file = SafetensorsFile(path)
    assert file.view("b").tolist() == [0, 1, 2]
    assert file.read("b").tolist() == [0, 1, 2]


def test_the_writer_is_read_by_the_safetensors_package(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(7, dtype=torch.int8),
        "c": torch.randn(4).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3),
    }
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, specs) as writer:
        for name in sorted(tensors, reverse=True):
            writer.write(name, tensors[name])
    assert path.stat().st_size == writer.nbytes
    again = load_file(path)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor)


def test_the_writer_misses_what_was_not_written(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(torch.float32, (2,)), "b": TensorSpec(torch.float32, (2,))}
    with pytest.raises(ValueError, match="never written: b"), SafetensorsWriter(tmp_path / "x", specs) as writer:
        writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="announced as"), SafetensorsWriter(tmp_path / "y", specs) as writer:
        writer.write("a", torch.zeros(3))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON"),
        ("[]", "holds a JSON array, not an object"),
        ("[" * 100_000, "is not JSON: it is nested too deeply"),
        ('{"architectures": "LlamaForCausalLM"}', "architectures is 'LlamaForCausalLM'; an array or null is needed"),
        ('{"text_config": [1]}', r"text_config is \[1\]; an object or null is needed"),
        ('{"text_config": {"quantization_config": 4}}', "quantization_config is 4; an object or null is needed"),
        ('{"quantization_config": {"quant_method": "quip"}}', "quant_method 'quip' is not supported"),
    ],
)
def test_configs_that_say_nothing_known_are_refused(model: Path, config: str | None, message: str) -> None:
    (model / "config.json").unlink()
    if config is not None:
        (model / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(model)


def test_an_unsupported_scheme_is_refused_when_it_is_opened(tmp_path: Path, fixtures: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(fixtures / "tiny--llmc-w8a8", copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 9
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj: config group 'group_0'.*9-bit int"):
        Checkpoint.open(copy)


def test_a_quantized_layer_that_the_config_ignores_is_explained(tmp_path: Path, fixtures: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(fixtures / "tiny--llmc-w4a16-g32", copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["ignore"].append("re:.*up_proj")
    (copy / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(copy)
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.0\.mlp\.up_proj\.weight, but weight_packed"):
        checkpoint.linear("model.layers.0.mlp.up_proj")


def test_a_model_is_a_directory_or_a_hub_id(tmp_path: Path, model: Path) -> None:
    assert resolve_model(str(model)) == model
    with pytest.raises(CheckpointError, match="--revision main is for a Hub id"):
        resolve_model(str(model), "main")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(str(model / "config.json"))
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve_model(str(tmp_path / "nowhere"))


def test_the_hub_is_asked_for_no_pickle(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    asked = {}

    def snapshot_download(
        repo_id: str, *, revision: str | None, cache_dir: str | None, allow_patterns: list[str]
    ) -> str:
        asked.update(repo_id=repo_id, revision=revision, cache_dir=cache_dir, allow_patterns=allow_patterns)
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("someone/model", "v1") == model
    assert asked["repo_id"] == "someone/model"
    assert asked["revision"] == "v1"
    assert asked["cache_dir"] is None
    assert "*.safetensors" in asked["allow_patterns"]
    for pickled in ("pytorch_model.bin", "consolidated.00.pth", "model.pt", "training_args.bin", "last.ckpt"):
        assert not any(fnmatchcase(pickled, pattern) for pattern in asked["allow_patterns"])
