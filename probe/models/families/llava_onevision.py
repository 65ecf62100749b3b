"""LLaVA-OneVision: one image alone is cropped as in LLaVA-NeXT; several images are one square of tokens each.

What is special: whether an image is cropped depends on how many the episode has, so the forward needs
``batch_num_images``; and where the joined crops have more tokens than allowed they are interpolated to a smaller grid,
whose tokens then lie across the borders of crops (they count to the crop under their centre).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from probe.models.encoding import ImageTokens, grid_places, join_places, no_places, square_box
from probe.models.families.llava_next import high_resolution, tokens_a_side, unpadded_grid
from probe.models.family import Family, Images

if TYPE_CHECKING:
    from probe.models.model import Model


def process_images(model: Model, images: list[Image.Image]) -> Images:
    """Pixel values ``[image, tile, …]``, sizes and the number of images, and the tokens of each image."""
    out = model.image_processor([images], return_tensors="pt")
    config, side = model.config, tokens_a_side(model.config)
    if len(images) == 1:
        kept = interpolated(config, unpadded_grid(config, out["image_sizes"][0].tolist()))
        tokens = [high_resolution(config, images[0], kept)]
    else:
        tile, row, column = join_places(grid_places(side, side), no_places(1))
        newline = np.arange(len(tile)) == side * side
        edge = config.vision_config.image_size
        tokens = []
        for image in images:  # each is padded to a square
            size = tuple(round(edge * side / max(image.size)) for side in image.size)
            box = square_box(image)
            tokens.append(ImageTokens(tile, row, column, (size[0], size[1]), image.size, structural=newline, box=box))
    inputs = {name: out[name] for name in ("pixel_values", "image_sizes")}
    return {**inputs, "batch_num_images": torch.tensor([len(images)])}, tokens


def interpolated(config: Any, kept: np.ndarray) -> np.ndarray:
    """The grid of crops after the model has made it smaller, if it has too many tokens."""
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    rows, columns = kept.shape
    ratio = (rows * columns / (most * tokens_a_side(config) ** 2)) ** 0.5
    if ratio <= 1.1:
        return kept
    smaller = [((np.arange(n := int(length // ratio)) + 0.5) * length / n).astype(int) for length in (rows, columns)]
    return kept[np.ix_(smaller[0], smaller[1])]


LLAVA_ONEVISION = Family(
    name="LLaVA-OneVision",
    model_type="llava_onevision",
    special="One image alone is cropped; several images are one square of tokens each.",
    module_class="LlavaOnevisionForConditionalGeneration",
    image_processor_class="llava_onevision.image_processing_pil_llava_onevision.LlavaOnevisionImageProcessorPil",
    placeholder="<image>",
    process_images=process_images,
    aliases={
        "llava-onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "llava-onevision-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    },
)
