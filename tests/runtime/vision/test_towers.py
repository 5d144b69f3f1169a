"""Images of prompts by the engine alone, against transformers on the same weights with its own processors."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from asked_images import BLOCK, FIRST, SECOND, engine_of, logprobs_of, mark_of, request_of, text_of
from safetensors.torch import load_file, save_file
from slow_cases import slow
from tiny_vision import TinyVision, make_tiny_vision, picture
from toy_model import run_to_end, tokens_of

from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.config import EngineConfig, MediaLimits
from octavo.runtime.messages import AddRequest, SamplingParams
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.sources import LoadError
from octavo.runtime.offload.select import digest_of_files
from octavo.runtime.vision.loading import tower_of
from octavo.runtime.vision.preprocessing import Preprocessing, UnreadImagesError

OTHERS = ("llava_next", "llava_onevision", "qwen2_vl", "qwen3_vl", "idefics3", "smolvlm", "mistral3", "internvl")
OTHERS += ("llama4", "paligemma", "paligemma-2", "gemma4", "gemma4-small", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
KINDS = ("llava", "qwen2_5_vl", "gemma3", *map(slow, OTHERS))
IN_CHUNKS = [
    *((kind, 7) for kind in ("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "smolvlm")),
    ("gemma3", 19),
    ("gemma4-small", 7),
]
OTHERWISE = [
    *((kind, 7) for kind in ("llava_next", "qwen2_vl", "idefics3", "mistral3", "internvl")),
    *((kind, 7) for kind in ("llama4", "qwen3_vl_moe", "qwen3_5_moe")),
    ("gemma4", 23),
    ("llava", 1),
    ("qwen2_5_vl", 1),
    *((kind, 2048) for kind in ("llava", "qwen2_5_vl", "gemma3", *OTHERS)),
]
HAS_STATES = ("qwen3_5", "qwen3_5_moe")
NUM_LINEARS = {"llama4": 57, "gemma4": 28, "gemma4-small": 32, "qwen3_vl_moe": 48, "qwen3_5": 19, "qwen3_5_moe": 55}
"""Linear layers of text halves that don't have 3 layers with 7 each."""


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyVision:
    return make_tiny_vision(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(("tiny", "chunk"), [*IN_CHUNKS, *(slow(*case) for case in OTHERWISE)], indirect=["tiny"])
def test_logits_of_a_prompt_with_images_are_transformers(tiny: TinyVision, chunk: int) -> None:
    """Whole, and in chunks that cut images."""
    engine = engine_of(tiny.directory, chunk)
    vocab = engine.worker.model.vocab_size
    request = request_of(tiny, engine, [FIRST, SECOND], prompt_logprobs=vocab, max_tokens=1)
    inputs = tiny.inputs(text_of(tiny, 2), [FIRST, SECOND])
    assert request.token_ids == inputs["input_ids"][0].tolist()
    ours = logprobs_of(run_to_end(engine, [request])["a"])
    truth = tiny.logits(inputs).log_softmax(-1)[:-1]
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-4 * max(1.0, float(truth.std())))


def test_answers_go_on_from_images_and_out_of_the_prefix_cache(tiny: TinyVision) -> None:
    """Alone, beside each other and beside text; a second time from what was cached, and another image is another."""
    begins_with_images = tiny.kind.startswith("paligemma")  # of which one step computes all
    engine = engine_of(tiny.directory, 2048 if begins_with_images else 18)
    cases = {"first": [FIRST], "second": [SECOND], "both": [FIRST, SECOND], "swapped": [SECOND, FIRST], "none": []}
    if begins_with_images:
        del cases["none"]
    truth = {name: tiny.greedy(tiny.inputs(text_of(tiny, len(p)), p), 6) for name, p in cases.items()}
    assert len({tuple(answer) for answer in truth.values()}) >= len(cases) - 1  # of six tokens, which may be the same
    requests: list[AddRequest] = []
    for again in (False, True):
        requests = [request_of(tiny, engine, pictures, name) for name, pictures in cases.items()]
        outputs = run_to_end(engine, requests)
        assert {name: tokens_of(outputs[name]) for name in cases} == truth
        for request in requests:
            found = outputs[request.request_id][0].num_cached_tokens
            if again:
                assert found == (0 if begins_with_images else (len(request.token_ids) - 1) // BLOCK * BLOCK)
    seen = engine.worker.model.tower._kept.keys()
    assert seen == {image.digest for request in requests for image in request.images}  # each image once


def test_a_prefix_ends_where_another_image_begins(tiny: TinyVision) -> None:
    """The same tokens, and another image: what stands before it is shared, and nothing of its own."""
    engine = engine_of(tiny.directory)
    run_to_end(engine, [request_of(tiny, engine, [picture(3, 50, 37)], "x")])
    request = request_of(tiny, engine, [FIRST], "y")
    found = run_to_end(engine, [request])["y"][0].num_cached_tokens
    has_states = tiny.model.config.model_type in HAS_STATES  # of which a snapshot lies behind the prompt alone
    assert found == (0 if has_states else request.images[0].start // BLOCK * BLOCK)


@pytest.mark.parametrize("tiny", [kind for kind in KINDS if not re.search("gemma|llama4", str(kind))], indirect=True)
def test_who_gives_its_blocks_back_sees_its_image_again(tiny: TinyVision) -> None:
    """Without a prefix cache, and with room for two prompts and half of their answers."""
    count = 24
    lengths = [tiny.inputs(text_of(tiny, 1), [one])["input_ids"].shape[1] for one in (FIRST, SECOND)]
    num_blocks = sum(-(-length // BLOCK) for length in lengths) + count // BLOCK
    limits = {"num_blocks": num_blocks, "max_model_len": num_blocks * BLOCK}
    engine = engine_of(tiny.directory, enable_prefix_caching=False, **limits)
    requests = [request_of(tiny, engine, [one], name, max_tokens=count) for name, one in (("a", FIRST), ("b", SECOND))]
    outputs = run_to_end(engine, requests)
    for name, one in (("a", FIRST), ("b", SECOND)):
        assert tokens_of(outputs[name]) == tiny.greedy(tiny.inputs(text_of(tiny, 1), [one]), count)
    assert engine.scheduler.stats().num_preemptions


@pytest.mark.parametrize("tiny", ["gemma3"], indirect=True)
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_no_step_cuts_an_image_whose_tokens_see_each_other(tiny: TinyVision, *, prefix_caching: bool) -> None:
    """In caches from one that is too small on, where layers with windows take fewer blocks than a chunk of a prompt."""
    cases = {"a": [FIRST, SECOND], "b": [SECOND, FIRST]}
    truth = {name: tiny.greedy(tiny.inputs(text_of(tiny, 2), both), 6) for name, both in cases.items()}
    refused = []
    for num_blocks in range(33, 61, 3):
        limits = {"num_blocks": num_blocks, "max_model_len": 76}
        engine = engine_of(tiny.directory, 40, enable_prefix_caching=prefix_caching, **limits)
        requests = [request_of(tiny, engine, both, name) for name, both in cases.items()]
        answers: dict[str, list[int]] = {"a": [], "b": []}
        refusals = [output for request in requests for output in engine.add(request)]
        refused.append(len(refusals))
        for _ in range(100):  # steps: an engine that never ends isn't waited for
            for output in engine.step() if engine.has_work else ():
                answers[output.request_id] += output.token_ids
        assert answers == ({"a": [], "b": []} if refusals else truth)
    assert refused[0] == 2
    assert refused[-1] == 0


def test_answers_to_one_prompt_share_its_images(tiny: TinyVision) -> None:
    engine = engine_of(tiny.directory)
    one = request_of(tiny, engine, [FIRST], "n0")
    request = AddRequest("n0", one.token_ids, one.params, 0.0, other_ids=["n1"], images=one.images)
    answers: dict[str, list[int]] = {"n0": [], "n1": []}
    assert not engine.add(request)
    while engine.has_work:
        for output in engine.step():
            answers[output.request_id] += output.token_ids
    truth = tiny.greedy(tiny.inputs(text_of(tiny, 1), [FIRST]), 6)
    assert answers == {"n0": truth, "n1": truth}


def test_what_is_wrong_with_images_ends_their_request_alone(tiny: TinyVision) -> None:
    engine = engine_of(tiny.directory)
    good = request_of(tiny, engine, [FIRST])
    (image,) = good.images
    wrong = {
        "beyond": {"start": len(good.token_ids)},
        "short": {"pixels": image.pixels[:-1]},
        "fewer": {"start": image.start + 1, "length": image.length - 1},
        "flat": {"frames": ()},
        "cut": {"is_whole": not image.is_whole},
        "other": {"frames": ((len(image.pixels) // 3, 1),)},
    }
    fields = {"digest": b"", "start": image.start, "length": image.length} | {"frames": image.frames}
    fields |= {"size": image.size, "pixels": image.pixels, "is_whole": image.is_whole}
    for name, change in wrong.items():
        bad = type(image)(**fields | change)
        (output,) = engine.add(AddRequest(name, good.token_ids, good.params, 0.0, images=(bad,)))
        assert output.finish_reason == "error"
        assert output.error.startswith("image 0: ")
    assert len(tokens_of(run_to_end(engine, [good])["a"])) == 6


def test_without_images_allowed_no_tower_is_loaded(tiny: TinyVision) -> None:
    engine = engine_of(tiny.directory, limit_mm_per_prompt=MediaLimits(image=0))
    model = engine.worker.model
    assert model.tower is None
    assert "images are not read: --limit-mm-per-prompt allows no image" in model.notes
    hears = getattr(tiny.model.config, "audio_config", None) is not None
    towers = "vision and audio towers are" if hears else "vision tower is"
    assert f"the {towers} not loaded: text only" in model.notes
    request = AddRequest("t", [5, 6, 7], SamplingParams(max_tokens=2), 0.0)
    assert len(tokens_of(run_to_end(engine, [request])["t"])) == 2


@pytest.mark.parametrize("tiny", ["gemma3"], indirect=True)
def test_images_whose_tokens_see_each_other_are_not_deterministic(tiny: TinyVision) -> None:
    model = engine_of(tiny.directory, deterministic=True).worker.model
    assert model.tower is None
    why = "--deterministic: attention to an image's later tokens is not batch-invariant"
    assert f"images are not read: {why}" in model.notes


def test_blocks_in_a_file_are_those_of_images_as_they_are_normalized(tmp_path: Path) -> None:
    """Names of blocks have the pixels, which are told from each other before they are normalized."""
    make_tiny_vision("llava", tmp_path)
    before = digest_of_files(tmp_path)
    file = tmp_path / "processor_config.json"
    content = json.loads(file.read_text())
    content["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    file.write_text(json.dumps(content))
    assert digest_of_files(tmp_path) != before


def test_files_of_transformers_4_are_read(tmp_path: Path) -> None:
    """LLaVA's tower had a module more around it; the image processor had a file of its own, with older keys."""
    tiny = make_tiny_vision("llava", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): x for name, x in tensors.items()}
    older["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(older, tmp_path / "model.safetensors")
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(
        '{"crop_size": 28, "do_center_crop": true, "do_normalize": true, "do_resize": true, "resample": 3, "size": 28,'
        ' "feature_extractor_type": "CLIPFeatureExtractor", "image_processor_type": "CLIPImageProcessor"}'
    )
    engine = engine_of(tmp_path)
    answer = tokens_of(run_to_end(engine, [request_of(tiny, engine, [FIRST])])["a"])
    assert answer == tiny.greedy(tiny.inputs(text_of(tiny, 1), [FIRST]), 6)


def test_a_quantized_checkpoint_keeps_its_tower(tiny: TinyVision, tmp_path: Path) -> None:
    """As it was, beside a text half in codes."""
    quantize_model(prepare(tiny.directory, tmp_path / "out", Recipe("W8A8"), layouts=LAYOUTS))
    before, after = load_file(tiny.directory / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    found = sum("layers" in name and x.dtype == torch.int8 for name, x in after.items())
    assert found == NUM_LINEARS.get(tiny.kind, 21)
    tower = [name for name in before if re.search("vis|connector|projector", name)]
    assert tower
    assert all(torch.equal(before[name], after[name]) for name in tower)
    engines = [engine_of(directory) for directory in (tiny.directory, tmp_path / "out")]
    request = request_of(tiny, engines[1], [FIRST])
    assert len(tokens_of(run_to_end(engines[1], [request])["a"])) == 6
    first, second = (engine.worker.model.tower.embed(request.images[0]) for engine in engines)
    assert torch.equal(first, second)


def test_a_config_as_qwen2_vl_was_published(tmp_path: Path) -> None:
    """Its text half's keys stand beside the tower's, and its rope is of a type of its own."""
    tiny = make_tiny_vision("qwen2_vl", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "model_type": "qwen2_vl"}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (tmp_path / "config.json").write_text(json.dumps(config | text))
    engine = engine_of(tmp_path)
    answer = tokens_of(run_to_end(engine, [request_of(tiny, engine, [FIRST, SECOND])])["a"])
    assert answer == tiny.greedy(tiny.inputs(text_of(tiny, 2), [FIRST, SECOND]), 6)


@pytest.mark.parametrize("tiny", ["gemma3"], indirect=True)
def test_a_gpu_reads_the_text_half(tiny: TinyVision) -> None:
    """Until one has read an image: nothing is loaded there to find that out."""
    config = EngineConfig(model=str(tiny.directory))
    source: Any = None
    gpu = torch.device("cuda")
    notes: list[str] = []
    assert tower_of(config, source, torch.bfloat16, gpu, notes, generates=True) is None
    assert notes[0].startswith("images are not read: no GPU has read one yet")


@pytest.mark.parametrize(
    ("tiny", "file", "change", "why"),
    [
        ("qwen2_5_vl", "pre", {"image_mean": [0.5]}, "image_mean [0.5] isn't a number for each channel"),
        ("qwen2_5_vl", "pre", {"image_std": [0, 0, 0]}, "it makes numbers that are not finite"),
        ("qwen2_5_vl", "pre", {"image_mean": 5}, "image_mean 5 isn't a number for each channel"),
        ("qwen2_5_vl", "pre", {"image_mean": [1e308, 0, 0]}, "isn't a number for each channel"),
        ("qwen2_5_vl", "pre", {"rescale_factor": "a"}, "rescale_factor 'a' isn't 1 / 255"),
        ("qwen2_5_vl", "pre", {"rescale_factor": float("nan")}, "rescale_factor nan isn't 1 / 255"),
        ("llava", "pre", {"resample": 2.0}, "resample 2.0 is none of Pillow's filters"),
        ("qwen2_5_vl", "config", {"depth": 10**9}, "depth 1000000000; 1000 is the most"),
        ("llava", "pre", {"resample": 99}, "resample 99 is none of Pillow's filters"),
        ("llava", "pre", {"size": {"shortest_edge": 10**9}}, "67108864 pixels are the most"),
        ("llava", "config", {"vision_feature_layer": 99}, "IndexError"),
        ("llava", "config", {"image_token_id": 10**9}, "image_token_id 1000000000 is no token of the vocabulary"),
        ("gemma3", "config", {"mm_tokens_per_image": 0}, "ZeroDivisionError"),
        ("internvl", "pre", {"max_patches": 10**9}, "max_patches 1000000000; 256 are the most"),
        ("idefics3", "pre", {"size": {"longest_edge": 0}}, "longest_edge 0 in squares of"),
        ("mistral3", "config", {"head_dim": 1 << 28}, "MiB at start; 256 are the most"),
        ("llava", "tower", {"num_attention_heads": 10**8}, "error for validator 'validate_architecture': ValueError"),
        ("internvl", "tower", {"image_size": [1 << 40, 28]}, "image_size 1099511627776; 268435456 is the most"),
        (
            "qwen3_vl",
            "tower",
            {"deepstack_visual_indexes": [0] * 10**5},
            "indexes has 100000 values; 1000 are the most",
        ),
        ("gemma3", "tower", {"model_type": "bart", "encoder_layers": 10**6}, "a vision tower of type bart"),
        ("llava_next", "config", {"image_grid_pinpoints": [[28, 56], [56]]}, "[[28, 56], [56]] are not in squares of"),
    ],
    indirect=["tiny"],
)
def test_numbers_by_which_no_image_is_seen_leave_the_text(
    tiny: TinyVision, file: str, change: dict[str, Any], why: str, tmp_path: Path
) -> None:
    """Found at load: an image that a tower fails on would end the engine, and everybody's requests."""
    shutil.copytree(tiny.directory, tmp_path / "model")
    path = tmp_path / "model" / ("preprocessor_config.json" if file == "pre" else "config.json")
    if not path.exists():
        path = path.with_name("processor_config.json")
    content = json.loads(path.read_text())
    of_images = content.get("image_processor", content) if file == "pre" else content
    is_of_tower = file == "tower" or change.keys() & {"depth", "head_dim"}
    (of_images["vision_config"] if is_of_tower else of_images).update(change)
    path.write_text(json.dumps(content))
    model = engine_of(tmp_path / "model").worker.model
    assert model.tower is None
    (note,) = (note for note in model.notes if note.startswith("images are not read: "))
    assert why in note
    assert "\n" not in note


@pytest.mark.parametrize("tiny", ["llava"], indirect=True)
def test_sizes_that_are_not_the_checkpoints_take_no_memory(tiny: TinyVision, tmp_path: Path) -> None:
    """A layer of them would take 2^58 bytes."""
    shutil.copytree(tiny.directory, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_text())
    content["vision_config"] |= {"hidden_size": 1 << 28, "intermediate_size": 1 << 28}
    path.write_text(json.dumps(content))
    with pytest.raises(LoadError, match=r"in the checkpoint; config.json makes it .*268435456"):
        engine_of(tmp_path / "model")


@pytest.mark.parametrize("added", [5, ["<|image|>"], [{"content": "<|image|>"}]])
def test_a_damaged_list_of_tokens_is_refused(added: object, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Llama4ImageProcessor"}')
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    with pytest.raises(UnreadImagesError, match=re.escape("tokenizer.json has no token <|image|>")):
        Preprocessing(tmp_path).token_id("<|image|>")


@pytest.mark.parametrize("tiny", ["qwen3_vl_moe"], indirect=True)
def test_experts_of_qwen3_vl_as_they_were_published(tiny: TinyVision, tmp_path: Path) -> None:
    """Transposed, where transformers 5 writes them as other models' are."""
    shutil.copytree(tiny.directory, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: x.mT.contiguous() if "experts" in name else x for name, x in tensors.items()}, file)
    engine = engine_of(tmp_path / "model")
    answer = tokens_of(run_to_end(engine, [request_of(tiny, engine, [FIRST])])["a"])
    assert answer == tiny.greedy(tiny.inputs(text_of(tiny, 1), [FIRST]), 6)


@pytest.mark.parametrize("tiny", [slow("paligemma")], indirect=True)
def test_a_prompt_that_no_step_holds_is_refused(tiny: TinyVision) -> None:
    engine = engine_of(tiny.directory, 20)
    request = request_of(tiny, engine, [FIRST])
    (output,) = engine.add(request)
    assert output.error == (
        f"{len(request.token_ids)} tokens of the prompt see each other, and are computed in one step, which has 20 at "
        "most (--max-num-batched-tokens)"
    )


def plain_model(source: Path, decoded: Checkpoint, directory: Path) -> Any:
    """Transformers' model with the numbers that a quantized checkpoint stands for, out of a directory of its own."""
    shutil.copytree(source, directory)
    tensors = {}
    for name in decoded.names:
        module, _, kind = name.rpartition(".")
        if not kind.startswith("weight") or not decoded.has(f"{module}.weight_scale"):
            tensors[name] = decoded.tensor(name).clone()
        elif kind == "weight_scale":
            tensors[f"{module}.weight"] = decoded.linear(module).dequantize()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="eager")
    return model.float().eval()


@pytest.mark.parametrize("tiny", ["llava", *map(slow, ("qwen2_5_vl", "gemma4", "smolvlm"))], indirect=True)
def test_a_tower_is_quantized_on_demand(tiny: TinyVision, tmp_path: Path) -> None:
    """What is served is what transformers computes with the numbers that the codes stand for; errors are told."""
    done = quantize_model(
        prepare(tiny.directory, tmp_path / "out", Recipe("W8A16@-1", towers="W8A16@-1"), layouts=LAYOUTS)
    )
    decoded = Checkpoint.open(tmp_path / "out", LAYOUTS)
    of_tower = [row for row in done.layers if row.kind.startswith("tower.")]
    assert of_tower
    for row in of_tower:
        assert decoded.stored_format_of(row.module) is not None
        assert 0 < row.noise < 1e-3 * row.signal
    model = plain_model(tiny.directory, decoded, tmp_path / "plain")
    engine = engine_of(tmp_path / "out")
    request = request_of(tiny, engine, [FIRST], prompt_logprobs=engine.worker.model.vocab_size, max_tokens=1)
    ours = logprobs_of(run_to_end(engine, [request])["a"])
    truth = replace(tiny, model=model).logits(tiny.inputs(text_of(tiny, 1), [FIRST])).log_softmax(-1)[:-1]
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tiny", ["llava"], indirect=True)
def test_what_is_no_recipe_of_a_tower_is_refused(tiny: TinyVision, tmp_path: Path) -> None:
    for options, says in (
        ({"towers": "FP8"}, "towers: .* has scales of inputs, for which images would be needed"),
        ({"towers": "W4A16", "format": "gptq"}, "towers: octavo writes none in format gptq; compressed-tensors"),
        ({"towers": "W8A16@-1", "ignore": ("re:.*vision_tower.*",)}, "towers: the checkpoint has no vision tower"),
    ):
        with pytest.raises(ValueError, match=says):
            prepare(tiny.directory, tmp_path / "out", Recipe("W4A16@32", **options), layouts=LAYOUTS)


@pytest.mark.parametrize("tiny", ["qwen2_5_vl", *map(slow, ("llama4", "qwen3_5", "gemma4", "mistral3"))], indirect=True)
def test_embeddings_in_bfloat16_are_those_of_transformers(tiny: TinyVision) -> None:
    """Whose towers keep the frequencies of their rotations in float32."""
    engine = engine_of(tiny.directory, dtype="bfloat16")
    ours = engine.worker.model.tower.embed(request_of(tiny, engine, [FIRST]).images[0])
    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny.directory, dtype=torch.bfloat16).eval()
    inputs = {
        name: x
        for name, x in tiny.inputs(mark_of(tiny), [FIRST]).items()
        if name in ("pixel_values", "image_grid_thw", "image_position_ids", "image_sizes")
    }
    if tiny.kind == "llama4":
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.inference_mode():
        seen = model.get_image_features(**inputs, return_dict=True)
        if tiny.kind == "llama4":
            theirs = model.multi_modal_projector(seen.last_hidden_state.flatten(0, 1))
        else:
            theirs = torch.cat(tuple(seen.pooler_output))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=float(theirs.abs().max()) / 128)
