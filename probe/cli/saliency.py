"""``probe saliency``: which flows of attention the right answer depends on, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from probe.cli.options import Json, Source, parse_layers
from probe.errors import UsageError

if TYPE_CHECKING:
    import xarray as xr

    from probe.cli.report import Reporter
    from probe.data.example import Episode
    from probe.models.names import Located
    from probe.store import Run

PICTURE = "saliency.html"


def saliency(
    source: Source | None = None,
    *,
    layers: str | None = None,
    batch_size: int = 4,
    out: Path | None = None,
    json: Annotated[Json, Parameter(name="--json")] = False,
) -> None:
    """Measure which flows of attention the right answer depends on, layer by layer.

    Saliency is attention times the gradient of the loss, -log p(right answer), with respect to it. Averaged over pairs
    of positions it becomes flows: from everything into the demonstrations' answers and from these to the row that
    answers ("Label words are anchors"), and the same split by modality: from each demonstration's image and question to
    its answer, and from the demonstrations and the query to the row that answers.

    Every layer takes a forward and a backward pass of its own, so that memory does not grow with their number.

    The bundled model, on a task that it has to learn from the demonstrations:

        probe saliency --task binding-uncued --shots 4

    Your own checkpoint and data:

        probe saliency --model ~/models/Qwen2.5-VL-7B-Instruct --data photos.jsonl --dtype bfloat16 --batch-size 1

    Parameters
    ----------
    source
        Which model reads which episodes.
    layers
        Which layers to read, such as 3, or 0,2,5, or 0:4 for 0 to 3; the default is all.
    batch_size
        Episodes in one forward; lower it if memory runs out.
    out
        The run directory; the default is a name under probe-runs/ made from the settings.
    json
        Print the summary as JSON and nothing else.
    """
    source = source or Source()
    chosen = parse_layers(layers)
    if batch_size < 1:
        raise UsageError(f"--batch-size must be 1 or more; got {batch_size}.")

    from probe.cli.report import Reporter

    reporter = Reporter(quiet=json)
    with reporter.step("reading the episodes"):
        from probe.data.manifest import episodes_key

        episodes = source.read_episodes()
        content = episodes_key(episodes)
    from probe.cli.running import experiment_run

    settings = {
        "n_episodes": len(episodes),
        "episodes_key": content,
        "layers": chosen,
    }
    with experiment_run(reporter, source, out, "saliency", settings) as (run, located):
        reused = run.finished
        if not reused:
            _compute(run, source, located, episodes, chosen, batch_size, reporter)
        result = run.result()

        from probe.cli.saliency_report import show

        with reporter.step("drawing"):
            draw(result, run.path(PICTURE))
        show(reporter, result, run.directory, run.path(PICTURE), reused=reused)


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
    from probe.experiments import saliency as experiment
    from probe.trace.gradients import check_gradients

    with reporter.step("loading the model"):
        model = load_model(source, located)
        model.choose_layers(layers)  # what the model does not have is refused before anything is written
        check_gradients(model)
    with manifest(run, model, episodes), reporter.progress("reading episodes", len(episodes)) as progress:
        result = experiment.saliency(
            model, episodes, layers=layers, batch_size=batch_size, keep=run.part, progress=progress
        )
    finish(run, source, result)


def draw(result: xr.Dataset, path: Path) -> None:
    """Write the picture of a result."""
    from probe.plots.page import write_page
    from probe.plots.saliency import plot_saliency

    figures = [
        (
            "Flows by layer",
            "How much the loss depends on attention between groups of positions, mean over pairs: the flows of "
            "“Label words are anchors”, and the same split by modality.",
            plot_saliency(result),
        )
    ]
    write_page(path, result, figures, title="Saliency of attention")
