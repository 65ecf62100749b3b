"""What identifies a model: so that a finished run is reused only if it was made with the same weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WHOLE = 64 * 2**20
SAMPLE = 2**20
SUFFIXES = (".json", ".jinja", ".safetensors", ".txt", ".model")


def of_directory(directory: Path) -> str:
    """Hash a checkpoint's files: 16 hexadecimal digits.

    Files up to 64 MiB count whole. Of larger ones count size, time of change, and the first and last MiB: reading tens
    of gigabytes would take longer than many an analysis.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.iterdir() if p.suffix in SUFFIXES and p.is_file()):
        info = path.stat()
        digest.update(f"{path.name}\0{info.st_size}\0".encode())
        with path.open("rb") as file:
            if info.st_size <= WHOLE:
                digest.update(file.read())
            else:
                digest.update(f"{info.st_mtime_ns}\0".encode() + file.read(SAMPLE))
                file.seek(-SAMPLE, 2)
                digest.update(file.read())
    return digest.hexdigest()[:16]


def of_module(module: torch.nn.Module, chat_template: str, image_processor: Any) -> str:
    """Hash a module in memory, its configuration, chat template and image processor: 16 hexadecimal digits."""
    import torch

    digest = hashlib.sha256(chat_template.encode())
    for part in (getattr(module, "config", None), image_processor):
        to_json = getattr(part, "to_json_string", None)
        digest.update(to_json().encode() if to_json else b"")
    for name, value in module.state_dict().items():
        digest.update(f"{name}\0{tuple(value.shape)}\0{value.dtype}\0".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
