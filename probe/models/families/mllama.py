"""Llama 3.2 Vision: cross-attention layers among the decoder's own read the images; a marker stands in the text.

What is special: the keys of an image are up to four crops of it with a class token each, on an axis of their own, and a
position sees the last image before it (images that touch are seen together). So the text's own attention mass on images
is undefined, not zero. On text alone the cross-attention layers are skipped. Positions before the first image attend to
all keys alike, those of padding included, so an episode would be read differently beside one with more images: such
batches are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from probe.models.encoding import Batch, ImageTokens
from probe.models.family import Family, Images

if TYPE_CHECKING:
    from probe.models.model import Model

IMAGE = "<|image|>"


def process_images(model: Model, images: list[Image.Image]) -> Images:
    """Pixel values ``[1, image, tile, …]`` with what tells how the tiles lie, and the keys of each image."""
    from transformers.models.mllama.image_processing_pil_mllama import (
        get_all_supported_aspect_ratios,
        get_image_size_fit_to_canvas,
    )

    processor, vision = model.image_processor, model.config.vision_config
    out = processor([images], return_tensors="pt")
    shapes = get_all_supported_aspect_ratios(processor.max_image_tiles)
    side = vision.image_size // vision.patch_size
    tokens = []
    for image, shape in zip(images, out["aspect_ratio_ids"][0].tolist(), strict=True):
        rows, columns = shapes[shape - 1]
        tile, within = np.divmod(np.arange(vision.max_num_tiles * (side**2 + 1)), side**2 + 1)
        in_grid = (within > 0) & (tile < rows * columns)
        row = np.where(in_grid, tile // columns * side + (within - 1) // side, -1)
        column = np.where(in_grid, tile % columns * side + (within - 1) % side, -1)
        canvas = (columns * vision.image_size, rows * vision.image_size)
        height, width = get_image_size_fit_to_canvas(image.height, image.width, canvas[1], canvas[0], vision.image_size)
        box = (0.0, 0.0, canvas[0] / width, canvas[1] / height)  # the rest of the canvas is padding
        crop, unused = tile + 1 if rows * columns > 1 else tile, tile >= rows * columns
        places = (crop, row, column)
        tokens.append(ImageTokens(*places, (width, height), image.size, IMAGE, structural=unused, box=box))
    return {name: out[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}, tokens


def finish(model: Model, batch: Batch) -> dict[str, Tensor]:
    """Which tiles each position sees: those of the last image before it, and of images that touch that one."""
    if "pixel_values" not in batch.inputs:
        return {}
    ids, tiles = batch.inputs["input_ids"], batch.inputs["aspect_ratio_mask"].clone()
    seen = torch.zeros(*ids.shape, *tiles.shape[1:], dtype=torch.long)
    for row, tokens, mask in zip(seen, ids, tiles, strict=True):
        markers = (tokens == model.config.image_token_id).nonzero()[:, 0].tolist()
        stop = len(tokens)
        for number, start in reversed(list(enumerate(markers))):
            following = markers[number + 1] if number + 1 < len(markers) else None
            if following is not None and following > start + 1:
                stop = following
            row[start:stop, number] = mask[number]
    tiles[..., 0] = 1  # of images that an episode lacks: the vision tower divides by what it sees
    shapes = batch.inputs["aspect_ratio_ids"]
    return {"cross_attention_mask": seen, "aspect_ratio_mask": tiles, "aspect_ratio_ids": shapes}


def gate(block: Any) -> Tensor:
    """What the block's attention output is multiplied by."""
    factor: Tensor = block.cross_attn_attn_gate.tanh()
    return factor


MLLAMA = Family(
    name="Llama 3.2 Vision",
    model_type="mllama",
    special="Cross-attention layers read up to four crops of the last image.",
    module_class="MllamaForConditionalGeneration",
    image_processor_class="mllama.image_processing_pil_mllama.MllamaImageProcessorPil",
    placeholder=IMAGE,
    process_images=process_images,
    image_token=None,
    finish=finish,
    by_episode=True,
    like_images=True,
    gate=gate,
    aliases={"llama-vision": "meta-llama/Llama-3.2-11B-Vision-Instruct"},
)
