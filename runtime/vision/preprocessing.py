"""What a checkpoint's files say of how its images are resized and normalized."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octavo.quant.model_files import read_object_if_any

BICUBIC = 3
LANCZOS = 1
BILINEAR = 2
FILTERS = 6  # of Pillow, by number
MOST = 1e6  # of what a color has for its mean or deviation
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
SIGLIP_PROCESSORS = ("SiglipImageProcessor",)
CLIP_PROCESSORS = ("CLIPImageProcessor", "LlavaImageProcessor")
QWEN_PROCESSORS = ("Qwen2VLImageProcessor",)
PIXTRAL_PROCESSORS = ("PixtralImageProcessor",)
LLAMA4_PROCESSORS = ("Llama4ImageProcessor",)
GEMMA4_PROCESSORS = ("Gemma4ImageProcessor",)
GEMMA_PROCESSORS = ("Gemma3ImageProcessor",)
ANY_RESOLUTION_PROCESSORS = ("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")
INTERN_PROCESSORS = ("GotOcr2ImageProcessor",)
IDEFICS_PROCESSORS = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")


class UnreadImagesError(ValueError):
    """Why this checkpoint's images can't be read here; its text can."""


class Preprocessing:
    """What preprocessor_config.json, or transformers 5's processor_config.json, says of images."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        both = read_object_if_any(directory / "processor_config.json").get("image_processor")
        found = read_object_if_any(directory / "preprocessor_config.json") or both
        if not isinstance(found, dict) or not found:
            raise UnreadImagesError("the checkpoint has no preprocessor_config.json, which says how images are resized")
        self.values: dict[str, Any] = found
        self.kind = str(found.get("image_processor_type") or found.get("feature_extractor_type"))
        self.kind = self.kind.removesuffix("Fast").removesuffix("Pil")
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if found.get(key) is False and (key != "do_normalize" or self.kind not in GEMMA4_PROCESSORS):
                raise UnreadImagesError(f"preprocessor_config.json: {key} false is not supported")
        factor = found.get("rescale_factor") or 1 / 255
        if not isinstance(factor, float) or not abs(factor * 255 - 1) <= 1e-6:
            raise UnreadImagesError(f"preprocessor_config.json: rescale_factor {factor!r} isn't 1 / 255")
        pads = (*IDEFICS_PROCESSORS, *PIXTRAL_PROCESSORS, *ANY_RESOLUTION_PROCESSORS)  # batches of images
        if found.get("do_pad") and self.kind not in pads:
            raise UnreadImagesError("preprocessor_config.json: do_pad true is not supported")
        is_half = self.kind in SIGLIP_PROCESSORS + IDEFICS_PROCESSORS + GEMMA_PROCESSORS + LLAMA4_PROCESSORS
        self.mean = self._channels("image_mean", HALF if is_half else CLIP_MEAN)
        self.std = self._channels("image_std", HALF if is_half else CLIP_STD)
        resample = found.get("resample")
        default = LANCZOS if self.kind in IDEFICS_PROCESSORS else BICUBIC
        default = BILINEAR if self.kind in GEMMA_PROCESSORS + LLAMA4_PROCESSORS else default
        self.resample = default if resample is None else resample
        if type(self.resample) is not int or self.resample not in range(FILTERS):
            raise UnreadImagesError(f"preprocessor_config.json: resample {resample!r} is none of Pillow's filters")

    def _channels(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        found = self.values.get(key) or default
        is_list = isinstance(found, list | tuple)
        if not is_list or len(found) != 3 or not all(isinstance(one, int | float) and abs(one) < MOST for one in found):
            raise UnreadImagesError(f"preprocessor_config.json: {key} {found} isn't a number for each channel")
        return tuple(found)

    def token(self, name: str, default: str) -> str:
        """A token that the tokenizer knows by a name: `boi_token`."""
        found = read_object_if_any(self._directory / "tokenizer_config.json").get(name) or default
        return str(found.get("content") if isinstance(found, dict) else found)

    def token_id(self, name: str) -> int:
        """Of a token that tokenizer.json lists beside the vocabulary. Raises UnreadImagesError."""
        added = read_object_if_any(self._directory / "tokenizer.json").get("added_tokens")
        tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        found = next((token.get("id") for token in tokens if token.get("content") == name), None)
        if type(found) is not int:
            raise UnreadImagesError(f"tokenizer.json has no token {name}, which stands for an image in chats")
        return found

    def check_kind(self, known: Sequence[str]) -> None:
        if self.kind not in known:
            raise UnreadImagesError(
                f"preprocessor_config.json: image_processor_type {self.kind!r} is not supported here; "
                f"{' and '.join(known)} is"
            )

    def check_same(self, key: str, have: object) -> None:
        """Refuse a value that is another than the tower's."""
        if self.values.get(key, have) != have:
            raise UnreadImagesError(f"preprocessor_config.json: {key} {self.values[key]} isn't the tower's, {have}")

    def size(self, name: str) -> dict[str, int]:
        """`size` or `crop_size`; in older files one number, of the shorter side or of both."""
        given = self.values.get(name)
        if isinstance(given, int):
            return {"shortest_edge": given} if name == "size" else {"height": given, "width": given}
        return dict(given) if isinstance(given, dict) else {}
