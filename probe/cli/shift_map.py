"""``probe shift-map``: how the demonstrations shift each head, and how constant that shift is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from probe.cli.options import Json, Source, parse_layers
from probe.errors import UsageError

if TYPE_CHECKING:
    import xarray as xr

    from probe.cli.report import Reporter
    from probe.data.example import Episode
    from probe.models.names import Located
    from probe.store import Run

Row = Literal["answer", "answer-rest"]


def shift_map(
    source: Source | None = None,
    *,
    row: Row = "answer",
    layers: str | None = None,
    top: int = 5,
    batch_size: int = 16,
    out: Path | None = None,
    json: Annotated[Json, Parameter(name="--json")] = False,
) -> None:
    """Measure how the demonstrations shift each head, and how constant that shift is.

    Attention splits exactly into that to the demonstrations (D) and that to all else (Q): SA = SA_Q + mu (SA_D - SA_Q),
    where mu is the attention mass of D. In-context vectors put a constant in place of SA_D - SA_Q. For each head this
    says how large the shift is, what it does to the logit of the answer directly, and how constant it is from query to
    query: the mean cosine between episodes, the share that the best constant explains in other episodes, and how many
    directions the shifts take up.

    The run directory holds the vectors of all episodes (result.zarr) and the picture (shift_map.html).

    The bundled model on a synthetic task:

        probe shift-map --task operator --shots 8

    Your own checkpoint and data:

        probe shift-map --model ~/models/Qwen2.5-VL-7B-Instruct --data photos.jsonl --dtype bfloat16 --batch-size 4

    Parameters
    ----------
    source
        Which model reads which episodes.
    row
        `answer`: the position that predicts the first token of the answer. `answer-rest`: those that predict its other
        tokens. Both are measured; this is which is shown.
    layers
        Which layers to measure, such as 3, or 0,2,5, or 0:4 for 0 to 3; the default is all.
    top
        How many heads to list.
    batch_size
        Episodes in one forward; lower it if memory runs out.
    out
        The run directory; the default is a name under probe-runs/ made from the settings.
    json
        Print the summary as JSON and nothing else.
    """
    source = source or Source()
    chosen = parse_layers(layers)
    if top < 1 or batch_size < 1:
        raise UsageError(f"--top and --batch-size must be 1 or more; got {top} and {batch_size}.")
    if source.shots == 0:
        raise UsageError("Without demonstrations nothing shifts a head; --shots must be 1 or more here.")

    from probe.cli.report import Reporter

    reporter = Reporter(quiet=json)
    with reporter.step("reading the episodes"):
        from probe.data.manifest import episodes_key

        episodes = source.read_episodes()
        content = episodes_key(episodes)
    if len(episodes) < 2:
        raise UsageError("Half of the episodes choose heads and vectors, the other half reports; give 2 or more.")
    from probe.cli.running import experiment_run

    settings = {
        "n_episodes": len(episodes),
        "episodes_key": content,
        "layers": chosen,
    }
    with experiment_run(reporter, source, out, "shift_map", settings) as (run, located):
        reused = run.finished
        if not reused:
            _compute(run, source, located, episodes, chosen, batch_size, reporter)
        result = run.result()

        from probe.cli.shift_map_report import show

        shown = row.replace("-", "_")
        picture = run.path("shift_map.html" if row == "answer" else f"shift_map_{shown}.html")
        with reporter.step("drawing"):
            draw(result, shown, picture)
        show(reporter, result, shown, top, run.directory, picture, reused=reused)


def _compute(
    run: Run,
    source: Source,
    located: Located,
    episodes: Sequence[Episode],
    layers: list[int] | None,
    batch_size: int,
    reporter: Reporter,
) -> None:
    """Do the work of a run that is not finished."""
    from probe.cli.running import finish, load_model, manifest
    from probe.experiments import shift_map as experiment

    experiment.check_shots(episodes)
    with reporter.step("loading the model"):
        model = load_model(source, located)
        model.choose_layers(layers)  # what the model does not have is refused before anything is written
    with manifest(run, model, episodes), reporter.progress("reading episodes", len(episodes)) as progress:
        result = experiment.shift_map(
            model, episodes, layers=layers, batch_size=batch_size, keep=run.part, progress=progress
        )
    finish(run, source, result)


def draw(result: xr.Dataset, row: str, path: Path) -> None:
    """Write the picture of a result."""
    from probe.plots.page import write_page
    from probe.plots.shift_map import plot_shift_map

    figures = [
        (
            "The shift of each head",
            "What the demonstrations add to the residual stream through each head: how much, what it does to the "
            "answer directly, and whether one constant vector could stand for it.",
            plot_shift_map(result, row=row),
        )
    ]
    write_page(path, result, figures, title="How the demonstrations shift each head")
