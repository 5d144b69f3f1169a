"""The modules of towers: transformers' own, and what each model makes of their output: [placeholders, hidden].

They are given a SeenImage each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo.runtime.vision.recipes import AnyResolution, Size


class SeenImage(NamedTuple):
    """What a tower sees of an image: frames, each [3, H, W] and normalized. size: the image's own."""

    frames: list[Tensor]
    size: Size


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
        seen = self.vision_tower(torch.stack(image.frames), output_hidden_states=True, return_dict=True)
        chosen = _side_by_side(seen.hidden_states, self._layer)[:, self._drops_first :]
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
        seen = self.vision_tower(torch.stack(image.frames), output_hidden_states=True, return_dict=True)
        chosen = _side_by_side(seen.hidden_states, self._layer)[:, self._drops_first :]
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
        chosen = _side_by_side(seen.hidden_states, self._layer)
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
    """A SigLIP tower, whose patches are projected: PaliGemma's, and Gemma 3's, which averages them by squares first."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import AutoModel

        if config.model_type == "paligemma":
            from transformers.models.paligemma.modeling_paligemma import PaliGemmaMultiModalProjector as Projector
        else:
            from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector as Projector
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = Projector(config)

    def forward(self, image: SeenImage) -> Tensor:
        seen = self.vision_tower(pixel_values=torch.stack(image.frames), return_dict=True).last_hidden_state
        projected: Tensor = self.multi_modal_projector(seen)
        return projected.flatten(0, 1)


class Llama4Module(nn.Module):
    """Llama 4's tower over squares, whose patches are put together by fours and projected."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.llama4.modeling_llama4 import Llama4MultiModalProjector, Llama4VisionModel

        self.vision_model = Llama4VisionModel._from_config(config.vision_config)
        self.multi_modal_projector = Llama4MultiModalProjector(config)

    def forward(self, image: SeenImage) -> Tensor:
        seen = self.vision_model(torch.stack(image.frames), return_dict=True).last_hidden_state
        projected: Tensor = self.multi_modal_projector(seen)
        return projected.flatten(0, 1)


class Gemma4Module(nn.Module):
    """Gemma 4's tower: patches of any number, averaged by squares, normed and projected."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import AutoModel
        from transformers.models.gemma4.modeling_gemma4 import Gemma4MultimodalEmbedder

        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.embed_vision = Gemma4MultimodalEmbedder(config.vision_config, config.text_config)
        self._patch = config.vision_config.patch_size

    def forward(self, image: SeenImage) -> Tensor:
        (frame,) = image.frames
        rows, columns = (side // self._patch for side in frame.shape[1:])
        squares = frame.reshape(3, rows, self._patch, columns, self._patch).permute(1, 3, 2, 4, 0)
        pixels = (squares.reshape(1, rows * columns, -1).float() + 1) / 2  # the tower makes -1 .. 1 of 0 .. 1
        down, across = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places = torch.stack((across, down), dim=-1).reshape(1, rows * columns, 2).to(frame.device)
        seen = self.vision_tower(pixel_values=pixels, pixel_position_ids=places, return_dict=True).last_hidden_state
        projected: Tensor = self.embed_vision(inputs_embeds=seen)
        return projected.flatten(0, -2)


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


def _side_by_side(states: Sequence[Tensor], chosen: int | Sequence[int]) -> Tensor:
    """One layer's states, or several layers', [frames, patches, layers * hidden]."""
    return torch.cat([states[layer] for layer in ([chosen] if isinstance(chosen, int) else chosen)], dim=-1)
