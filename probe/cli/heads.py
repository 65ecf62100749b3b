"""``probe heads``: which heads do what, and whether those that stand out matter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from probe.cli.options import Json, Source
from probe.errors import UsageError

if TYPE_CHECKING:
    import xarray as xr

    from probe.cli.report import Reporter
    from probe.data.example import Episode
    from probe.models.names import Located
    from probe.store import Run

PICTURE, TABLE = "heads.html", "heads.csv"


def heads(
    source: Source | None = None,
    *,
    causal: bool = True,
    top: int = 3,
    controls: int = 5,
    sequences: int = 32,
    length: int | None = None,
    batch_size: int = 16,
    out: Path | None = None,
    json: Annotated[Json, Parameter(name="--json")] = False,
) -> None:
    """Score every head of a model, kind by kind, and ablate the heads that stand out.

    On repeated random tokens and pictures: previous-token, duplicate-token and induction heads, text rows and image
    rows apart. From the weights: copying. In the episodes: label matching, task recognition and task learning, visual
    heads, function vectors, and the effect of ablating each head. Half of the sequences and episodes choose the heads
    of a kind, the other half reports their scores; ablating them together is compared with random heads of the same
    layers. The whole table is written to heads.csv.

    The bundled model on the task whose circuit its card describes:

        probe heads --task binding-uncued --shots 8

    Scores alone, of a large model:

        probe heads --model qwen-vl --data photos.jsonl --shots 4 --no-causal

    Parameters
    ----------
    source
        Which model reads which episodes.
    causal
        Whether to replace heads: for function vectors, ablation, and the heads found. It takes as many forwards as the
        model has heads, twice; --no-causal leaves it out.
    top
        How many heads of each kind are listed, and ablated together.
    controls
        How many draws of random heads.
    sequences
        How many sequences of repeated tokens, and half as many of repeated pictures.
    length
        How many tokens are repeated; the default is 50, or fewer where the model knows fewer plain words.
    batch_size
        Sequences or episodes in one forward; lower it if memory runs out.
    out
        The run directory; the default is a name under probe-runs/ made from the settings.
    json
        Print the whole table as JSON and nothing else.
    """
    source = source or Source()
    if top < 1 or controls < 0 or sequences < 4 or batch_size < 1 or (length is not None and length < 2):
        raise UsageError(
            "--top and --batch-size must be 1 or more, --sequences 4, --length 2, --controls 0; got "
            f"{top}, {batch_size}, {sequences}, {length} and {controls}."
        )

    from probe.cli.report import Reporter

    reporter = Reporter(quiet=json)
    with reporter.step("reading the episodes"):
        from probe.data.manifest import episodes_key

        episodes = source.read_episodes()
        content = episodes_key(episodes)
    from probe.cli.running import experiment_run

    settings = {
        "episodes_key": content,
        "causal": causal,
        "top": top,
        "controls": controls,
        "sequences": sequences,
        "length": length,
    }
    with experiment_run(reporter, source, out, "heads", settings) as (run, located):
        reused = run.finished
        if not reused:
            options = {"causal": causal, "top": top, "controls": controls, "sequences": sequences, "length": length}
            _compute(run, source, located, episodes, options, batch_size, reporter)
        result = run.result()

        from probe.cli.heads_report import show

        with reporter.step("drawing"):
            draw(result, run.path(PICTURE))
        show(reporter, result, run.directory, run.path(PICTURE), run.path(TABLE), reused=reused)


def _compute(
    run: Run,
    source: Source,
    located: Located,
    episodes: Sequence[Episode],
    options: dict[str, bool | int | None],
    batch_size: int,
    reporter: Reporter,
) -> None:
    """Do the work of a run that is not finished."""
    from probe.cli.running import finish, load_model, manifest
    from probe.experiments import heads as experiment

    with reporter.step("loading the model"):
        model = load_model(source, located)
    counted = {name: options[name] for name in ("causal", "controls", "sequences")}
    n = experiment.n_readings_of_all(model, len(episodes), **counted)  # type: ignore[arg-type]
    with manifest(run, model, episodes), reporter.progress("reading", n) as progress:
        result = experiment.heads(
            model,
            episodes,
            seed=source.seed,
            batch_size=batch_size,
            keep=run.part,
            progress=progress,
            **options,  # type: ignore[arg-type]
        )
        progress(n)
    finish(run, source, result)


def draw(result: xr.Dataset, path: Path) -> None:
    """Write the picture of a result: all scores, how alike they are, and the heads found, ablated together."""
    from probe.measures.head_summary import of_found
    from probe.plots.heads import plot_head_likeness, plot_heads
    from probe.plots.knockout import plot_knockout
    from probe.plots.page import write_page

    figures = [
        ("Which heads do what", "One map for each kind of head, of what it does beyond its null.", plot_heads(result)),
        (
            "Are they the same heads?",
            "How alike the kinds are over heads, beside how alike two halves of one kind are.",
            plot_head_likeness(result),
        ),
    ]
    found = of_found(result)
    if found is not None:
        figures.append(
            (
                "Do they matter?",
                "The heads of each kind ablated together, beside as many random heads of the same layers, in episodes "
                "that did not choose them.",
                plot_knockout(found),
            )
        )
    write_page(path, result, figures, title="Heads")
