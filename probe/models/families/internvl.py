"""InternVL (the checkpoints in transformers' own layout): crops of an image, then a thumbnail of the whole.

What is special: how many crops an image gets depends on its shape; crops and thumbnail follow one another without a
marker between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from probe.models.encoding import ImageTokens, grid_places, join_places, tiled_places
from probe.models.family import Family, Images

if TYPE_CHECKING:
    from probe.models.model import Model


def process_images(model: Model, images: list[Image.Image]) -> Images:
    """Pixel values ``[tile, …]``, and the tokens of each image."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    processor, tokenizer = model.image_processor, model.tokenizer
    # Whatever its file says: transformers' processor of this family crops unless it is told not to.
    out = processor(images=images, return_tensors="pt", crop_to_patches=True)
    edge = processor.size.height, processor.size.width
    side = round(model.config.image_seq_length**0.5)
    spelled = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    tokens = []
    for image in images:
        shape = (image.height, image.width)
        columns, rows = get_optimal_tiled_canvas(shape, edge, processor.min_patches, processor.max_patches)
        places = grid_places(side, side)
        if rows * columns > 1:
            places = join_places(tiled_places(rows, columns, side, side), places)
        text = f"<img>{spelled * len(places[0])}</img>"
        tokens.append(ImageTokens(*places, (columns * edge[1], rows * edge[0]), image.size, text))
    return {"pixel_values": out["pixel_values"]}, tokens


INTERNVL = Family(
    name="InternVL",
    model_type="internvl",
    special="Crops by the shape of the image, then a thumbnail.",
    module_class="InternVLForConditionalGeneration",
    image_processor_class="got_ocr2.image_processing_pil_got_ocr2.GotOcr2ImageProcessorPil",
    placeholder="<IMG_CONTEXT>",
    process_images=process_images,
    aliases={
        "internvl": "OpenGVLab/InternVL3-8B-hf",
        "internvl-2b": "OpenGVLab/InternVL3-2B-hf",
        "internvl-1b": "OpenGVLab/InternVL3-1B-hf",
    },
)
