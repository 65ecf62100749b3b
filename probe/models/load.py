"""``probe.load``: a model by name, from a directory, or from a module that is already in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch

from probe.errors import ProbeError, UsageError, did_you_mean
from probe.models.fingerprint import of_directory, of_module
from probe.models.model import Model
from probe.models.names import BUNDLED, FAMILIES, Located, locate

CAVEAT = (
    "Drawn on the bundled toy model, part of whose circuits were seeded in training: it shows that the tool works, and "
    "nothing about vision-language models at large."
)
KERNELS = ("sdpa", "eager")


def load(
    name: str | Path | Located | torch.nn.Module,
    *,
    processor: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Model:
    """Load a model.

    Parameters
    ----------
    name
        ``"toy"`` (the bundled model), ``"toy-no-binding"`` (its control, which cannot bind labels), an alias such as
        ``"qwen-vl"``, a repository of the Hugging Face Hub (``owner/name`` or ``owner/name@revision``), a directory
        that holds a checkpoint in Hugging Face layout, or a module in memory.
    processor
        With a module: an object with ``tokenizer`` and ``image_processor`` (and ``chat_template`` if the tokenizer has
        none), such as a Hugging Face processor.
    dtype
        ``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype. Default: float32 on a CPU, else the checkpoint's
        own. A module in memory is left as it is.
    device
        Default: the first CUDA device if there is one, else the CPU. A module in memory stays where it is.

    Returns
    -------
    Model

    Raises
    ------
    UsageError
        If the name is unknown, the family is not supported, or options exclude each other.
    ProbeError
        If the model cannot be fetched, or files are missing or broken. Weights that the checkpoint lacks are never
        replaced by random ones.
    """
    if isinstance(name, torch.nn.Module):
        if dtype is not None or device is not None:
            raise UsageError("A module in memory keeps its dtype and device; convert it before you load it.")
        return _from_module(name, processor)
    if processor is not None:
        raise UsageError("A processor goes with a module in memory; a directory brings its own.")
    return _from_directory(name if isinstance(name, Located) else locate(name), dtype, device)


def _from_directory(located: Located, dtype: str | torch.dtype | None, device: Any) -> Model:
    directory, family = located.directory, located.family
    number, chosen = placement(dtype, device)
    try:
        module, report = family.load_module(directory, dtype=number, attn_implementation="sdpa")
        image_processor = family.load_image_processor(directory)
        tokenizer = _load_tokenizer(directory)
        template = _chat_template(directory, tokenizer)
    except ProbeError:
        raise
    except Exception as error:  # whatever a foreign checkpoint makes transformers raise: the user has to mend it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ProbeError(f"The checkpoint in {directory} cannot be loaded: {reason}") from error
    broken = {kind: sorted(report[kind]) for kind in ("missing_keys", "mismatched_keys") if report.get(kind)}
    if broken:
        kind, keys = next(iter(broken.items()))
        raise ProbeError(
            f"The checkpoint in {directory} has {kind.replace('_', ' ')} ({len(keys)}, such as {keys[0]}); it would be "
            "filled with random weights. Complete the checkpoint."
        )
    fingerprint = of_directory(directory)
    model = Model(
        name=located.name,
        module=module.to(chosen).eval(),
        tokenizer=tokenizer,
        image_processor=image_processor,
        chat_template=template,
        family=family,
        fingerprint=fingerprint,
        origin=located.origin,
        caveat=CAVEAT if fingerprint in {of_directory(path) for path in BUNDLED.values() if path.is_dir()} else "",
    )
    _check(model)
    return model


def _from_module(module: torch.nn.Module, processor: Any) -> Model:
    kind = getattr(getattr(module, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise UsageError(
            f"The module is a {type(module).__name__} of type {kind!r}; known families are "
            f"{', '.join(sorted(FAMILIES))}."
        )
    parts: list[Any] = [getattr(processor, part, None) for part in ("tokenizer", "image_processor")]
    if None in parts:
        raise UsageError("A module in memory needs processor=, an object with a tokenizer and an image_processor.")
    tokenizer, image_processor = parts
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if not template:
        raise UsageError("Neither the processor nor its tokenizer has a chat_template; set one.")
    model = Model(
        name=type(module).__name__,
        module=module.eval(),
        tokenizer=tokenizer,
        image_processor=image_processor,
        chat_template=template,
        family=FAMILIES[kind],
        fingerprint=of_module(module, str(template), image_processor),
    )
    _check(model)
    if model.attention_implementation not in KERNELS:
        raise UsageError(
            f"The module runs {model.attention_implementation} attention; its masks cannot be read. Load it with "
            f"attn_implementation set to one of {', '.join(KERNELS)}."
        )
    return model


def _check(model: Model) -> None:
    """Refuse what would make every episode fail, or numbers mean something else."""
    if model.tokenizer.pad_token_id is None:
        raise ProbeError(f"The tokenizer of {model.name} has no padding token; set `pad_token` in its configuration.")
    if "sliding_attention" in (getattr(model.text_config, "layer_types", None) or ()):
        raise UsageError(
            f"{model.name} has layers with sliding windows, in which different keys are visible in different layers; "
            "they cannot be measured yet. Set use_sliding_window to false if the checkpoint was trained without."
        )


def placement(
    dtype: str | torch.dtype | None, device: str | torch.device | None
) -> tuple[torch.dtype | str, torch.device]:
    """What ``dtype`` and ``device`` of :func:`load` come to here; a dtype of ``auto`` is the checkpoint's."""
    chosen = _device(device)
    return _dtype(dtype, chosen), chosen


def _device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"There is no device {device!r}; write cpu, cuda or cuda:0.") from error
    if chosen.type not in ("cpu", "cuda", "mps") or (chosen.type == "mps" and not torch.backends.mps.is_available()):
        raise UsageError(f"The device {str(device)!r} is not on this machine; use cpu.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"There is no device {device!r}: {torch.cuda.device_count()} CUDA devices are visible; use cpu."
        )
    return chosen


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | str:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise UsageError(f"There is no dtype {dtype!r}; {did_you_mean(dtype, tuple(known))}")
    return known[dtype]


def _load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if not tokenizer.is_fast:
        raise ProbeError(f"The tokenizer in {directory} gives no character offsets; a tokenizer.json is needed.")
    return tokenizer


def _chat_template(directory: Path, tokenizer: Any) -> str:
    """The chat template, wherever this generation of checkpoints keeps it."""
    jinja, old = directory / "chat_template.jinja", directory / "chat_template.json"
    if jinja.exists():
        return jinja.read_text(encoding="utf-8")
    if old.exists():
        return cast(str, json.loads(old.read_text(encoding="utf-8"))["chat_template"])
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    raise ProbeError(
        f"{directory} holds no chat template (chat_template.jinja, chat_template.json, or chat_template in "
        "tokenizer_config.json), so that demonstrations cannot be laid out."
    )
