"""LLaVA 1.5 and LLaVA-Interleave: one square of tokens for each image, in the text.

What is special: nothing; the plainest of the families. Where the configuration keeps all features of a CLIP tower, its
class token comes first and has no place in the grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from probe.models.encoding import ImageTokens, grid_places, join_places, no_places
from probe.models.family import Family, Images

if TYPE_CHECKING:
    from probe.models.model import Model


def process_images(model: Model, images: list[Image.Image]) -> Images:
    """Pixel values, and the square of tokens of each image."""
    pixels = model.image_processor(images=images, return_tensors="pt")["pixel_values"]
    vision = model.config.vision_config
    height, width = pixels.shape[-2:]
    places = grid_places(height // vision.patch_size, width // vision.patch_size)
    if model.config.vision_feature_select_strategy == "full" and vision.model_type == "clip_vision_model":
        places = join_places(no_places(1), places)
    return {"pixel_values": pixels}, [ImageTokens(*places, (width, height), image.size) for image in images]


LLAVA = Family(
    name="LLaVA",
    model_type="llava",
    special="One square of tokens for each image.",
    module_class="LlavaForConditionalGeneration",
    image_processor_class="clip.image_processing_pil_clip.CLIPImageProcessorPil",
    placeholder="<image>",
    process_images=process_images,
    prompt="live",
    aliases={
        "llava": "llava-hf/llava-1.5-7b-hf",
        "llava-13b": "llava-hf/llava-1.5-13b-hf",
        "llava-interleave": "llava-hf/llava-interleave-qwen-7b-hf",
    },
)
