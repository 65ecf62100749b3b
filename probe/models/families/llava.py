"""LLaVA 1.5 and LLaVA-Interleave: one square of tokens for each image, in the text.

What is special: little. CLIP's image processor keeps the square in the middle of a picture, and no more. Where the
configuration keeps all features of a CLIP tower, its class token comes first and has no place in the grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    tokens = [
        ImageTokens(*places, (width, height), image.size, box=covered(model.image_processor, image)) for image in images
    ]
    return {"pixel_values": pixels}, tokens


def covered(processor: Any, image: Image.Image) -> tuple[float, float, float, float]:
    """What the image processor keeps of an image: with CLIP's, the square in its middle."""
    width, height = image.size
    if getattr(processor, "do_pad", False):  # to a square, before anything else
        kept_width = kept_height = float(max(width, height))
    elif getattr(processor, "do_center_crop", False):
        scale = processor.size.shortest_edge / min(width, height) if processor.do_resize else 1.0
        kept_width, kept_height = processor.crop_size.width / scale, processor.crop_size.height / scale
    else:
        return 0.0, 0.0, 1.0, 1.0
    x, y = kept_width / width / 2, kept_height / height / 2
    return 0.5 - x, 0.5 - y, 0.5 + x, 0.5 + y


LLAVA = Family(
    name="LLaVA",
    model_type="llava",
    special="One square of tokens for each image; CLIP's image processor crops the picture to its middle.",
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
