"""Qwen2.5-VL: images become a run of tokens in the text stream, one for each 28 x 28 pixels, positions are 3-D (mrope).

What is special: the forward needs ``image_grid_thw`` and ``mm_token_type_ids``. Without the second, transformers falls
back to 1-D positions and says nothing; from it, it finds the images as runs, so two images need a token between them.
The processor class insists on a video processor, which needs torchvision; so the image processor and the tokenizer are
loaded by themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from probe.models.encoding import ImageTokens
from probe.models.family import Family

PLACEHOLDER = "<|image_pad|>"


def load_module(directory: Path, **options: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model and transformers' report on its weights."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True, local_files_only=True, use_safetensors=True, **options
    )
    model, report = loaded
    return model, report


def load_image_processor(directory: Path) -> Any:
    """The image processor on PIL, from ``preprocessor_config.json``."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(directory, local_files_only=True)


def process_images(processor: Any, images: list[Image.Image]) -> tuple[dict[str, Tensor], list[ImageTokens]]:
    """Pixel values and grids of images, and where each of their tokens stands."""
    if not images:
        return {}, []
    out = processor(images=images, return_tensors="pt")
    merge = processor.merge_size
    tokens = []
    for image, (_, rows, columns) in zip(images, out["image_grid_thw"].tolist(), strict=True):
        row, column = np.divmod(np.arange(rows // merge * (columns // merge)), columns // merge)
        tokens.append(
            ImageTokens(
                tile=np.zeros_like(row),
                row=row,
                column=column,
                size=(columns * processor.patch_size, rows * processor.patch_size),
                original=image.size,
            )
        )
    return {"pixel_values": out["pixel_values"], "image_grid_thw": out["image_grid_thw"]}, tokens


def token_inputs(config: Any, ids: Tensor) -> dict[str, Tensor]:
    """Which positions are image tokens."""
    return {"mm_token_type_ids": (ids == config.image_token_id).int()}


QWEN2_5_VL = Family(
    name="Qwen2.5-VL",
    model_type="qwen2_5_vl",
    placeholder=PLACEHOLDER,
    load_module=load_module,
    load_image_processor=load_image_processor,
    process_images=process_images,
    token_inputs=token_inputs,
    adjacent_images=False,
    aliases={
        "qwen-vl": "Qwen/Qwen2.5-VL-7B-Instruct",
        "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
        "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
        "qwen2.5-vl-32b": "Qwen/Qwen2.5-VL-32B-Instruct",
        "qwen2.5-vl-72b": "Qwen/Qwen2.5-VL-72B-Instruct",
    },
)
