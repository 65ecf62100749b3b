"""``probe.load``: a model by name, from a directory, or from a module that is already in memory."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from probe.errors import ProbeError, UsageError, did_you_mean
from probe.models.families import FAMILIES
from probe.models.family import Family
from probe.models.fingerprint import of_directory, of_module
from probe.models.formats import FORMATS, template_of
from probe.models.model import Model
from probe.models.names import BUNDLED, Located, locate

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
    prompt: str | None = None,
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
    prompt
        How demonstrations are laid out: one of :data:`probe.models.formats.FORMATS`, or a file with a chat template.
        Default: the checkpoint's chat template; where it has none, its family's format for base models.

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
    prompt_text(prompt)  # what cannot be meant is refused before gigabytes are read
    if isinstance(name, torch.nn.Module):
        if dtype is not None or device is not None:
            raise UsageError("A module in memory keeps its dtype and device; convert it before you load it.")
        return _from_module(name, processor, prompt)
    if processor is not None:
        raise UsageError("A processor goes with a module in memory; a directory brings its own.")
    return _from_directory(name if isinstance(name, Located) else locate(name), dtype, device, prompt)


def _from_directory(
    located: Located, dtype: str | torch.dtype | None, device: str | torch.device | None, prompt: str | None
) -> Model:
    directory, family = located.directory, located.family
    number, chosen = placement(dtype, device)
    try:
        module, report = _load_module(directory, family, number)
        image_processor = _load_image_processor(directory, family)
        tokenizer = load_tokenizer(directory)
        template = read_chat_template(directory, tokenizer)
    except ProbeError:
        raise
    except Exception as error:  # whatever a foreign checkpoint makes transformers raise: the user has to mend it
        raise ProbeError(f"The checkpoint in {directory} cannot be loaded: {reason_of(error)}") from error
    broken = {kind: sorted(report[kind]) for kind in ("missing_keys", "mismatched_keys") if report.get(kind)}
    if broken:
        kind, keys = next(iter(broken.items()))
        raise ProbeError(
            f"The checkpoint in {directory} has {kind.replace('_', ' ')} ({len(keys)}, such as {keys[0]}); it would be "
            "filled with random weights. Complete the checkpoint."
        )
    template, how = choose_template(template, family, prompt, str(directory))
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
        prompt=how,
        caveat=CAVEAT if fingerprint in {of_directory(path) for path in BUNDLED.values() if path.is_dir()} else "",
    )
    _check(model)
    return model


def _from_module(module: torch.nn.Module, processor: Any, prompt: str | None) -> Model:
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
    own = _default_template(
        getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None), "the processor"
    )
    template, how = choose_template(own, FAMILIES[kind], prompt, "the processor")
    model = Model(
        name=type(module).__name__,
        module=module.eval(),
        tokenizer=tokenizer,
        image_processor=image_processor,
        chat_template=template,
        family=FAMILIES[kind],
        fingerprint=of_module(module, str(template), image_processor),
        prompt=how,
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
    _refuse_softcapping(model.config, model.name)
    if model.tokenizer.pad_token_id is None:
        raise ProbeError(f"The tokenizer of {model.name} has no padding token; set `pad_token` in its configuration.")


def _refuse_softcapping(config: Any, name: str) -> None:
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        raise UsageError(
            f"{name} squashes its attention scores (attn_logit_softcapping), as Gemma 2 and PaliGemma 2 do; its "
            "attention cannot be recorded."
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


def load_tokenizer(directory: Path) -> Any:
    """The checkpoint's tokenizer, which has to give character offsets."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if not tokenizer.is_fast:
        raise ProbeError(f"The tokenizer in {directory} gives no character offsets; a tokenizer.json is needed.")
    return tokenizer


def read_chat_template(directory: Path, tokenizer: Any) -> str | None:
    """The chat template, wherever this generation of checkpoints keeps it; ``None`` if there is none."""
    jinja = directory / "chat_template.jinja"
    if jinja.exists():
        return jinja.read_text(encoding="utf-8")
    for file in ("chat_template.json", "processor_config.json"):
        if (directory / file).exists():
            said = json.loads((directory / file).read_text(encoding="utf-8")).get("chat_template")
            if said:
                return _default_template(said, f"{file} in {directory}")
    return _default_template(tokenizer.chat_template, f"the tokenizer in {directory}")


def _default_template(said: Any, where: str) -> str | None:
    """One chat template, or of several by name the default one."""
    if isinstance(said, list):
        said = {entry["name"]: entry["template"] for entry in said}
    if isinstance(said, dict):
        if "default" not in said:
            raise ProbeError(
                f"{where} has chat templates {', '.join(said)} and none called default; give one of them as a file: "
                "--prompt."
            )
        said = said["default"]
    if said is None or isinstance(said, str):
        return said or None
    raise ProbeError(f"The chat template of {where} is no text.")


def choose_template(own: str | None, family: Family, prompt: str | None, where: str) -> tuple[str, str]:
    """The template that lays out demonstrations, and its name for results.

    Parameters
    ----------
    own
        The checkpoint's chat template, if it has one.
    family
        Whose format for base models is taken if there is no other.
    prompt
        What the user asked for: a format's name or a file.
    where
        Where a chat template was looked for.
    """
    if prompt in FORMATS:
        return template_of(prompt, family.in_format or family.placeholder), prompt
    if prompt is not None:
        return prompt_text(prompt), Path(prompt).name
    if own:
        return own, "chat template"
    if family.prompt:
        return template_of(family.prompt, family.in_format or family.placeholder), family.prompt
    raise ProbeError(
        f"{where} holds no chat template (chat_template.jinja, or chat_template in chat_template.json, "
        "processor_config.json or tokenizer_config.json). Choose a prompt format "
        f"({', '.join(FORMATS)}) or give a template of your own (--prompt)."
    )


def reason_of(error: Exception) -> str:
    """What a foreign error says, on one line."""
    said = " ".join(str(error).split())
    return f"{said[:300]}{' …' if len(said) > 300 else ''}" if said else type(error).__name__


def prompt_text(prompt: str | None) -> str:
    """What the user asks for by ``prompt``, in full; empty if nothing.

    Raises
    ------
    UsageError
        If it is neither a format nor a file of text.
    """
    if prompt is None or prompt in FORMATS:
        return FORMATS.get(prompt or "", "")
    path = Path(prompt).expanduser()
    if not path.is_file():
        known = did_you_mean(prompt, tuple(FORMATS))
        raise UsageError(f"There is no prompt format and no file {prompt!r}; {known}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The prompt template {prompt} cannot be read: {error}.") from error


def _load_image_processor(directory: Path, family: Family) -> Any:
    """The checkpoint's own image processor, on PIL."""
    module, _, name = family.image_processor_class.rpartition(".")
    default = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    asked = _image_processor_type(directory)
    kind = default if asked is None else getattr(importlib.import_module("transformers"), f"{asked}Pil", None)
    if kind is None:
        raise ProbeError(f"{directory} asks for an image processor {asked!r}, of which transformers has none on PIL.")
    return kind.from_pretrained(directory, local_files_only=True)


def _image_processor_type(directory: Path) -> str | None:
    """What the checkpoint's files call its image processor, without what they say of its making."""
    for file, place in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = directory / file
        if path.exists():
            said = json.loads(path.read_text(encoding="utf-8"))
            said = said if place is None else said.get(place, {})
            if "image_processor_type" in said:
                return str(said["image_processor_type"]).removesuffix("Fast").removesuffix("Pil")
    return None


def _load_module(directory: Path, family: Family, dtype: torch.dtype | str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model and transformers' report on its weights."""
    _check_size(directory, family)
    model, report = module_class(family).from_pretrained(
        directory,
        output_loading_info=True,
        local_files_only=True,
        use_safetensors=True,
        dtype=dtype,
        attn_implementation="sdpa",
    )
    return model, report


def module_class(family: Family) -> Any:
    """The family's class in transformers."""
    return getattr(importlib.import_module("transformers"), family.module_class)


def load_config(directory: Path, family: Family) -> Any:
    """The checkpoint's configuration."""
    return module_class(family).config_class.from_pretrained(directory, local_files_only=True)


def _check_size(directory: Path, family: Family) -> None:
    """Refuse a configuration of a larger model than the files hold: filled with random weights, it may fill memory."""
    from safetensors import safe_open

    config = load_config(directory, family)
    _refuse_softcapping(config, str(directory))
    held = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = file.keys()
            held += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in module_class(family)(config).parameters())
    is_packed = getattr(config, "quantization_config", None) is not None
    if 0 < held < 0.5 * wanted and not is_packed:
        raise ProbeError(
            f"config.json in {directory} describes a model of {wanted:,} parameters, but its safetensors files hold "
            f"{held:,} in all; the configuration is that of another model, or files are missing."
        )
