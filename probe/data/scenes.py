"""The synthetic world: scenes of coloured shapes and handwritten digits, and their renderer.

A :class:`Scene` is four attributes (colour, kind, count, size). :func:`render` draws it as an 84 x 56 picture:
``count`` copies of one kind of object, in one colour, each in its own cell of a grid of 3 columns by 2 rows. A cell is
as large as one image token of the bundled model, so that which token shows an object is known, and the grid is not
square, so that mixing up rows and columns shows.

Kinds are eight shapes and the ten digits, drawn from real scans (scikit-learn's ``load_digits``), whose scans are
split: training pictures and test pictures never share one. ``HELD_OUT_PAIRS`` are (colour, kind) pairs that no training
picture shows.
"""

from __future__ import annotations

import functools
import math
from dataclasses import astuple, dataclass, fields
from typing import Literal, cast

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COLOURS = {
    "red": (214, 39, 40),
    "green": (40, 160, 60),
    "blue": (45, 95, 215),
    "yellow": (240, 205, 40),
    "orange": (245, 130, 25),
    "purple": (140, 60, 180),
    "pink": (245, 130, 190),
    "cyan": (50, 200, 215),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "diamond", "ring")
DIGITS = tuple(f"#{digit}" for digit in range(10))
KINDS = SHAPES + DIGITS
COUNTS = (1, 2, 3, 4)
SIZES = ("small", "big")

VALUES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "kind": KINDS,
    "count": tuple(str(count) for count in COUNTS),
    "size": SIZES,
}
"""The values of each attribute, in the order of the index that a :class:`Scene` stores."""

CELL = 28
COLUMNS, ROWS = 3, 2
WIDTH, HEIGHT = COLUMNS * CELL, ROWS * CELL

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Scene:
    """What a picture shows, as indices into :data:`VALUES`."""

    colour: int
    kind: int
    count: int
    size: int

    def value(self, attribute: str) -> str:
        """The name of this scene's value of ``attribute`` (a key of :data:`VALUES`)."""
        index: int = getattr(self, attribute)
        return VALUES[attribute][index]


ATTRIBUTES = tuple(field.name for field in fields(Scene))


def _held_out_pairs() -> frozenset[tuple[int, int]]:
    """Three kinds in every two colours, 27 pairs of 144, spread so that each colour and each kind stays common."""
    rng = np.random.default_rng(20_26)
    kinds = np.resize(rng.permutation(len(KINDS)), 27)
    return frozenset((index % len(COLOURS), int(kind)) for index, kind in enumerate(kinds))


HELD_OUT_PAIRS = _held_out_pairs()


def every_scene() -> list[Scene]:
    """All combinations of the four attributes, in a fixed order."""
    return [
        Scene(colour, kind, count, size)
        for colour in range(len(COLOURS))
        for kind in range(len(KINDS))
        for count in range(len(COUNTS))
        for size in range(len(SIZES))
    ]


def held_out(scene: Scene) -> bool:
    """Whether the scene's colour and kind never occur together in training."""
    return (scene.colour, scene.kind) in HELD_OUT_PAIRS


def render(scene: Scene, seed: int, *, split: Split = "test", degrade: float = 0.0) -> Image.Image:
    """Draw a scene.

    Parameters
    ----------
    scene
        What to draw.
    seed
        Decides everything that the scene leaves open: cells, jitter, rotation, shade, background, noise, digit scan.
        Together with ``split`` it never gives the same picture in training and test.
    split
        Which half of the digit scans to draw from.
    degrade
        0 draws a clean picture; 1 blurs it and adds noise until little but the colour can be seen.

    Returns
    -------
    PIL.Image.Image
        RGB, 84 x 56 pixels.
    """
    rng = np.random.default_rng((seed, 0 if split == "train" else 1, *astuple(scene)))
    canvas = Image.fromarray(_background(rng))
    colour = np.array(list(COLOURS.values())[scene.colour]) + rng.normal(0, 8, 3)
    shade = tuple(int(value) for value in np.clip(colour, 0, 255))
    for cell in rng.choice(COLUMNS * ROWS, size=COUNTS[scene.count], replace=False):
        diameter = (12.5, 23.0)[scene.size] * rng.uniform(0.93, 1.07)
        slack = (CELL - diameter) / 2
        x = (cell % COLUMNS + 0.5) * CELL + rng.uniform(-slack, slack)
        y = (cell // COLUMNS + 0.5) * CELL + rng.uniform(-slack, slack)
        stencil = _stencil(KINDS[scene.kind], diameter, rng, split)
        corner = (round(x - stencil.width / 2), round(y - stencil.height / 2))
        canvas.paste(shade, (*corner, corner[0] + stencil.width, corner[1] + stencil.height), stencil)
    pixels = np.asarray(canvas, dtype=np.float32)
    if degrade:
        pixels = np.asarray(canvas.filter(ImageFilter.GaussianBlur(3.5 * degrade)), dtype=np.float32)
    noise = rng.normal(0, 4 + 40 * degrade, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def _background(rng: np.random.Generator) -> np.ndarray:
    """A grey gradient in a random direction, light or dark, so that no colour can be read off the background."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    angle = rng.uniform(0, 2 * math.pi)
    slope = rng.uniform(0, 25) * (x / WIDTH * math.cos(angle) + y / HEIGHT * math.sin(angle))
    level = rng.uniform(15, 70) if rng.random() < 0.5 else rng.uniform(175, 235)
    tint = rng.normal(0, 4, 3)
    return cast(np.ndarray, np.clip(level + slope[..., None] + tint, 0, 255).astype(np.uint8))


def _stencil(kind: str, diameter: float, rng: np.random.Generator, split: Split) -> Image.Image:
    """The mask of one object: an 8-bit picture, 255 where the object is."""
    scale = 4  # drawn four times too large and shrunk, for smooth edges
    size = max(4, round(diameter))
    if kind in DIGITS:
        scans = _digit_scans(split)[DIGITS.index(kind)]
        scan = Image.fromarray(scans[rng.integers(len(scans))])
        turned = scan.resize((size * scale, size * scale), Image.Resampling.BICUBIC).rotate(
            rng.uniform(-12, 12), Image.Resampling.BILINEAR
        )
        return turned.resize((size, size), Image.Resampling.BOX)
    mask = Image.new("L", (size * scale, size * scale), 0)
    _draw_shape(ImageDraw.Draw(mask), kind, size * scale)
    # A heart, a star and a triangle stay upright enough to be told from their neighbours.
    turned = mask.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
    return turned.resize((size, size), Image.Resampling.BOX)


def _draw_shape(draw: ImageDraw.ImageDraw, kind: str, size: int) -> None:
    """Fill one shape into a square of ``size`` pixels."""

    def points(*pairs: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x * size, y * size) for x, y in pairs]

    if kind == "circle":
        draw.ellipse(points((0.03, 0.03), (0.97, 0.97)), fill=255)
    elif kind == "ring":
        draw.ellipse(points((0.03, 0.03), (0.97, 0.97)), fill=255)
        draw.ellipse(points((0.3, 0.3), (0.7, 0.7)), fill=0)
    elif kind == "square":
        draw.rectangle(points((0.1, 0.1), (0.9, 0.9)), fill=255)
    elif kind == "triangle":
        draw.polygon(points((0.5, 0.04), (0.97, 0.92), (0.03, 0.92)), fill=255)
    elif kind == "diamond":
        draw.polygon(points((0.5, 0.0), (0.84, 0.5), (0.5, 1.0), (0.16, 0.5)), fill=255)
    elif kind == "cross":
        draw.rectangle(points((0.36, 0.04), (0.64, 0.96)), fill=255)
        draw.rectangle(points((0.04, 0.36), (0.96, 0.64)), fill=255)
    elif kind == "heart":
        draw.ellipse(points((0.03, 0.06), (0.53, 0.56)), fill=255)
        draw.ellipse(points((0.47, 0.06), (0.97, 0.56)), fill=255)
        draw.polygon(points((0.06, 0.42), (0.94, 0.42), (0.5, 0.98)), fill=255)
    elif kind == "star":
        corners = []
        for corner in range(10):
            radius = 0.5 if corner % 2 == 0 else 0.2
            angle = math.pi * (corner / 5 - 0.5)
            corners.append((0.5 + radius * math.cos(angle), 0.52 + radius * math.sin(angle)))
        draw.polygon(points(*corners), fill=255)


@functools.cache
def _digit_scans(split: Split) -> list[np.ndarray]:
    """The scans of each digit, ``[n, 8, 8]`` uint8; every fifth scan belongs to the test split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    is_test = np.arange(len(data.target)) % 5 == 0
    chosen = is_test if split == "test" else ~is_test
    # The strokes are faint at 8 x 8 pixels: doubled, so that they stay visible when shrunk.
    images = np.clip(data.images * (255 / 16) * 1.6, 0, 255).astype(np.uint8)
    return [images[chosen & (data.target == digit)] for digit in range(10)]
