"""Open pictures: one way in, so that a model, a manifest and a figure all see the same pixels."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from probe.data.example import Episode, Example, Picture
from probe.errors import ProbeError


def open_image(picture: Picture, *, where: str) -> Image.Image:
    """Open a picture as upright RGB pixels.

    The picture is turned as its EXIF orientation says. Transparency is laid on white. Of 16 bits a channel the upper 8
    are kept. Of an animation the first frame is read. Colour profiles are not applied.

    Parameters
    ----------
    picture
        A file, or an image in memory, which is left unturned and unconverted itself.
    where
        Who asked, for the message of an error: ``episode recognition-0-3, demonstration 1``.

    Returns
    -------
    PIL.Image.Image
        RGB, fully loaded, with no file behind it and no metadata (so that nothing can turn it a second time).

    Raises
    ------
    ProbeError
        If the file is missing, a directory, no image, truncated (unless ``ImageFile.LOAD_TRUNCATED_IMAGES`` was set),
        of a number format whose range is unknown, or larger than ``PIL.Image.MAX_IMAGE_PIXELS``, beyond which Pillow
        itself would only warn.
    """
    if isinstance(picture, Image.Image):
        return _upright_rgb(picture, where, "the image in memory")
    name = os.fspath(picture)
    try:
        with warnings.catch_warnings():
            # The size is checked below, where it is an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(picture)
    except FileNotFoundError:
        raise ProbeError(f"In {where}: there is no image {name}; correct the path or put the file there.") from None
    except IsADirectoryError:
        raise ProbeError(f"In {where}: {name} is a directory; give the path of one image.") from None
    except PermissionError:
        raise ProbeError(f"In {where}: {name} may not be read; change its permissions.") from None
    except Image.DecompressionBombError:
        raise ProbeError(_too_large(where, name)) from None
    except UnidentifiedImageError:
        raise ProbeError(
            f"In {where}: {name} is not an image that Pillow can read; convert it to PNG or JPEG, or take it out."
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise anything on damaged bytes, from SyntaxError to RuntimeError
        raise ProbeError(_damaged(where, name, error)) from error
    with opened:
        return _upright_rgb(opened, where, name)


def image_identity(picture: Picture, *, where: str) -> str:
    """The same string for the same image: the same file, links followed, or in memory the same pixels.

    Copies of a file under two names are two images here; only their pixels could tell.
    """
    if isinstance(picture, Image.Image):
        return f"pixels {pixel_hash(open_image(picture, where=where))}"
    return _file_identity(picture)


@cache  # following links asks the disk, and many examples show one of a hundred thousand files
def _file_identity(path: Path) -> str:
    return f"file {path.resolve()}"


def pixel_hash(image: Image.Image) -> str:
    """Fingerprint of what :func:`open_image` returned.

    Returns
    -------
    str
        The first 16 hexadecimal digits of the SHA-256 over width, height and the RGB bytes. Two files with the same
        pixels have the same hash, whatever their format; a JPEG that another decoder rounds differently has not.

    Raises
    ------
    ValueError
        If the image is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"pixel_hash takes what open_image returns, an RGB image; got mode {image.mode}.")
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()[:16]


def _upright_rgb(image: Image.Image, where: str, name: str) -> Image.Image:
    """Check the size, decode, turn, and convert."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ProbeError(_too_large(where, name))
    if not image.width or not image.height:
        raise ProbeError(f"In {where}: {name} has no pixels ({image.width} x {image.height}); take it out.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            upright = ImageOps.exif_transpose(image)
        flat = _on_white(_eight_bits(upright, image.format, where, name)).convert("RGB")
    except (ProbeError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise ProbeError(_too_large(where, name)) from None
    except Exception as error:
        raise ProbeError(_damaged(where, name, error)) from error
    flat.info = {}
    return flat


def _eight_bits(image: Image.Image, file_format: str | None, where: str, name: str) -> Image.Image:
    """Bring deep greyscale down to 8 bits by hand: Pillow's own conversion clips everything above 255 to white."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    # Pillow reads 16-bit PGM, and in old versions 16-bit PNG, as mode I; any other I or F does not say what white is.
    if image.mode == "F" or (image.mode == "I" and file_format not in ("PNG", "PPM")):
        raise ProbeError(
            f"In {where}: {name} holds numbers of unknown range (Pillow mode {image.mode}); save it with 8 or 16 bits "
            "a channel."
        )
    import numpy as np

    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    see_through = image.info.get("transparency")
    if isinstance(see_through, int):
        grey.putalpha(Image.fromarray(np.where(values == see_through, 0, 255).astype(np.uint8)))
    return grey


def _on_white(image: Image.Image) -> Image.Image:
    """Lay a picture with transparency on a white ground."""
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    ground = Image.new("RGBA", layer.size, "white")
    ground.alpha_composite(layer)
    return ground


def _too_large(where: str, name: str) -> str:
    return (
        f"In {where}: {name} has more pixels than the safe limit of {Image.MAX_IMAGE_PIXELS}; scale it down, or raise "
        "PIL.Image.MAX_IMAGE_PIXELS if you trust the file."
    )


def _damaged(where: str, name: str, error: Exception) -> str:
    return f"In {where}: {name} cannot be decoded, it is truncated or damaged ({error}); replace the file."


def image_places(episode: Episode, example: Example, index: int) -> Iterator[tuple[Picture, str]]:
    """Each image of the example at ``index`` (the query comes last), with the words that say where it is."""
    role = "query" if index == episode.shots else f"demonstration {index}"
    for number, image in enumerate(example.images, start=1):
        which = f", image {number}" if len(example.images) > 1 else ""
        yield image, f"episode {episode.id}, {role}{which}"


def open_images(episode: Episode) -> list[Image.Image]:
    """Open all images of an episode, each once, in reading order (demonstrations, then the query)."""
    return [
        open_image(picture, where=where)
        for index, example in enumerate(episode.examples)
        for picture, where in image_places(episode, example, index)
    ]
