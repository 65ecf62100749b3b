"""Idefics2: a resampler turns every image into the same number of latents, which have no place in a grid.

What is special: an image stands between marker tokens, of which two images that touch share one; with image splitting
it is four crops and then the whole. Images without a grid have no overlay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from probe.models.encoding import ImageTokens, join_places, no_places
from probe.models.family import Family, Images

if TYPE_CHECKING:
    from probe.models.model import Model

MARKER, IMAGE = "<fake_token_around_image>", "<image>"
CROPS = 4


def process_images(model: Model, images: list[Image.Image]) -> Images:
    """Pixel values and their mask, ``[1, image, …]``, and the latents of each image."""
    processor, n = model.image_processor, model.config.perceiver_config.resampler_n_latents
    out = processor([images], return_tensors="pt")
    tiles = [*range(1, CROPS + 1), 0] if processor.do_image_splitting else [0]
    shown = out["pixel_attention_mask"][0].reshape(len(images), len(tiles), *out["pixel_attention_mask"].shape[2:])
    tokens = []
    for image, masks in zip(images, shown, strict=True):
        whole = masks[-1]
        size = (int(whole.any(0).sum()), int(whole.any(1).sum()))
        text = MARKER + (IMAGE * n + MARKER) * len(tiles)
        tokens.append(ImageTokens(*join_places(*(no_places(n, tile) for tile in tiles)), size, image.size, text))
    return {"pixel_values": out["pixel_values"], "pixel_attention_mask": out["pixel_attention_mask"]}, tokens


def beside(text: str, before: str, after: str) -> str:
    """Images that touch share a marker; a word that touches one is set apart by a space."""
    if after.startswith(IMAGE):
        return text.removesuffix(MARKER)
    return text + (" " if after and not after[0].isspace() and after[0] != "<" else "")


IDEFICS2 = Family(
    name="Idefics2",
    model_type="idefics2",
    special="A resampler turns every image into 64 latents without a grid.",
    module_class="Idefics2ForConditionalGeneration",
    image_processor_class="idefics2.image_processing_pil_idefics2.Idefics2ImageProcessorPil",
    placeholder=IMAGE,
    process_images=process_images,
    beside=beside,
    by_episode=True,
    prompt="mimic",
    aliases={"idefics2": "HuggingFaceM4/idefics2-8b", "idefics2-base": "HuggingFaceM4/idefics2-8b-base"},
)
