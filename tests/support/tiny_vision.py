"""Tiny random vision-language checkpoints as transformers writes them, with what transformers makes of a prompt.

Their tokenizer is that of the tiny fixture with a few tokens more. Every weight is random, norms and biases too.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from hf_oracle import GEMMA4, randomize
from PIL import Image
from torch import Tensor
from transformers.models.gemma4 import image_processing_pil_gemma4

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"
SOFT_TOKENS = 16
image_processing_pil_gemma4._SUPPORTED_SOFT_TOKENS = (SOFT_TOKENS,)  # fewer than Gemma 4's, so that tests are fast
QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
PLACEHOLDERS = {
    **dict.fromkeys(("llava", "llava_next", "llava_onevision", "idefics3", "smolvlm"), "<image>"),
    "mistral3": "[IMG]",
    "llama4": "<|patch|>",
    "gemma3": "<image_soft_token>",
    **dict.fromkeys(("paligemma", "paligemma-2"), "<image>"),
    **dict.fromkeys(("gemma4", "gemma4-small"), "<|image|>"),
    "internvl": "<IMG_CONTEXT>",
    **dict.fromkeys(QWENS, "<|image_pad|>"),
}
MARKS = PLACEHOLDERS | {"gemma3": "<start_of_image>", "llama4": "<|image|>"}
MARKS |= dict.fromkeys(QWENS, "<|vision_start|><|image_pad|><|vision_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}MARK"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


@dataclass(frozen=True)
class TinyVision:
    """A checkpoint in a directory, the model, and its processor."""

    directory: Path
    model: Any
    processor: Any
    placeholder: str
    kind: str

    @property
    def placeholder_id(self) -> int:
        return int(self.processor.tokenizer.convert_tokens_to_ids(self.placeholder))

    def inputs(self, text: str, pictures: list[Image.Image]) -> Any:
        """What transformers' processor makes of a prompt with a mark for each picture."""
        return self.processor(text=[text], images=pictures or None, return_tensors="pt")

    @torch.inference_mode()
    def logits(self, inputs: Any, more: list[int] | None = None) -> Tensor:
        """[T, vocab] of a prompt, and of tokens behind it."""
        inputs = dict(inputs)
        if more:
            inputs["input_ids"] = torch.cat((inputs["input_ids"], torch.tensor([more])), dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            for name in {"mm_token_type_ids", "token_type_ids"} & inputs.keys():
                types = inputs[name]
                is_suffix = int(self.kind.startswith("paligemma"))
                inputs[name] = torch.cat((types, types.new_full((1, len(more)), is_suffix)), dim=1)
        if self.kind == "llama4" and "pixel_values" in inputs:  # its class asks its text half for images, and fails
            seen = self.model.get_image_features(inputs.pop("pixel_values"), return_dict=True).last_hidden_state
            ids = inputs.pop("input_ids")
            inputs["inputs_embeds"] = self.model.get_input_embeddings()(ids).masked_scatter(
                (ids == self.placeholder_id).unsqueeze(-1), self.model.multi_modal_projector(seen.flatten(0, 1))
            )
        model = self.model.language_model if self.kind == "llama4" else self.model
        return model(**inputs, use_cache=False).logits[0]

    def greedy(self, inputs: Any, count: int) -> list[int]:
        answer: list[int] = []
        for _ in range(count):
            answer.append(int(self.logits(inputs, answer)[-1].argmax()))
        return answer


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth random colors, so that resizing keeps something of them."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def make_tiny_vision(kind: str, directory: Path, seed: int = 0) -> TinyVision:
    """A checkpoint of this model type, written into a directory."""
    placeholder = PLACEHOLDERS[kind]
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    is_qwen = kind.startswith("qwen")
    more = ["<|vision_start|>", "<|vision_end|>", placeholder, "<|video_pad|>"] if is_qwen else [placeholder]
    tokenizer.add_special_tokens({"additional_special_tokens": more})
    tokenizer.chat_template = TEMPLATE.replace("MARK", MARKS[kind])
    config, processor = MAKERS[kind](kind, tokenizer)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    randomize(model, seed)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return TinyVision(directory, model, processor, placeholder, kind)


def _llava(kind: str, tokenizer: Any) -> tuple[Any, Any]:  # noqa: ARG001
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=28, patch_size=7, projection_dim=32),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.chat_template = tokenizer.chat_template
    return config, processor


def _llava_next(kind: str, tokenizer: Any) -> tuple[Any, Any]:  # noqa: ARG001
    points = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    config = transformers.LlavaNextConfig(
        text_config=transformers.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=28, patch_size=7, projection_dim=32),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=points,
    )
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=points
    )
    processor = transformers.LlavaNextProcessor(
        images, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.chat_template = tokenizer.chat_template
    return config, processor


def _onevision(kind: str, tokenizer: Any) -> tuple[Any, Any]:  # noqa: ARG001
    points = [[28 * rows, 28 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    config = transformers.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=28, patch_size=7, vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=points,
        vision_aspect_ratio="anyres_max_2",
    )
    images = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=points, image_mean=[0.5, 0.3, 0.7]
    )
    return config, OnevisionProcessor(images, tokenizer)


def _qwen(kind: str, tokenizer: Any) -> tuple[Any, Any]:
    sizes = {"depth": 3, "num_heads": 2, "patch_size": 7, "spatial_merge_size": 2, "temporal_patch_size": 2}
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    text = TEXT | {"vocab_size": len(tokenizer), "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    text["rope_parameters"] |= {"mrope_section": [2, 3, 3] if kind.startswith("qwen2") else [4, 2, 2]}
    if kind == "qwen2_vl":
        vision = sizes | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    elif kind == "qwen2_5_vl":
        vision = sizes | {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
        vision |= {"window_size": 28, "fullatt_block_indexes": [1]}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    else:
        vision = sizes | {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}
        text |= {"head_dim": 16}
        if kind.startswith("qwen3_5"):
            del vision["deepstack_visual_indexes"]
            text |= {"head_dim": 32, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
            text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
            text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
            text["rope_parameters"] |= {"partial_rotary_factor": 0.5}
        if kind.endswith("moe"):
            text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            text |= {"shared_expert_intermediate_size": 32} if kind == "qwen3_5_moe" else {}
        name = {"qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe", "qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}
        config = getattr(transformers, f"{name[kind]}Config")(text_config=text, vision_config=vision, **ids)
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=7, merge_size=2, size={"shortest_edge": 14 * 14, "longest_edge": 14 * 14 * 24}
    )
    return config, QwenProcessor(images, tokenizer)


def _idefics(kind: str, tokenizer: Any) -> tuple[Any, Any]:
    more = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *more, "<row_1_col_1>"]})
    name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
    text = transformers.LlamaConfig(**TEXT, vocab_size=len(tokenizer), rms_norm_eps=1e-5)
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config=TOWER | {"image_size": 28, "patch_size": 7},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    images = getattr(transformers, f"{name}ImageProcessorPil")(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
    )
    return config, IdeficsProcessor(images, tokenizer)


def _mistral3(kind: str, tokenizer: Any) -> tuple[Any, Any]:  # noqa: ARG001
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT, vocab_size=len(tokenizer), sliding_window=None),
        vision_config=transformers.PixtralVisionConfig(**TOWER, image_size=56, patch_size=7, head_dim=16),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
    )
    images = transformers.PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": 7, "width": 7})
    return config, Mistral3Processor(images, tokenizer)


def _gemma3(kind: str, tokenizer: Any) -> tuple[Any, Any]:  # noqa: ARG001
    tokens = ["<image_soft_token>", "<start_of_image>", "<end_of_image>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    image, begin, end = map(tokenizer.convert_tokens_to_ids, tokens)
    text = TEXT | {"head_dim": 16, "sliding_window": 10, "query_pre_attn_scalar": 10, "sliding_window_pattern": 2}
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text, vocab_size=len(tokenizer)),
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=56, patch_size=7, vision_use_head=False),
        mm_tokens_per_image=16,
        image_token_index=image,
        boi_token_index=begin,
        eoi_token_index=end,
        tie_word_embeddings=True,
    )
    images = transformers.Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    return config, GemmaProcessor(images, tokenizer)


def _llama4(kind: str, tokenizer: Any) -> tuple[Any, Any]:  # noqa: ARG001
    tokens = ["<|image|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|patch|>", *tokens]})
    text = TEXT | {"num_local_experts": 4, "intermediate_size_mlp": 64, "head_dim": 16, "attention_chunk_size": 32}
    vision = TOWER | {"image_size": 28, "patch_size": 7, "intermediate_size": 128, "vision_output_dim": 40}
    config = transformers.Llama4Config(
        text_config=transformers.Llama4TextConfig(**text, vocab_size=len(tokenizer)),
        vision_config=vision | {"projector_input_dim": 40, "projector_output_dim": 40},
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<|image_end|>"),
    )
    return config, Llama4Processor(None, tokenizer)


def _paligemma(kind: str, tokenizer: Any) -> tuple[Any, Any]:
    text = TEXT | {"head_dim": 16}
    made = transformers.GemmaConfig
    if kind == "paligemma-2":
        text |= {"sliding_window": 10, "query_pre_attn_scalar": 10, "final_logit_softcapping": 3.0}
        made = transformers.Gemma2Config
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.chat_template = None  # as it is published
    tokenizer.image_token = "<image>"
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    images = transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    config = transformers.PaliGemmaConfig(
        text_config=made(**text, vocab_size=len(tokenizer)),
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=28, patch_size=7, vision_use_head=False),
        image_token_index=tokenizer.image_token_id,
        projection_dim=64,
        hidden_size=64,
        vocab_size=len(tokenizer),
    )
    return config, PaliGemmaProcessor(processor, tokenizer)


def _gemma4(kind: str, tokenizer: Any) -> tuple[Any, Any]:
    tokens = ["<|image|>", "<|image>", "<image|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    image, begin, end = map(tokenizer.convert_tokens_to_ids, tokens)
    text = TEXT | GEMMA4 | {"vocab_size": len(tokenizer), "num_hidden_layers": 4, "head_dim": 16, "sliding_window": 10}
    text |= {"global_head_dim": 32, "use_bidirectional_attention": "vision", "final_logit_softcapping": 3.0}
    if kind == "gemma4-small":
        text |= {"use_bidirectional_attention": None, "hidden_size_per_layer_input": 16, "pad_token_id": 7}
        text |= {"vocab_size_per_layer_input": len(tokenizer), "num_kv_shared_layers": 2}
        text |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    vision = TOWER | {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 7, "pooling_kernel_size": 2}
    hearing = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16}
    config = transformers.Gemma4Config(
        text_config=transformers.Gemma4TextConfig(**text),
        vision_config=vision | {"position_embedding_size": 64, "use_clipped_linears": True, "standardize": True},
        audio_config=hearing | {"subsampling_conv_channels": [4, 4]} if kind == "gemma4-small" else None,
        image_token_id=image,
        boi_token_id=begin,
        eoi_token_id=end,
    )
    images = transformers.Gemma4ImageProcessorPil(patch_size=7, pooling_kernel_size=2, max_soft_tokens=SOFT_TOKENS)
    return config, Gemma4Processor(images, tokenizer)


def _internvl(kind: str, tokenizer: Any) -> tuple[Any, Any]:  # noqa: ARG001
    tokenizer.add_special_tokens({"additional_special_tokens": ["<IMG_CONTEXT>", "<img>", "</img>"]})
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        vision_config=TOWER | {"image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=False,
    )
    images = transformers.GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=6
    )
    return config, InternProcessor(images, tokenizer)


class WithoutVideos:
    """Transformers' own processors want torchvision, be it for videos; these make of images and text what they make."""

    def __init__(self, images: Any, tokenizer: Any) -> None:
        self.images = images
        self.tokenizer = tokenizer

    def save_pretrained(self, directory: Path) -> None:
        self.images.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def tokens(self, text: str, placeholder: str, stands: list[str]) -> dict[str, Tensor]:
        first, *pieces = text.split(placeholder)
        return self.tokenizer(first + "".join(map("".join, zip(stands, pieces, strict=True))), return_tensors="pt")


MAKERS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _onevision,
    **dict.fromkeys(QWENS, _qwen),
    **dict.fromkeys(("idefics3", "smolvlm"), _idefics),
    "mistral3": _mistral3,
    "gemma3": _gemma3,
    "llama4": _llama4,
    **dict.fromkeys(("paligemma", "paligemma-2"), _paligemma),
    **dict.fromkeys(("gemma4", "gemma4-small"), _gemma4),
    "internvl": _internvl,
}


class OnevisionProcessor(WithoutVideos):
    """LLaVA-OneVision's, which is asked for an image's text. Images of one prompt belong together, as in a chat."""

    def __init__(self, images: Any, tokenizer: Any) -> None:
        super().__init__(images, tokenizer)
        self.whole = object.__new__(transformers.LlavaOnevisionProcessor)
        self.whole.image_processor = images
        self.whole.num_image_tokens = 16
        self.whole.vision_feature_select_strategy = "full"
        self.whole.vision_aspect_ratio = "anyres_max_2"
        self.whole.image_token = "<image>"

    def __call__(self, text: list[str], images: list[Image.Image] | None, return_tensors: str) -> dict[str, Tensor]:
        found = {} if images is None else dict(self.images(images=[images], return_tensors=return_tensors))
        stands = [self.whole.replace_image_token(found, number) for number in range(len(images or ()))]
        return {**found, **self.tokens(text[0], "<image>", stands)}


class GemmaProcessor(WithoutVideos):
    """Gemma 3's, whose tokenizer has names for its tokens."""

    def __call__(self, text: list[str], images: list[Image.Image] | None, return_tensors: str) -> dict[str, Tensor]:
        found = {} if images is None else dict(self.images(images=images, return_tensors=return_tensors))
        found.pop("num_crops", None)
        stand = "\n\n<start_of_image>" + "<image_soft_token>" * 16 + "<end_of_image>\n\n"
        tokens = self.tokens(text[0], "<start_of_image>", [stand] * len(images or ()))
        image = self.tokenizer.convert_tokens_to_ids("<image_soft_token>")
        return {**found, **tokens, "token_type_ids": (tokens["input_ids"] == image).int()}


class Llama4Processor(WithoutVideos):
    """Llama 4's, whose image processor needs torchvision; here Pillow resizes. Of up to 6 squares of 28 pixels."""

    def save_pretrained(self, directory: Path) -> None:
        self.tokenizer.save_pretrained(directory)
        size = {"height": 28, "width": 28}
        said = {"image_processor_type": "Llama4ImageProcessorFast", "size": size, "max_patches": 6}
        (directory / "preprocessor_config.json").write_text(json.dumps(said))

    def __call__(self, text: list[str], images: list[Image.Image] | None, return_tensors: str) -> dict[str, Tensor]:
        assert return_tensors == "pt"
        squares: list[Image.Image] = []
        stands = []
        whole = object.__new__(transformers.Llama4Processor)
        for one in images or ():
            rows, columns = self.canvas(one)
            room = min(max(one.width, 28), 28 * columns), min(max(one.height, 28), 28 * rows)
            scale = min(room[0] / one.width, room[1] / one.height)
            resized = one.resize((int(one.width * scale), int(one.height * scale)), Image.Resampling.BILINEAR)
            places = [(28 * column, 28 * row) for row in range(rows) for column in range(columns)]
            squares += [resized.crop((x, y, x + 28, y + 28)) for x, y in places]
            squares += [one.resize((28, 28), Image.Resampling.BILINEAR)] if rows * columns > 1 else []
            stands.append(whole._prompt_split_image((rows, columns), 4))
        found = self.tokens(text[0], "<|image|>", stands)
        if squares:
            pixels = torch.stack([torch.from_numpy(np.array(square)).permute(2, 0, 1) for square in squares])
            found["pixel_values"] = (pixels / 255 - 0.5) / 0.5
        return found

    def canvas(self, image: Image.Image) -> tuple[int, int]:
        """Rows and columns, as transformers 5.17 with torchvision chooses them."""
        return {(50, 37): (2, 2), (31, 90): (3, 2)}[image.size]


class PaliGemmaProcessor(WithoutVideos):
    """PaliGemma's own, with whose images a prompt begins; a prompt without any is none."""

    def save_pretrained(self, directory: Path) -> None:
        self.images.save_pretrained(directory)

    def __call__(self, text: list[str], images: list[Image.Image] | None, return_tensors: str) -> Any:
        found = dict(self.images(text=text, images=[images]))  # its labels of tensors are nothing that numpy 2 likes
        found.pop("labels")
        made = {name: torch.from_numpy(np.array(value)) for name, value in found.items()}
        assert return_tensors == "pt"
        return made


class Gemma4Processor(WithoutVideos):
    """Gemma 4's."""

    def __call__(self, text: list[str], images: list[Image.Image] | None, return_tensors: str) -> dict[str, Tensor]:
        found = {} if images is None else dict(self.images(images=images, return_tensors=return_tensors))
        counts = found.pop("num_soft_tokens_per_image", ())
        stands = [f"<|image>{'<|image|>' * int(count)}<image|>" for count in counts]
        tokens = self.tokens(text[0], "<|image|>", stands)
        image = self.tokenizer.convert_tokens_to_ids("<|image|>")
        return {**found, **tokens, "mm_token_type_ids": (tokens["input_ids"] == image).int()}


class InternProcessor(WithoutVideos):
    """InternVL's."""

    def __call__(self, text: list[str], images: list[Image.Image] | None, return_tensors: str) -> dict[str, Tensor]:
        found = {} if images is None else dict(self.images(images=images, return_tensors=return_tensors))
        counts = found.pop("num_patches", ())
        stands = [f"<img>{'<IMG_CONTEXT>' * 4 * int(count)}</img>" for count in counts]
        return {**found, **self.tokens(text[0], "<IMG_CONTEXT>", stands)}


class Mistral3Processor(WithoutVideos):
    """Mistral 3's, whose tower sees patches of 7 pixels, merged by fours."""

    def __call__(self, text: list[str], images: list[Image.Image] | None, return_tensors: str) -> dict[str, Tensor]:
        found: dict[str, Any] = {}
        if images is not None:
            merged = {"height": 14, "width": 14}
            found = dict(self.images(images=images, patch_size=merged, return_tensors=return_tensors))
        stands = []
        for height, width in found.get("image_sizes", ()):
            lines = ["[IMG]" * (int(width) // 14)] * (int(height) // 14)
            stands.append("[IMG_BREAK]".join(lines) + "[IMG_END]")
        return {**found, **self.tokens(text[0], "[IMG]", stands)}


class IdeficsProcessor(WithoutVideos):
    """SmolVLM's, and Idefics 3's, which is asked for an image's text."""

    def __init__(self, images: Any, tokenizer: Any) -> None:
        super().__init__(images, tokenizer)
        known = transformers.Idefics3ImageProcessorPil()
        self.whole = transformers.Idefics3Processor(known, tokenizer, image_seq_len=4)
        self.whole.image_processor = images

    def __call__(self, text: list[str], images: list[Image.Image] | None, return_tensors: str) -> Any:
        return self.whole(text=text, images=None if images is None else [images], return_tensors=return_tensors)


class QwenProcessor(WithoutVideos):
    """Qwen's, whose tower sees patches merged by fours."""

    def __call__(self, text: list[str], images: list[Image.Image] | None, return_tensors: str) -> dict[str, Tensor]:
        found = {} if images is None else dict(self.images(images=images, return_tensors=return_tensors))
        stands = ["<|image_pad|>" * (int(grid.prod()) // 4) for grid in found.get("image_grid_thw", ())]
        tokens = self.tokens(text[0], "<|image_pad|>", stands)
        pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return {**found, **tokens, "mm_token_type_ids": (tokens["input_ids"] == pad).int()}
