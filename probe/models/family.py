"""The contract of a model family: what really differs between families, and nothing else.

A family is a table entry, one for each kind of checkpoint, in a small file of :mod:`probe.models.families`. Everything
else is generic: loading (:mod:`probe.models.load`), prompts and token maps (:mod:`probe.models.prompt`,
:mod:`probe.models.encoding`), the attention modules (:mod:`probe.models.sites`) and the measures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from probe.models.encoding import Batch, ImageTokens
    from probe.models.model import Model

Images = tuple[dict[str, "Tensor"], list["ImageTokens"]]


def no_inputs(model: Model, batch: Batch) -> dict[str, Tensor]:
    """For families whose inputs are ids, mask and images."""
    return {}


def running_positions(model: Model, batch: Batch) -> Tensor:
    """For families that count the positions of the text; padding is not counted."""
    mask: Tensor = batch.inputs["attention_mask"]
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def as_written(text: str, before: str, after: str) -> str:
    """For families that write an image alike wherever it stands."""
    return text


def config_image_token(config: Any) -> int:
    """The id of the tokens that stand for an image's features, where the configuration says it."""
    return int(config.image_token_id)


@dataclass(frozen=True)
class Family:
    """One family of vision-language models.

    Attributes
    ----------
    name
        As people write it.
    model_type
        ``model_type`` in the checkpoint's ``config.json``.
    special
        What is special about it, in a sentence for the list of families.
    module_class
        The model's class in ``transformers``.
    image_processor_class
        Module and class of its image processor on PIL, below ``transformers.models``, for checkpoints that name none:
        no torchvision, and the same pixel values whether torchvision is installed or not.
    placeholder
        What a prompt says for one image before it is expanded.
    in_format
        What a prompt format (:mod:`probe.models.formats`) says for it, if that is more: markers that a chat template
        would write.
    process_images
        ``(model, the episode's images) -> (inputs, tokens of each image)``.
    image_token
        ``config -> id`` of the tokens whose embeddings are replaced by an image's features; ``None`` in families whose
        text reads images through cross-attention.
    finish
        ``(model, padded batch) -> inputs`` that follow from the padded token ids.
    positions
        ``(model, padded batch) -> position_ids`` of the rotary embedding, ``[batch, length]`` or ``[3, batch,
        length]``.
    beside
        ``(text of an image, before, after) -> text``: what becomes of it beside its neighbours in the prompt, where
        ``before`` and ``after`` are the prompt around its placeholder.
    by_episode
        Whether the first dimension of the image inputs is the episode, not the image or patch.
    like_images
        Whether all episodes of a batch must have equally many images, because the model reads padding images too.
    adjacent_images
        Whether two images may follow each other without a token between them.
    gate
        In families with cross-attention: ``block -> factor`` on what its attention writes.
    norm
        ``block -> (weight, epsilon)`` of the root-mean-square norm that the output of self-attention passes before it
        is added to the residual stream, in families that have one.
    prompt
        Name of the prompt format (:mod:`probe.models.formats`) for checkpoints without a chat template.
    aliases
        Short names of its checkpoints: the repository of each, ``owner/name`` or ``owner/name@revision``.
    """

    name: str
    model_type: str
    special: str
    module_class: str
    image_processor_class: str
    placeholder: str
    process_images: Callable[[Model, list[Image.Image]], Images]
    image_token: Callable[[Any], int] | None = config_image_token
    finish: Callable[[Model, Batch], dict[str, Tensor]] = no_inputs
    positions: Callable[[Model, Batch], Tensor] = running_positions
    beside: Callable[[str, str, str], str] = as_written
    by_episode: bool = False
    like_images: bool = False
    adjacent_images: bool = True
    in_format: str = ""
    gate: Callable[[torch.nn.Module], Tensor] | None = None
    norm: Callable[[torch.nn.Module], tuple[Tensor, float]] | None = None
    prompt: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
