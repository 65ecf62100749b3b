"""Idefics3 and SmolVLM: crops of an image, each behind a marker that names its row and column, then the whole image.

What is special: the crops' tokens do not follow the rows of the image but go crop by crop; the markers and line breaks
between them belong to the turn, not to the image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from PIL import Image

from probe.models.encoding import ImageTokens, grid_places, join_places, tiled_places
from probe.models.family import Family, Images

if TYPE_CHECKING:
    from probe.models.model import Model

MARKER, WHOLE, IMAGE = "<fake_token_around_image>", "<global-img>", "<image>"


def process_images(model: Model, images: list[Image.Image]) -> Images:
    """Pixel values and their mask, ``[1, tile, …]``, and the tokens of each image."""
    out = model.image_processor([images], return_tensors="pt", return_row_col_info=True)
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size // model.config.scale_factor
    run, edge = IMAGE * side**2, vision.image_size
    tokens = []
    for image, rows, columns in zip(images, out["rows"][0], out["cols"][0], strict=True):
        places, text = grid_places(side, side), f"{MARKER}{WHOLE}{run}{MARKER}"
        if rows:
            places = join_places(tiled_places(rows, columns, side, side), places)
            lines = [
                "".join(f"{MARKER}<row_{i}_col_{j}>{run}" for j in range(1, columns + 1)) for i in range(1, rows + 1)
            ]
            text = "\n".join([*lines, "", text])
        size = (max(columns, 1) * edge, max(rows, 1) * edge)
        tokens.append(ImageTokens(*places, size, image.size, text))
    return {"pixel_values": out["pixel_values"], "pixel_attention_mask": out["pixel_attention_mask"]}, tokens


IDEFICS3 = Family(
    name="Idefics3",
    model_type="idefics3",
    special="Crops with markers of their row and column, then the whole image.",
    module_class="Idefics3ForConditionalGeneration",
    image_processor_class="idefics3.image_processing_pil_idefics3.Idefics3ImageProcessorPil",
    placeholder=IMAGE,
    process_images=process_images,
    by_episode=True,
    aliases={"idefics3": "HuggingFaceM4/Idefics3-8B-Llama3"},
)
SMOLVLM = replace(
    IDEFICS3,
    name="SmolVLM",
    model_type="smolvlm",
    module_class="SmolVLMForConditionalGeneration",
    image_processor_class="smolvlm.image_processing_pil_smolvlm.SmolVLMImageProcessorPil",
    aliases={
        "smolvlm": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        "smolvlm-500m": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "smolvlm-256m": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    },
)
