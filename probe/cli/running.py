"""What commands that run a model share: the model's part of a run's settings, loading it, and the manifest."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from probe.errors import ProbeError

if TYPE_CHECKING:
    import xarray as xr

    from probe.cli.options import Material
    from probe.cli.report import Reporter
    from probe.data.example import Episode
    from probe.models.model import Model
    from probe.models.names import Located
    from probe.store import Run

MANIFEST = "episodes.jsonl"

RUNS = Path("probe-runs")
"""Where runs are that were given no place."""


def describe_model(source: Material) -> tuple[Located, dict[str, object]]:
    """Find a model without loading it; also give what of it decides the numbers of a run."""
    from probe.models.fingerprint import of_directory
    from probe.models.load import placement, prompt_text
    from probe.models.names import locate

    located = locate(source.model)
    dtype, device = placement(source.dtype, source.device)
    return located, {
        "probe_version": version("probe"),
        "model": source.model,
        "model_fingerprint": of_directory(located.directory),
        "prompt": prompt_text(source.prompt),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
    }


@contextmanager
def experiment_run(
    reporter: Reporter, source: Material, out: Path | None, experiment: str, settings: Mapping[str, object]
) -> Iterator[tuple[Run, Located]]:
    """Find the model and open the run that belongs to it, to the source and to a command's own settings."""
    with reporter.step("finding the model"):
        from probe.store import open_run

        located, described = describe_model(source)
        config = {"experiment": experiment, **described, **source.describe(), **settings}
    with open_run(run_directory(out, source, config), config) as run:
        yield run, located


def finish(run: Run, source: Material, result: xr.Dataset) -> None:
    """Keep a result, with where its episodes came from and how it was made."""
    result.attrs |= {**source.describe(), "key": run.record["key"], **run.record["stamp"]}
    run.finish(result)


def run_directory(out: Path | None, source: Material, config: Mapping[str, object]) -> Path:
    """Where a run goes: as asked, else a name under probe-runs/ made from its settings."""
    from probe.store import key

    if out is not None:
        return out
    command = str(config["experiment"]).replace("_", "-")
    return RUNS / f"{command}-{Path(source.model).resolve().name}-{source.what}-{key(config)[:8]}"


def load_model(source: Material, located: Located) -> Model:
    """Load what was found, as the options say."""
    from transformers.utils.logging import disable_progress_bar

    from probe.models.load import load

    disable_progress_bar()  # transformers' own would break into ours
    return load(located, dtype=source.dtype, device=source.device, prompt=source.prompt)


@contextmanager
def manifest(run: Run, model: Model, episodes: Sequence[Episode]) -> Iterator[None]:
    """Check that a model can read episodes, and write them down before anything runs.

    If nothing comes of it, the directory is left as if nothing had been written: mended data may use it.
    """
    from probe.data.manifest import SAVED_IMAGES, write_manifest
    from probe.experiments.answering import check_words

    check_words(model, episodes)
    for episode in episodes:
        model.render(episode)
    write_manifest(episodes, run.path(MANIFEST))
    try:
        yield
    except ProbeError:
        if not run.has_parts:
            run.path(MANIFEST).unlink()
            shutil.rmtree(run.path(SAVED_IMAGES), ignore_errors=True)
        raise
