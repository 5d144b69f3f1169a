"""Towers: what makes embeddings of an image. The modules are transformers' own, with the weights of the checkpoint.

A tower sees each image once: embeddings are kept by the image's digest, up to MAX_KEPT_BYTES.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from octavo.runtime.vision.recipes import AnyResolution, Layout, PromptImage, Size, VisionModel, WholePatches

MAX_KEPT_BYTES = 256 << 20


class SeenImage(NamedTuple):
    """What a tower sees of an image: frames, each [3, H, W] and normalized. size: the image's own."""

    frames: list[Tensor]
    size: Size


class TowerModule(Protocol):
    """One image -> [placeholders, hidden]."""

    def __call__(self, image: SeenImage) -> Tensor: ...


class VisionTower:
    """A model's tower, on the model's device.

    facts: what the server is told.
    """

    def __init__(self, facts: VisionModel, module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        self.facts = facts
        self.module = module.eval()
        first = next(module.parameters())
        self._dtype = first.dtype
        self._device = first.device
        self._scale = 1 / (255 * torch.tensor(std, dtype=torch.float32)).view(3, 1, 1)
        self._shift = (torch.tensor(mean, dtype=torch.float32) / torch.tensor(std, dtype=torch.float32)).view(3, 1, 1)
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._kept_bytes = 0

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.module.parameters())

    def places(self, token_ids: Sequence[int], image: PromptImage) -> NDArray[np.int64]:
        """Positions of an image's placeholders in its prompt."""
        tokens = np.asarray(token_ids[image.start : image.start + image.length])
        return np.flatnonzero(tokens == self.facts.placeholder_id) + image.start

    def problem_of(self, token_ids: Sequence[int], images: Sequence[PromptImage]) -> str | None:
        """What is wrong with a prompt's images, or None: a bad one must not end everybody's requests."""
        end = 0
        for number, image in enumerate(images):
            if not end <= image.start < image.start + image.length <= len(token_ids):
                return f"image {number}: it stands for tokens that the prompt doesn't have"
            end = image.start + image.length
            if len(image.pixels) != sum(3 * width * height for width, height in image.frames) or not image.frames:
                return f"image {number}: {len(image.pixels)} bytes are not those of its frames {image.frames}"
            if image.is_whole != self.facts.sees_ahead:
                return f"image {number}: whether one step computes it is not as the model wants it"
            wanted = self._num_embeddings(image, len(images))
            found = len(self.places(token_ids, image))
            if found != wanted:
                return f"image {number}: {found} placeholders in the prompt for {wanted} embeddings"
        return None

    def problem_of_logits(self, most: int) -> str | None:
        """What is wrong with prompt_logprobs of a prompt with images, where a step may have so many rows of logits."""
        least = self.facts.most_at_once
        if least <= most:
            return None
        return f"prompt_logprobs: an image's {least} tokens are computed in one step, which may list {most}"

    def _num_embeddings(self, image: PromptImage, num_images: int) -> int:
        """Of one of so many images of a prompt; -1 where none of its size has its frames."""
        try:
            layout = self.facts.recipe_for(num_images).layout(image.size, "")
        except (ValueError, ArithmeticError):
            return -1
        return layout.num_placeholders if image.frames == tuple(view.frame for view in layout.views) else -1

    def grid(self, image: PromptImage) -> Size | None:
        """Columns and rows of an image's placeholders, by which they are rotated; None: they are text to the rope."""
        recipe = self.facts.recipe
        return recipe.grid(image.frames[0]) if isinstance(recipe, WholePatches) else None

    @torch.inference_mode()
    def problem(self, hidden_size: int) -> str | None:
        """What goes wrong when the tower sees an image, or None: while requests run, it would end all of them.

        hidden_size: the decoder's. The image is black, and the one of two shapes that becomes fewer pixels.
        """
        recipe = self.facts.recipe
        try:
            layout, size = min(((recipe.layout(size, ""), size) for size in ((1, 1), (16, 1))), key=_num_pixels)
            frames = tuple(view.frame for view in layout.views)
            pixels = bytes(sum(3 * width * height for width, height in frames))
            made = self.module(self._seen(PromptImage(b"", 0, 0, size, frames, pixels)))
        except Exception as error:  # of transformers' modules, of any type
            return f"{type(error).__name__}: {error}"
        if len(made) != layout.num_placeholders or made.shape[1] % hidden_size:
            return f"it makes {list(made.shape)} for {layout.num_placeholders} tokens of {hidden_size} numbers"
        return None if bool(made.isfinite().all()) else "it makes numbers that are not finite"

    @torch.inference_mode()
    def embed(self, image: PromptImage) -> Tensor:
        """[placeholders, hidden] in the model's type, on its device."""
        kept = self._kept.get(image.digest)
        if kept is not None:
            self._kept.move_to_end(image.digest)
            return kept
        made: Tensor = self.module(self._seen(image)).to(self._dtype)
        self._kept[image.digest] = made
        self._kept_bytes += made.nbytes
        while self._kept_bytes > MAX_KEPT_BYTES and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.nbytes
        return made

    def _seen(self, image: PromptImage) -> SeenImage:
        return SeenImage(list(self._frames(image)), image.size)

    def _frames(self, image: PromptImage) -> Iterator[Tensor]:
        begin = 0
        for width, height in image.frames:
            end = begin + 3 * width * height
            pixels = np.frombuffer(image.pixels, np.uint8, end - begin, begin).reshape(height, width, 3)
            frame = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)
            yield (frame * self._scale - self._shift).to(self._device, self._dtype)
            begin = end


def _num_pixels(seen: tuple[Layout, Size]) -> int:
    return sum(width * height for width, height in (view.frame for view in seen[0].views))


class LlavaModule(nn.Module):
    """A CLIP or SigLIP tower, of which one layer's states, or several layers' side by side, are projected."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import AutoModel
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self._layer = config.vision_feature_layer
        self._drops_first = config.vision_feature_select_strategy == "default"

    def forward(self, image: SeenImage) -> Tensor:
        states = self.vision_tower(torch.stack(image.frames), output_hidden_states=True, return_dict=True).hidden_states
        layers = [self._layer] if isinstance(self._layer, int) else self._layer
        chosen = torch.cat([states[layer][:, self._drops_first :] for layer in layers], dim=-1)
        projected: Tensor = self.multi_modal_projector(chosen)
        return projected.flatten(0, 1)


class AnyResolutionModule(nn.Module):
    """A tower of LLaVA-NeXT or LLaVA-OneVision: the image as a whole, and squares of a grid, whose patches are put
    together line by line; those beside the image are left out. An image in one frame has a token behind that.
    """

    def __init__(self, config: Any, recipe: AnyResolution) -> None:
        super().__init__()
        from transformers import AutoModel
        from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaNextMultiModalProjector(config)
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))
        self._recipe = recipe
        self._layer = config.vision_feature_layer
        self._drops_first = config.vision_feature_select_strategy == "default"

    def forward(self, image: SeenImage) -> Tensor:
        pixels = torch.stack(image.frames)
        states = self.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
        layers = [self._layer] if isinstance(self._layer, int) else self._layer
        chosen = torch.cat([states[layer][:, self._drops_first :] for layer in layers], dim=-1)
        whole, *squares = self.multi_modal_projector(chosen)
        if not squares:
            return torch.cat((whole, self.image_newline[None]))
        return torch.cat((whole, self._in_lines(torch.stack(squares), image.size)))

    def _in_lines(self, squares: Tensor, size: Size) -> Tensor:
        """Patches [squares, patches, hidden] of a grid, with a token behind each line: [placeholders, hidden]."""
        columns, rows = self._recipe.grid(size)
        side = self._recipe.patches
        lines = squares.view(rows, columns, side, side, -1).transpose(1, 2).reshape(rows * side, columns * side, -1)
        kept = self._recipe.kept(size)
        left, top = kept.out
        across, down = kept.left
        lines = lines[top : top + down, left : left + across]
        if kept.made != kept.left:
            wanted = (kept.made[1], kept.made[0])
            lines = nn.functional.interpolate(lines.permute(2, 0, 1)[None], wanted, mode="bilinear")[0].permute(1, 2, 0)
        ends = self.image_newline.expand(len(lines), 1, -1)
        return torch.cat((lines, ends), dim=1).flatten(0, 1)


class Mistral3Module(nn.Module):
    """A Pixtral tower, whose patches are merged by squares and projected."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import AutoModel
        from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = Mistral3MultiModalProjector(config)
        self._layer = config.vision_feature_layer

    def forward(self, image: SeenImage) -> Tensor:
        (frame,) = image.frames
        sizes = torch.tensor([frame.shape[1:]])
        seen = self.vision_tower(frame[None], image_sizes=sizes, output_hidden_states=True, return_dict=True)
        layers = [self._layer] if isinstance(self._layer, int) else self._layer
        chosen = torch.cat([seen.hidden_states[layer] for layer in layers], dim=-1)
        projected: Tensor = self.multi_modal_projector(chosen.squeeze(0), sizes.tolist())
        return projected


class InternModule(nn.Module):
    """An InternViT tower over squares, whose patches are put together by fours and projected."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import AutoModel
        from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = InternVLMultiModalProjector(config)
        self._drops_first = config.vision_feature_select_strategy == "default"

    def forward(self, image: SeenImage) -> Tensor:
        seen = self.vision_tower(pixel_values=torch.stack(image.frames), return_dict=True).last_hidden_state
        patches = seen[:, self._drops_first :]
        side = math.isqrt(patches.shape[1])
        grid = patches.reshape(len(image.frames), side // 2, 2, side // 2, 2, -1)
        squares = grid.transpose(2, 3).reshape(len(image.frames), side * side // 4, -1)
        projected: Tensor = self.multi_modal_projector(squares)
        return projected.flatten(0, 1)


class GemmaModule(nn.Module):
    """Gemma 3's SigLIP tower, whose patches are averaged by squares and projected."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import AutoModel
        from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = Gemma3MultiModalProjector(config)

    def forward(self, image: SeenImage) -> Tensor:
        seen = self.vision_tower(pixel_values=torch.stack(image.frames), return_dict=True).last_hidden_state
        projected: Tensor = self.multi_modal_projector(seen)
        return projected.flatten(0, 1)


class QwenModule(nn.Module):
    """A tower of Qwen2-VL and later: patches of any number, merged by fours. A still image is two frames of it.

    Qwen3-VL's gives features of its earlier layers too, for the decoder's first ones; they stand behind the others.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import AutoModel
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

        vision = config.vision_config
        make = AutoModel.from_config
        if config.model_type == "qwen2_vl":  # whose tower AutoModel doesn't know
            make = Qwen2VisionTransformerPretrainedModel._from_config
        self.visual = make(vision)
        self._patch = vision.patch_size
        self._merge = vision.spatial_merge_size
        self._num_times = vision.temporal_patch_size

    def forward(self, image: SeenImage) -> Tensor:
        (frame,) = image.frames
        rows, columns = (side // self._patch for side in frame.shape[1:])
        merge = self._merge
        blocks = frame.reshape(3, rows // merge, merge, self._patch, columns // merge, merge, self._patch)
        blocks = blocks.permute(1, 4, 2, 5, 0, 3, 6)  # patches that are merged stand together
        times = blocks.unsqueeze(5).expand(*blocks.shape[:5], self._num_times, *blocks.shape[5:])
        grid = torch.tensor([[1, rows, columns]], device=frame.device)
        seen = self.visual(times.reshape(rows * columns, -1), grid_thw=grid, return_dict=True)
        return torch.cat((seen.pooler_output, *(getattr(seen, "deepstack_features", None) or ())), dim=-1)


class IdeficsModule(nn.Module):
    """A tower of Idefics 3 or SmolVLM: tiles of one size, whose patches are put together by squares and projected."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.model_type == "smolvlm":
            from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector as Connector
            from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer as Vision
        else:
            from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector as Connector
            from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer as Vision
        self.vision_model = Vision._from_config(config.vision_config)
        self.connector = Connector(config)
        self._num_patches = config.vision_config.image_size // config.vision_config.patch_size

    def forward(self, image: SeenImage) -> Tensor:
        pixels = torch.stack(image.frames)
        whole = torch.ones(len(pixels), self._num_patches, self._num_patches, dtype=torch.bool, device=pixels.device)
        seen = self.vision_model(pixel_values=pixels, patch_attention_mask=whole, return_dict=True).last_hidden_state
        joined: Tensor = self.connector(seen)
        return joined.flatten(0, 1)
