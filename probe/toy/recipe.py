"""Every choice of a training run, in one table that is stored beside the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from probe.toy.architecture import Size


@dataclass(frozen=True)
class Mixture:
    """The shares of what training episodes show; all probabilities."""

    vqa: float = 0.14
    recognition: float = 0.14
    binding_cued: float = 0.20
    binding_uncued: float = 0.34
    operator: float = 0.09
    describe: float = 0.09
    text_only: float = 0.25
    """Of all tasks but describe: the share shown as text-only twins."""
    repeated: float = 0.2
    """Of the items after the first: the share that repeats an earlier item's scene, newly rendered."""
    flipped: float = 0.2
    """Of vqa and recognition: the share with consistently wrong labels, which only the context can tell."""
    narrow: float = 0.2
    """Of vqa and recognition: the share with right labels that asks one question throughout, half of it about two to
    four classes, as flipped episodes do: so that this alone does not tell that labels are flipped."""
    mislabelled: float = 0.1
    """Of vqa and recognition episodes with right labels: the share in which one item's label is wrong."""
    unbound: float = 0.0
    """Of binding: the share in which words belong to nothing, each item's being drawn anew from the episode's."""

    def tasks(self) -> dict[str, float]:
        """The probability of each task."""
        names = ("vqa", "recognition", "binding_cued", "binding_uncued", "operator", "describe")
        return {name.replace("_", "-"): getattr(self, name) for name in names}


@dataclass(frozen=True)
class Guidance:
    """Losses that, for the first part of training, say where some heads should look; an instrument for seeding.

    All work on binding episodes. ``classes``: from the answer cue to the earlier answers of its class. ``labels``: from
    an answer to the earlier answers that are the same word. ``agreement_after``: a linear read-out of the residual
    stream behind this layer, at an answer, tells for each attribute which share of the earlier items of that label
    have the same value. ``attribute_after``: one behind this layer, at the answer cue, names the attribute that the
    episode is about. A head is (layer, head).
    """

    classes: tuple[tuple[int, int], ...] = ((3, 0), (4, 0))
    labels: tuple[tuple[int, int], ...] = ((2, 2),)
    agreement_after: int = 2
    attribute_after: int = 3
    weights: tuple[tuple[float, float], ...] = ((0.0, 0.5), (0.25, 0.2), (0.4, 0.05), (0.6, 0.0))
    """(part of the decoder's training, weight of the losses from there on); ascending, the first part is 0."""

    @property
    def layers(self) -> frozenset[int]:
        """The layers that have to be watched."""
        heads = (*self.classes, *self.labels)
        return frozenset({self.agreement_after, self.attribute_after, *(layer for layer, _ in heads)})

    def weight(self, part: float) -> float:
        """The weight when ``part`` (0 to 1) of the training is done."""
        return [weight for start, weight in self.weights if part >= start][-1]


@dataclass(frozen=True)
class Recipe:
    """A training run of the bundled model or of a sibling."""

    seed: int = 0
    size: Size = Size()
    shards: int = 2
    """Each batch is drawn in this many parts, over which processes are spread: two processes train the very weights
    that one does."""
    vision_steps: int = 5000
    vision_batch: int = 256
    vision_lr: float = 2e-3
    vision_renders: int = 64
    recoloured: float = 0.4
    """Of the pictures in vision training: the share whose channels are mixed, and whose colour is not asked."""
    bank_renders: int = 24
    degraded: float = 0.1
    """Of the pictures in the bank: the share that is blurred and noisy."""
    language_steps: int = 10000
    language_batch: int = 64
    language_lr: float = 1.5e-3
    items: int = 9
    long_items: int = 17
    describe_items: int = 7
    """In batches of ``items``: its answers are long, and so many are no longer than the others."""
    long_from: float = 0.5
    """From this part of the decoder's training on, every second batch has ``long_items`` items, half the episodes."""
    mixture: Mixture = Mixture()
    flipped_from: float = 0.3
    """Flipped labels come from this part of the decoder's training on."""
    end_weight: float = 0.05
    look_back: tuple[tuple[int, int, int], ...] = ((0, 0, 5), (0, 1, 1), (1, 0, 4), (1, 1, 5), (2, 0, 1))
    """(layer, head, distance): biases that start by looking a fixed distance back."""
    look_back_sharpness: float = 5.0
    guidance: Guidance | None = field(default_factory=Guidance)
    compiled: bool = True
    """Whether the decoder runs through ``torch.compile``: faster, and other rounding errors."""


SIBLINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no-guidance": {"guidance": None},
    "no-binding": {"guidance": None, "mixture": Mixture(flipped=0.0, unbound=1.0)},
}
"""Controls: what each changes in a recipe. Without guidance binding is found late and in part. So the control without
binding sees none: its new words belong to nothing, and no known ones are exchanged."""
