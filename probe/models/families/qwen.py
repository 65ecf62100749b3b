"""Qwen's vision-language models: an image becomes a run of tokens, one for each 28 x 28 pixels, with 3-D positions.

What is special: the forward needs ``image_grid_thw`` and ``mm_token_type_ids``. Without the second, transformers falls
back to 1-D positions and says nothing; from it, it finds the images as runs, so two images need a token between them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from PIL import Image
from torch import Tensor

from probe.models.encoding import Batch, ImageTokens, grid_places
from probe.models.family import Family, Images, running_positions

if TYPE_CHECKING:
    from probe.models.model import Model


def process_images(model: Model, images: list[Image.Image]) -> Images:
    """Pixel values and grids of images, and where each of their tokens stands."""
    processor = model.image_processor
    out = processor(images=images, return_tensors="pt")
    merge, side = processor.merge_size, processor.patch_size
    tokens = [
        ImageTokens(*grid_places(rows // merge, columns // merge), (columns * side, rows * side), image.size)
        for image, (_, rows, columns) in zip(images, out["image_grid_thw"].tolist(), strict=True)
    ]
    return {"pixel_values": out["pixel_values"], "image_grid_thw": out["image_grid_thw"]}, tokens


def finish(model: Model, batch: Batch) -> dict[str, Tensor]:
    """Which positions are image tokens."""
    return {"mm_token_type_ids": (batch.inputs["input_ids"] == model.config.image_token_id).int()}


def positions(model: Model, batch: Batch) -> Tensor:
    """Time, row and column of every position; without images they are all the running count."""
    given = batch.inputs
    if "image_grid_thw" not in given:
        return running_positions(model, batch)
    inner = cast(Any, model.module).model
    names = ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")
    return cast(Tensor, inner.get_rope_index(**{name: given[name] for name in names})[0])


ALIASES_2_5 = {"qwen-vl": "Qwen/Qwen2.5-VL-7B-Instruct"} | {
    f"qwen2.5-vl-{size}b": f"Qwen/Qwen2.5-VL-{size}B-Instruct" for size in (3, 7, 32, 72)
}
QWEN2_5_VL = Family(
    name="Qwen2.5-VL",
    model_type="qwen2_5_vl",
    special="Images of any size become runs of tokens with three-dimensional positions.",
    module_class="Qwen2_5_VLForConditionalGeneration",
    image_processor_class="qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil",
    placeholder="<|image_pad|>",
    in_format="<|vision_start|><|image_pad|><|vision_end|>",
    process_images=process_images,
    finish=finish,
    positions=positions,
    adjacent_images=False,
    aliases=ALIASES_2_5,
)
QWEN2_VL = replace(
    QWEN2_5_VL,
    name="Qwen2-VL",
    model_type="qwen2_vl",
    module_class="Qwen2VLForConditionalGeneration",
    aliases={"qwen2-vl": "Qwen/Qwen2-VL-7B-Instruct", "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct"},
)
QWEN3_VL = replace(
    QWEN2_5_VL,
    name="Qwen3-VL",
    model_type="qwen3_vl",
    special=f"{QWEN2_5_VL.special} Features of the image are also added to the residual stream behind early layers.",
    module_class="Qwen3VLForConditionalGeneration",
    aliases={"qwen3-vl": "Qwen/Qwen3-VL-8B-Instruct", "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct"},
)
