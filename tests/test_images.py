"""Pictures: what a model is shown is what the file says, or an error says why not."""

from __future__ import annotations

import io
import os
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probe.data.images import open_image, pixel_hash
from probe.errors import ProbeError

WHERE = "episode cats-3, demonstration 1"
ORIENTATION = 274  # the EXIF tag


def quarters() -> Image.Image:
    """A 4 x 2 picture in four colours, so that every flip and turn of it looks different."""
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[0, :2], pixels[0, 2:], pixels[1, :2], pixels[1, 2:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
    return Image.fromarray(pixels)


def pixels_of(picture: Path | Image.Image) -> list[list[list[int]]]:
    return np.asarray(open_image(picture, where=WHERE)).tolist()


def refusal(picture: Path | Image.Image) -> str:
    with pytest.raises(ProbeError) as caught:
        open_image(picture, where=WHERE)
    message = str(caught.value)
    assert WHERE in message
    if isinstance(picture, Path):
        assert str(picture) in message
    return message


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        # As the EXIF standard has it: where the first row and the first column of the stored pixels belong.
        (1, lambda stored: stored),
        (2, lambda stored: stored[:, ::-1]),
        (3, lambda stored: stored[::-1, ::-1]),
        (4, lambda stored: stored[::-1]),
        (5, lambda stored: stored.transpose(1, 0, 2)),
        (6, lambda stored: np.rot90(stored, -1)),
        (7, lambda stored: stored[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda stored: np.rot90(stored, 1)),
    ],
)
def test_the_orientation_is_applied_once(
    tmp_path: Path, orientation: int, turn: Callable[[np.ndarray], np.ndarray], suffix: str
) -> None:
    path = tmp_path / f"picture.{suffix}"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    quarters().save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    upright = open_image(path, where=WHERE)
    expected = turn(np.asarray(quarters())).tolist()
    assert np.asarray(upright).tolist() == expected
    assert pixels_of(upright) == expected
    with Image.open(path) as in_memory:
        in_memory.load()  # Pillow turns a TIFF at this point, and nothing else
        before = np.asarray(in_memory).tolist()
        assert pixels_of(in_memory) == expected
        assert np.asarray(in_memory).tolist() == before  # the caller's image stays as it was
    again = tmp_path / "again.png"
    upright.save(again)
    assert pixels_of(again) == expected


GREY, RED = [100, 100, 100], [200, 0, 0]


def palette() -> Image.Image:
    image = Image.new("P", (2, 1), 1)
    image.putpalette([0, 0, 0, *RED])
    return image


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (Image.new("1", (2, 1), 1), "png", [255, 255, 255]),
        (Image.new("L", (2, 1), 100), "png", GREY),
        (Image.fromarray(np.full((1, 2), 100 * 256 + 77, np.uint16)), "png", GREY),
        (Image.fromarray(np.full((1, 2), 100 * 256 + 77, np.uint16)), "tif", GREY),
        (palette(), "png", RED),
        (palette(), "gif", RED),
        (Image.new("RGB", (2, 1), tuple(RED)), "png", RED),
        (Image.new("CMYK", (2, 1), (0, 255, 255, 55)), "tif", RED),
        (Image.new("RGBA", (2, 1), (*RED, 255)), "png", RED),
        # half or not there at all: on white
        (Image.new("RGBA", (2, 1), (200, 0, 0, 51)), "png", [244, 204, 204]),
        (Image.new("RGBA", (2, 1), (0, 0, 0, 0)), "png", [255, 255, 255]),
        (Image.new("LA", (2, 1), (0, 0)), "png", [255, 255, 255]),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, image: Image.Image, suffix: str, expected: list[int]) -> None:
    path = tmp_path / f"picture.{suffix}"
    image.save(path)
    opened = open_image(path, where=WHERE)
    assert opened.mode == "RGB"
    assert opened.size == (2, 1)
    assert np.asarray(opened).tolist() == [[expected, expected]]
    assert pixels_of(image) == [[expected, expected]]


@pytest.mark.parametrize(
    ("image", "key"),
    [
        (palette(), 1),
        (Image.new("L", (2, 1), 7), 7),
        (Image.new("RGB", (2, 1), (1, 2, 3)), (1, 2, 3)),
        (Image.fromarray(np.full((1, 2), 300, np.uint16)), 300),
    ],
)
def test_a_colour_declared_transparent_is_white(
    tmp_path: Path, image: Image.Image, key: int | tuple[int, int, int]
) -> None:
    path = tmp_path / "picture.png"
    if image.mode == "I;16":  # Pillow reads this chunk and does not write it
        plain = io.BytesIO()
        image.save(plain, "PNG")
        chunk = b"tRNS" + (300).to_bytes(2, "big")
        checked = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        path.write_bytes(plain.getvalue()[:33] + checked + plain.getvalue()[33:])
    else:
        image.save(path, transparency=key)
    assert pixels_of(path) == [[[255] * 3] * 2]


def test_sixteen_bit_pgm_keeps_its_upper_bits(tmp_path: Path) -> None:
    path = tmp_path / "scan.pgm"
    path.write_bytes(b"P5 2 1 65535\n" + np.array([256, 65535], ">u2").tobytes())
    assert pixels_of(path) == [[[1] * 3, [255] * 3]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_known_white_are_refused(tmp_path: Path, dtype: type[np.generic]) -> None:
    image = Image.fromarray(np.full((2, 2), 40, dtype))
    assert "unknown range" in refusal(image)
    image.save(tmp_path / "depth.tif")
    assert "unknown range" in refusal(tmp_path / "depth.tif")


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    path = tmp_path / "moving.gif"
    palette().save(path, save_all=True, append_images=[Image.new("RGB", (2, 1), "blue")])
    assert pixels_of(path) == [[RED, RED]]


def test_a_missing_file(tmp_path: Path) -> None:
    assert "there is no image" in refusal(tmp_path / "nowhere.png")


def test_a_directory(tmp_path: Path) -> None:
    assert "is a directory" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a picture", b'<svg xmlns="http://www.w3.org/2000/svg"/>'])
def test_not_an_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text.png"
    path.write_bytes(content)
    assert "not an image" in refusal(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "gif"])
def test_a_truncated_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"half.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "truncated or damaged" in refusal(path)


def test_damaged_metadata_are_told_too(tmp_path: Path) -> None:
    """Without them nobody knows which way up the picture is."""
    path = tmp_path / "photo.webp"
    quarters().save(path, exif=b"Exif\x00\x00nonsense")
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("times", [1.5, 3])
def test_beyond_the_pixel_limit(tmp_path: Path, times: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns beyond the limit and refuses beyond twice the limit; both are refused here, without a warning."""
    path = tmp_path / "large.png"
    image = Image.new("RGB", (100, 30))
    image.save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(3000 / times))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert f"limit of {int(3000 / times)}" in refusal(path)
        assert "limit" in refusal(image)
    assert not caught
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    assert open_image(path, where=WHERE).size == (100, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(path, where=WHERE).size == (100, 30)


def test_an_image_without_pixels() -> None:
    assert "no pixels" in refusal(Image.new("RGB", (0, 5)))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs a list of open files")
@pytest.mark.parametrize("broken", [False, True])
def test_the_file_is_closed(tmp_path: Path, broken: bool) -> None:
    path = tmp_path / "picture.tif"
    Image.new("RGB", (64, 64)).save(path)
    if broken:
        path.write_bytes(path.read_bytes()[:5000])
        refusal(path)
    else:
        open_image(path, where=WHERE)
    open_files = [os.path.realpath(f"/proc/self/fd/{entry}") for entry in os.listdir("/proc/self/fd")]
    assert os.path.realpath(path) not in open_files


def test_the_image_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    quarters().save(path)
    image = open_image(path, where=WHERE)
    path.unlink()
    assert np.asarray(image).tolist() == np.asarray(quarters()).tolist()


def test_nothing_but_pixels_comes_along(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    quarters().save(path, dpi=(300, 300), comment=b"of a cat", icc_profile=b"profile")
    assert open_image(path, where=WHERE).info == {}
    with Image.open(path) as in_memory:
        assert open_image(in_memory, where=WHERE).info == {}
        assert in_memory.info.keys() > {"dpi", "comment", "icc_profile"}


def test_the_hash_tells_pixels_and_shape() -> None:
    image = quarters()
    changed = quarters()
    changed.putpixel((3, 1), (255, 255, 1))
    hashes = {
        pixel_hash(image),
        pixel_hash(changed),
        pixel_hash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        pixel_hash(Image.frombytes("RGB", (2, 4), image.tobytes())),
        pixel_hash(Image.frombytes("RGB", (8, 1), image.tobytes())),
    }
    assert len(hashes) == 5
    assert all(len(text) == 16 and set(text) <= set("0123456789abcdef") for text in hashes)


def test_the_hash_is_of_pixels_not_of_files(tmp_path: Path) -> None:
    quarters().save(tmp_path / "a.png")
    quarters().save(tmp_path / "a.bmp")
    assert len({pixel_hash(open_image(tmp_path / name, where=WHERE)) for name in ("a.png", "a.bmp")}) == 1


def test_the_hash_does_not_change_between_versions() -> None:
    """Manifests hold it: whoever changes it makes every one of them invalid."""
    assert pixel_hash(quarters()) == "7f213c11c09d57a9"  # sha256 of "4x2:" and the bytes


def test_only_rgb_is_hashed() -> None:
    with pytest.raises(ValueError, match="mode L"):
        pixel_hash(Image.new("L", (2, 2)))
