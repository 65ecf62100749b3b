"""LLaVA 1.5 and LLaVA-Interleave: one square of tokens for each image, in the text.

What is special: little. CLIP's image processor keeps the square in the middle of a picture, and no more. Where the
configuration keeps all features of a CLIP tower, its class token comes first and has no place in the grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

from probe.models.encoding import ImageTokens, grid_places, join_places, no_places, square_box
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
    tokens = []
    for image in images:
        box = covered(model.image_processor, image)
        size = round(width / (box[2] - box[0])), round(height / (box[3] - box[1]))
        tokens.append(ImageTokens(*places, size, image.size, box=box))
    return {"pixel_values": pixels}, tokens


def covered(processor: Any, image: Image.Image) -> tuple[float, float, float, float]:
    """What the image processor keeps of an image: with CLIP's, the square in its middle."""
    if getattr(processor, "do_pad", False):  # to a square, before anything else
        return square_box(image)
    if not getattr(processor, "do_center_crop", False):
        return 0.0, 0.0, 1.0, 1.0
    size, crop = processor.size, processor.crop_size
    if not processor.do_resize:
        width, height = image.size
    elif size.shortest_edge:
        width, height = (side * size.shortest_edge / min(image.size) for side in image.size)
    else:
        width, height = size.width, size.height
    x, y = crop.width / width / 2, crop.height / height / 2
    return 0.5 - x, 0.5 - y, 0.5 + x, 0.5 + y


LLAVA = Family(
    name="LLaVA",
    model_type="llava",
    special="One square of tokens for each image; where the image processor is CLIP's, of the picture's middle.",
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
