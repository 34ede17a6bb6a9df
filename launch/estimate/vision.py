"""What the images of a decision add to a vision-language model's step, by its configuration alone.

Images become tokens of the text row, or states that the text attends to (Mllama). The tower itself runs without
gradients: steered sites lie behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from launch.estimate.architecture import Architecture

Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True, slots=True)
class Sight:
    """The images of one decision.

    Attributes:
        tokens: that they add to the text row.
        tower_bytes: that the tower's forward pass needs at its peak (crude: eight activations of its width and two of
            its feed-forward width, a patch).
        inputs: arguments of the model's forward for given token ids, where images are attended to.
    """

    tokens: int
    tower_bytes: int
    inputs: Callable[[Tensor], dict[str, Tensor]] | None = None


def sight(architecture: Architecture, images: Sequence[Size]) -> Sight:
    """What the images of a decision add; a text model takes none."""
    vision = architecture.vision_config
    if vision is None or not images:
        return Sight(0, 0)
    if architecture.config.model_type == "mllama":
        return _attended(architecture, len(images))
    tokens, patches = zip(*(_tokens(architecture, size) for size in images), strict=True)
    return Sight(sum(tokens), _tower_bytes(architecture, sum(patches)))


def _tokens(architecture: Architecture, size: Size) -> tuple[int, int]:
    """Tokens in the text and patches in the tower of one image."""
    config, vision = architecture.config, architecture.vision_config
    merge = getattr(vision, "spatial_merge_size", None)
    if merge and hasattr(vision, "patch_size") and not hasattr(vision, "image_size"):
        # Qwen2-VL and later: the image keeps its size, as near as whole tokens allow
        width, height = (max(1, round(side / (vision.patch_size * merge))) for side in size)
        return width * height, width * height * merge**2
    patches = (vision.image_size // vision.patch_size) ** 2
    if tokens := getattr(config, "mm_tokens_per_image", None):  # pooled to a fixed number (Gemma 3)
        return tokens, patches
    if ratio := getattr(config, "downsample_ratio", None):  # pixel shuffle of InternVL
        return round(patches * ratio**2), patches
    return max(1, patches // getattr(config, "scale_factor", 1) ** 2), patches  # pixel shuffle of Idefics 3; LLaVA


def _attended(architecture: Architecture, images: int) -> Sight:
    """Mllama: every image is a fixed number of tiles, whose patches the text's cross-attention looks at."""
    vision = architecture.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    states, width = images * vision.max_num_tiles * patches, architecture.text_config.hidden_size
    dtype = architecture.model.dtype

    def inputs(input_ids: Tensor) -> dict[str, Tensor]:
        rows, length = input_ids.shape
        with torch.device("meta"):
            return {
                "cross_attention_states": torch.empty(rows, states, width, dtype=dtype),
                "cross_attention_mask": torch.empty(rows, length, images, vision.max_num_tiles, dtype=torch.long),
            }

    return Sight(images, _tower_bytes(architecture, states), inputs)


def _tower_bytes(architecture: Architecture, patches: int) -> int:
    vision = architecture.vision_config
    inner = getattr(vision, "intermediate_size", 4 * vision.hidden_size)
    return patches * (8 * vision.hidden_size + 2 * inner) * architecture.model.dtype.itemsize
