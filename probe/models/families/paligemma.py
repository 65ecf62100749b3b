"""PaliGemma: a prefix that sees itself in both directions, then an answer that is causal.

What is special: the forward needs ``token_type_ids``, which say where the answer begins; without them the whole text is
causal, and with the answer in the prefix the row that predicts it would see it. Positions begin with 1. The model was
not trained on several images or questions: its own format for one is repeated for every demonstration. PaliGemma 2
squashes its attention scores (softcapping), which no kernel here does; it is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from probe.models.encoding import Batch, ImageTokens, grid_places
from probe.models.family import Family, Images, running_positions

if TYPE_CHECKING:
    from probe.models.model import Model


def process_images(model: Model, images: list[Image.Image]) -> Images:
    """Pixel values, and the square of tokens of each image."""
    pixels = model.image_processor(images=images, return_tensors="pt")["pixel_values"]
    height, width = pixels.shape[-2:]
    patch = model.config.vision_config.patch_size
    places = grid_places(height // patch, width // patch)
    return {"pixel_values": pixels}, [ImageTokens(*places, (width, height), image.size) for image in images]


def finish(model: Model, batch: Batch) -> dict[str, Tensor]:
    """1 from the query's answer on, 0 in the prefix."""
    kinds = torch.zeros_like(batch.inputs["input_ids"])
    for row, encoding, pad in zip(kinds, batch.encodings, batch.pads, strict=True):
        row[pad + encoding.n_prompt :] = 1
    return {"token_type_ids": kinds}


def positions(model: Model, batch: Batch) -> Tensor:
    """The first is 1."""
    return running_positions(model, batch) + 1


PALIGEMMA = Family(
    name="PaliGemma",
    model_type="paligemma",
    special="What comes before the answer sees itself in both directions.",
    module_class="PaliGemmaForConditionalGeneration",
    image_processor_class="siglip.image_processing_pil_siglip.SiglipImageProcessorPil",
    placeholder="<image>",
    process_images=process_images,
    finish=finish,
    positions=positions,
    prompt="pair",
    aliases={"paligemma": "google/paligemma-3b-mix-224"},
)
