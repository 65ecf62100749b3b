"""LLaVA-NeXT: the whole image at low resolution, then crops of it at high resolution, row after row.

What is special: the crops are joined to one grid, the padding of the picture is cut off from it, and every row ends in
a learned newline, which stands in the image's run but shows nothing of it (so it is structural, not visual).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from probe.models.encoding import ImageTokens, grid_places, join_places
from probe.models.family import Family, Images

if TYPE_CHECKING:
    from probe.models.model import Model


def process_images(model: Model, images: list[Image.Image]) -> Images:
    """Pixel values ``[image, tile, …]`` and sizes, and the tokens of each image."""
    out = model.image_processor(images=images, return_tensors="pt")
    tokens = [
        high_resolution(model.config, image, unpadded_grid(model.config, size))
        for image, size in zip(images, out["image_sizes"].tolist(), strict=True)
    ]
    return {"pixel_values": out["pixel_values"], "image_sizes": out["image_sizes"]}, tokens


def unpadded_grid(config: Any, size: list[int]) -> np.ndarray:
    """Which tokens of the joined crops are kept: ``[row, column]``, the number of the crop that each comes from."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    side = tokens_a_side(config)
    rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    crops = 1 + torch.arange(rows * columns).view(rows, columns)
    joined = crops.repeat_interleave(side, 0).repeat_interleave(side, 1)
    kept: np.ndarray = unpad_image(joined[None], size)[0].numpy()
    return kept


def tokens_a_side(config: Any) -> int:
    """Rows, and columns, of the tokens of one crop."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def high_resolution(config: Any, image: Image.Image, kept: np.ndarray) -> ImageTokens:
    """The tokens of one image: its low-resolution grid, then the rows of the crops, each with a newline."""
    side, patch = tokens_a_side(config), config.vision_config.patch_size
    rows, columns = kept.shape
    newline = np.full((rows, 1), -1)
    row, column = np.mgrid[:rows, :columns]
    lines = [np.concatenate([axis, newline], 1).ravel() for axis in (kept, row, column)]
    tile, row, column = join_places(grid_places(side, side), (lines[0], lines[1], lines[2]))
    return ImageTokens(tile, row, column, (columns * patch, rows * patch), image.size, structural=tile < 0)


LLAVA_NEXT = Family(
    name="LLaVA-NeXT",
    model_type="llava_next",
    special="The whole image, then crops of it joined row by row, each row ended by a newline token.",
    module_class="LlavaNextForConditionalGeneration",
    image_processor_class="llava_next.image_processing_pil_llava_next.LlavaNextImageProcessorPil",
    placeholder="<image>",
    process_images=process_images,
    aliases={
        "llava-next": "llava-hf/llava-v1.6-mistral-7b-hf",
        "llava-next-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    },
)
