"""``probe attention-map``: where the attention goes, as a table, a picture and a labelled array on disk."""

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
    from probe.experiments.ranking import RankedHead
    from probe.models.model import Model
    from probe.models.names import Located
    from probe.store import Run

Rows = Literal["answer", "demo-answers", "all"]

PICTURE = "attention_map.html"
PICTURE_WITHOUT_SINKS = "attention_map_without_sinks.html"


def attention_map(
    source: Source | None = None,
    *,
    rows: Rows = "answer",
    layers: str | None = None,
    top: int = 5,
    without_sinks: Annotated[bool, Parameter(negative=())] = False,
    knockout: Annotated[bool, Parameter(negative=())] = False,
    controls: int = 3,
    batch_size: int = 16,
    out: Path | None = None,
    json: Annotated[Json, Parameter(name="--json")] = False,
) -> None:
    """Measure how much attention each head pays to the demonstrations' images and text.

    Prints the heads that attend most to the demonstrations' images and to their text (chosen on one half of the
    episodes, reported with 95 % intervals on the other), and writes a picture that opens in any browser, offline.

    The run directory holds the episodes (episodes.jsonl, written before anything runs), the labelled arrays
    (result.zarr) and the picture (attention_map.html). The same command again reuses it; an interrupted run goes on
    where it stopped.

    The bundled model on a synthetic task:

        probe attention-map --task recognition --shots 8

    Do the heads that look at the demonstrations' images or text use them? What happens without, beside each mass:

        probe attention-map --task binding-uncued --shots 8 --knockout

    Your own checkpoint and data:

        probe attention-map --model ~/models/Qwen2.5-VL-7B-Instruct --data photos.jsonl --layers 0:8 --out runs/photos

    Parameters
    ----------
    source
        Which model reads which episodes.
    rows
        `answer`: positions that predict the answer. `demo-answers`: also the demonstrations' own answer tokens. `all`:
        also every position (mass only).
    layers
        Which layers to record, such as 3, or 0,2,5, or 0:4 for 0 to 3; the default is all.
    top
        How many heads to list for images and for text.
    without_sinks
        Rank and draw what is left without attention sinks, in a picture of its own. The arrays on disk are the same.
    knockout
        Also answer the episodes with the demonstrations' images, text and delimiters hidden from the row that answers,
        in all layers and in each listed head, and show what that costs.
    controls
        With --knockout, how many random controls of each kind.
    batch_size
        Episodes in one forward; lower it if memory runs out.
    out
        The run directory; the default is a name under probe-runs/ made from the settings.
    json
        Print the summary as JSON and nothing else.
    """
    source = source or Source()
    chosen = parse_layers(layers)
    if knockout and without_sinks:
        raise UsageError("--knockout hides what the listed heads attend to, sinks included; leave out --without-sinks.")
    if top < 1 or batch_size < 1 or controls < 0:
        raise UsageError(
            f"--top and --batch-size must be 1 or more, --controls 0; got {top}, {batch_size} and {controls}."
        )

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
        "rows": rows,
        "layers": chosen,
        # Which heads are listed decides which are knocked out.
        "knockout": {"top": top, "controls": controls} if knockout else None,
    }
    with experiment_run(reporter, source, out, "attention_map", settings) as (run, located):
        reused = run.finished
        if not reused:
            without = (top, controls) if knockout else None
            _compute(run, source, located, episodes, rows, chosen, without, batch_size, reporter)
        result = run.result()

        from probe import segments
        from probe.cli.attention_report import show
        from probe.experiments.ranking import rank_heads

        picture = run.path(PICTURE_WITHOUT_SINKS if without_sinks else PICTURE)
        with reporter.step("drawing"):
            result = segments.without_sinks(result) if without_sinks else result
            ranked = rank_heads(result, n=top)
            draw(result, ranked, picture)
        show(reporter, result, ranked, run.directory, picture, reused=reused)


def _compute(
    run: Run,
    source: Source,
    located: Located,
    episodes: Sequence[Episode],
    rows: Rows,
    layers: list[int] | None,
    without: tuple[int, int] | None,
    batch_size: int,
    reporter: Reporter,
) -> None:
    """Do the work of a run that is not finished; ``without``: heads and controls of its knockouts."""
    from probe.cli.running import finish, load_model, manifest
    from probe.experiments import attention_map as experiment

    with reporter.step("loading the model"):
        model = load_model(source, located)
        model.choose_layers(layers)  # what the model does not have is refused before anything is written
    with manifest(run, model, episodes):
        with reporter.progress("reading episodes", len(episodes)) as progress:
            result = experiment.attention_map(
                model, episodes, rows=rows, layers=layers, batch_size=batch_size, keep=run.part, progress=progress
            )
        if without is not None:
            result = _knock_out(run, model, episodes, result, layers, without, source.seed, batch_size, reporter)
    finish(run, source, result)


def _knock_out(
    run: Run,
    model: Model,
    episodes: Sequence[Episode],
    result: xr.Dataset,
    layers: list[int] | None,
    without: tuple[int, int],
    seed: int,
    batch_size: int,
    reporter: Reporter,
) -> xr.Dataset:
    """Add what happens without what is read."""
    from probe.experiments import without as experiment
    from probe.experiments.knockout import n_conditions

    top, controls = without
    hidden = experiment.knockouts_for(result, top=top, layers=layers)
    n = n_conditions(hidden, controls) * len(episodes)
    with reporter.progress("knocking out", n) as progress:
        result = experiment.without(
            model,
            episodes,
            result,
            top=top,
            layers=layers,
            controls=controls,
            seed=seed,
            batch_size=batch_size,
            keep=run.part,
            progress=progress,
        )
        progress(n)
    return result


def _first_of_each(ranked: Sequence[RankedHead], n: int) -> list[tuple[int, int]]:
    """The heads of the first ``n`` ranks of each modality, each once."""
    return list(dict.fromkeys((head.layer, head.head) for head in ranked if head.rank <= n))


def draw(result: xr.Dataset, ranked: Sequence[RankedHead], path: Path) -> None:
    """Write the picture of a result: maps, demonstrations by position, and single heads on the images."""
    from probe.plots.attention_map import plot_attention_map
    from probe.plots.demonstration_position import plot_mass_by_demonstration
    from probe.plots.overlay import plot_overlay, stored_episodes
    from probe.plots.page import write_page
    from probe.plots.text_or_image import plot_text_or_image

    heads = list(dict.fromkeys((head.layer, head.head) for head in ranked))
    left_out = f" Left out: {result.attrs['left_out']}." if "left_out" in result.attrs else ""
    figures = [
        (
            "Where each head looks",
            "Attention of the position that predicts the answer, averaged over episodes. The five columns partition "
            f"what it can see; the first three are the demonstrations.{left_out}",
            plot_attention_map(result),
        )
    ]
    if heads and result.sizes["episode"] > 1:
        report = result.sel(episode=result["half"] == "report")
        figures.append(
            (
                "By place of the demonstration",
                "How the same attention spreads over the demonstrations' images and text, first to last read, for the "
                "two highest ranked heads of each kind, on the episodes that did not choose them." + left_out,
                plot_mass_by_demonstration(report, heads=_first_of_each(ranked, 2)),
            )
        )
    if bool((result["demonstration"] >= 0).any()) and "contribution" in result:
        figures.append(
            (
                "Text or images?",
                "What the row that answers reads of the demonstrations' images and of their text, by three measures, "
                "and what it costs to hide them.",
                plot_text_or_image(result),
            )
        )
    if "patch_mass" in result and heads and "no_overlay" not in result.attrs:
        figures.append(
            (
                "On the images",
                "One head's attention on every image token of one episode. Choose the head in the menu." + left_out,
                plot_overlay(result, heads=heads, episode=stored_episodes(result)[0]),
            )
        )
    write_page(path, result, figures, title="Attention map")
