"""Gemma 3: every image is a square of 256 tokens, which see one another in both directions.

What is special: most layers see only a window of the last keys, so what is visible differs between layers; and the
forward needs ``token_type_ids`` to let the tokens of an image see later ones of the same image. Cropping of wide
pictures ("pan and scan") is off, as it is in transformers' processor unless it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from probe.models.encoding import Batch, ImageTokens, grid_places
from probe.models.family import Family, Images

if TYPE_CHECKING:
    from probe.models.model import Model


def process_images(model: Model, images: list[Image.Image]) -> Images:
    """Pixel values, and the square of tokens of each image."""
    out = model.image_processor(images=images, return_tensors="pt", do_pan_and_scan=False)
    n, tokenizer = model.config.mm_tokens_per_image, model.tokenizer
    spelled = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    first, last = (
        tokenizer.convert_ids_to_tokens(i) for i in (model.config.boi_token_index, model.config.eoi_token_index)
    )
    text = f"\n\n{first}{spelled * n}{last}\n\n"
    height, width = out["pixel_values"].shape[-2:]
    side = int(n**0.5)
    tokens = [ImageTokens(*grid_places(side, side), (width, height), image.size, text) for image in images]
    return {"pixel_values": out["pixel_values"]}, tokens


def finish(model: Model, batch: Batch) -> dict[str, Tensor]:
    """Which positions are image tokens."""
    return {"token_type_ids": (batch.inputs["input_ids"] == model.config.image_token_id).long()}


def norm(block: Any) -> tuple[Tensor, float]:
    """The norm that attention's output passes before it is added."""
    return 1 + block.post_attention_layernorm.weight, float(block.post_attention_layernorm.eps)


GEMMA3 = Family(
    name="Gemma 3",
    model_type="gemma3",
    special="Sliding windows in most layers; an image's tokens see one another in both directions.",
    module_class="Gemma3ForConditionalGeneration",
    image_processor_class="gemma3.image_processing_pil_gemma3.Gemma3ImageProcessorPil",
    placeholder="<start_of_image>",
    process_images=process_images,
    finish=finish,
    norm=norm,
    aliases={
        "gemma3": "google/gemma-3-4b-it",
        "gemma3-12b": "google/gemma-3-12b-it",
        "gemma3-27b": "google/gemma-3-27b-it",
    },
)
