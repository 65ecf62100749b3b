"""Idefics (the first): the text reads images through gated cross-attention; no image is a token of the text.

What is special: one cross-attention block runs before every fourth layer. Its keys are the images' latents, on an axis
of their own, and a position sees only the last image before it. So the text's own attention mass on images is
undefined, not zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from probe.models.encoding import Batch, ImageTokens, grid_places, join_places, no_places
from probe.models.family import Family, Images

if TYPE_CHECKING:
    from probe.models.model import Model

MARKER, IMAGE = "<fake_token_around_image>", "<image>"


def process_images(model: Model, images: list[Image.Image]) -> Images:
    """Pixel values ``[1, image, …]``, and the keys of each image on the vision axis."""
    config, pixels = model.config, model.image_processor(images, return_tensors="pt")
    pixels = pixels if isinstance(pixels, Tensor) else pixels["pixel_values"]
    if config.use_resampler:
        places = no_places(config.perceiver_config.resampler_n_latents)
    else:
        side = config.vision_config.image_size // config.vision_config.patch_size
        places = join_places(no_places(1), grid_places(side, side))
    height, width = pixels.shape[-2:]
    text = f"{MARKER}{IMAGE}{MARKER}"
    return {"pixel_values": pixels[None]}, [ImageTokens(*places, (width, height), i.size, text) for i in images]


def beside(text: str, before: str, after: str) -> str:
    """Images that touch share a marker."""
    return text.removeprefix(MARKER) if before.endswith(IMAGE) else text


def finish(model: Model, batch: Batch) -> dict[str, Tensor]:
    """Which image each position sees: the last one before it, up to the end of its text. Without images, none."""
    ids = batch.inputs["input_ids"]
    starts, stops = ids == model.tokenizer.convert_tokens_to_ids(IMAGE), ids == model.tokenizer.eos_token_id
    ended = stops.long().cumsum(1) - stops.long()  # texts that ended before a position
    ended_before_image = torch.where(starts, ended, 0).cummax(1).values
    last = (starts.long().cumsum(1) - 1).masked_fill(ended > ended_before_image, -1)
    if "pixel_values" not in batch.inputs:
        side = model.config.vision_config.image_size
        pixels = torch.zeros(len(ids), 1, model.config.vision_config.num_channels, side, side)
        return {"pixel_values": pixels, "image_attention_mask": torch.zeros(*ids.shape, 1, dtype=torch.long)}
    n_images = batch.inputs["pixel_values"].shape[1]
    return {"image_attention_mask": (last[..., None] == torch.arange(n_images)).long()}


def gate(block: Any) -> Tensor:
    """What the block's attention output is multiplied by."""
    factor: Tensor = block.act_cross_attn(block.alpha_cross_attn)
    return factor


IDEFICS = Family(
    name="Idefics",
    model_type="idefics",
    special="The text reads images through gated cross-attention, one image at a time.",
    module_class="IdeficsForVisionText2Text",
    image_processor_class="idefics.image_processing_pil_idefics.IdeficsImageProcessorPil",
    placeholder=IMAGE,
    process_images=process_images,
    image_token=None,
    finish=finish,
    beside=beside,
    by_episode=True,
    gate=gate,
    prompt="mimic",
    aliases={
        "idefics": "HuggingFaceM4/idefics-9b",
        "idefics-80b": "HuggingFaceM4/idefics-80b",
        "idefics-9b-instruct": "HuggingFaceM4/idefics-9b-instruct",
    },
)
