"""From a name to a directory on this machine: bundled models, aliases, directories, repositories of the Hub.

A repository of the Hugging Face Hub is written ``owner/name``, or ``owner/name@revision`` with a branch, a tag or a
commit. What it means today is settled once, before anything else is fetched: its ``config.json`` names the family, and
a model of an unknown family is refused before gigabytes are on their way. The commit that was found is kept in every
result. ``HF_HUB_OFFLINE=1`` and the other settings of ``huggingface_hub`` hold. Code that comes with a checkpoint is
never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from probe.errors import ProbeError, UsageError
from probe.models.families import ALIASES, FAMILIES
from probe.models.family import Family

WEIGHTS = Path(__file__).parent.parent / "toy" / "weights"
BUNDLED = {name: WEIGHTS / name for name in ("toy", "toy-no-binding")}
"""The models that are installed with probe; docs/toy.md describes them."""

WANTED, UNWANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"), ("*/*", "consolidated*")
"""Files of a repository that are fetched; other formats of the same weights, which many repositories hold, are not."""

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Located:
    """A model that is on this machine.

    Attributes
    ----------
    name
        What the user called it.
    directory
        A checkpoint in Hugging Face layout.
    family
        Its kind.
    origin
        ``owner/name@commit`` if it is from the Hub, else empty.
    """

    name: str
    directory: Path
    family: Family
    origin: str = ""


def locate(name: str | Path, *, weights: bool = True) -> Located:
    """What ``name`` means; fetched from the Hub if it is there and not on this machine yet.

    Parameters
    ----------
    name
        A bundled model, an alias, a directory, or a repository with or without a revision.
    weights
        False fetches everything but the weights.

    Raises
    ------
    UsageError
        If the name means nothing, or a model of a family that cannot be read.
    ProbeError
        If the model cannot be fetched.
    """
    directory, origin = find(name, weights=weights, check=family_of)
    return Located(str(name), directory, family_of(directory, str(name)), origin)


def find(
    name: str | Path, *, weights: bool = True, check: Callable[[Path, str], object] | None = None
) -> tuple[Path, str]:
    """The directory of any checkpoint, whatever its family, and ``owner/name@commit`` if it is from the Hub.

    Parameters
    ----------
    name, weights
        As in :func:`locate`.
    check
        Called with a directory that holds ``config.json`` and with what to call the checkpoint, before its weights are
        fetched; what it raises passes through.

    Raises
    ------
    UsageError
        If the name means nothing.
    ProbeError
        If the checkpoint cannot be fetched.
    """
    text = str(name)
    if text in ALIASES:
        return _from_hub(text, ALIASES[text], weights, check)
    directory = BUNDLED.get(text) or Path(name).expanduser()
    if text in BUNDLED and not directory.is_dir():
        raise ProbeError(f"The bundled model is not installed at {directory}; install probe again.")
    if directory.is_dir():
        if check:
            check(directory, text)
        return directory, ""
    if isinstance(name, str) and not directory.exists() and _REPOSITORY.fullmatch(text):
        return _from_hub(text, text, weights, check)
    what = "is a file" if directory.exists() else "is neither a known model nor a directory"
    close = get_close_matches(text, (*BUNDLED, *ALIASES), n=1)
    raise UsageError(
        f"{text!r} {what}; {f'did you mean {close[0]}? ' if close else ''}`probe models list` shows the names. Or give "
        "a repository of the Hugging Face Hub (owner/name or owner/name@revision), or a directory that holds a "
        "checkpoint in Hugging Face layout."
    )


def family_of(directory: Path, name: str) -> Family:
    """The family of a checkpoint, from its ``config.json``."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{directory} holds no config.json, so it is no checkpoint in Hugging Face layout.") from None
    except (OSError, ValueError) as error:
        raise ProbeError(f"{path} cannot be read: {error}.") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in FAMILIES:
        known = ", ".join(family.name for family in FAMILIES.values())
        raise UsageError(
            f"{name} is a {kind!r} model; known families are {known}. docs/families.md says how to add one."
        )
    return FAMILIES[kind]


def _from_hub(name: str, address: str, weights: bool, check: Callable[[Path, str], object] | None) -> tuple[Path, str]:
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    repository, _, revision = address.partition("@")
    what = name if name == address else f"{name} ({address})"
    out_of_reach = "and the Hub cannot be reached (HF_HUB_OFFLINE, or no network)"
    # The first that fits: some of these are kinds of later ones.
    refusals: tuple[tuple[type[Exception], type[ProbeError], str], ...] = (
        (errors.HFValidationError, UsageError, f"{what}: the Hub has no such names; write owner/name@revision."),
        (
            errors.GatedRepoError,
            ProbeError,
            f"{what} is gated: accept its terms at https://huggingface.co/{repository}, then `hf auth login`.",
        ),
        (errors.RevisionNotFoundError, UsageError, f"{what}: the repository has no revision {revision!r}."),
        (
            errors.RepositoryNotFoundError,
            UsageError,
            f"{what}: there is no such directory here, and on the Hub no such repository, or it is private: then "
            "`hf auth login` first.",
        ),
        (errors.IncompleteSnapshotError, ProbeError, f"{what} is only in part on this machine, {out_of_reach}."),
        (
            errors.LocalEntryNotFoundError,
            ProbeError,
            f"{what} is not on this machine, neither a directory nor in the Hub's cache, {out_of_reach}. Fetch it "
            f"where there is a network: hf download {repository}{f' --revision {revision}' if revision else ''}.",
        ),
        (errors.EntryNotFoundError, UsageError, f"{what} has no config.json, so transformers cannot load it."),
    )
    try:
        config = Path(hf_hub_download(repository, "config.json", revision=revision or None))
        commit = config.parent.name
        if check:
            check(config.parent, what)
        left_out = UNWANTED if weights else (*UNWANTED, "*.safetensors")
        directory = snapshot_download(
            repository, revision=commit, allow_patterns=list(WANTED), ignore_patterns=list(left_out)
        )
    except (errors.HFValidationError, errors.EntryNotFoundError, OSError) as error:
        for kind, refusal, sentence in refusals:
            if isinstance(error, kind):
                raise refusal(sentence) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ProbeError(f"{what} cannot be fetched: {reason}") from error
    return Path(directory), f"{repository}@{commit}"
