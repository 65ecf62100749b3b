"""The contract of a model family: what really differs between families, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from probe.models.encoding import ImageTokens


@dataclass(frozen=True)
class Family:
    """One family of vision-language models.

    Attributes
    ----------
    name
        As people write it.
    model_type
        ``model_type`` in the checkpoint's ``config.json``.
    placeholder
        What the chat template writes for one image.
    load_module
        ``(directory, **options) -> (module, loading report)``.
    load_image_processor
        ``directory -> image processor``, without torchvision.
    process_images
        ``(image processor, images) -> (inputs, tokens of each image)``.
    token_inputs
        ``(config, padded token ids) -> inputs`` that follow from the ids.
    adjacent_images
        Whether two images may follow each other without a token between them.
    aliases
        Short names of its checkpoints: the repository of each, ``owner/name`` or ``owner/name@revision``.
    """

    name: str
    model_type: str
    placeholder: str
    load_module: Callable[..., tuple[torch.nn.Module, dict[str, Any]]]
    load_image_processor: Callable[[Path], Any]
    process_images: Callable[[Any, list[Image.Image]], tuple[dict[str, Tensor], list[ImageTokens]]]
    token_inputs: Callable[[Any, Tensor], dict[str, Tensor]]
    adjacent_images: bool = True
    aliases: Mapping[str, str] = field(default_factory=dict)
