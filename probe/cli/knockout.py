"""``probe knockout``: what a model loses when attention or heads are taken away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from probe.cli.options import Json, Source, parse_heads, parse_layers
from probe.errors import UsageError

if TYPE_CHECKING:
    import xarray as xr

    from probe.cli.report import Reporter
    from probe.data.example import Episode
    from probe.experiments.interventions import Intervention
    from probe.models.model import Model
    from probe.models.names import Located
    from probe.store import Run

PICTURE = "knockout.html"

HIDDEN = "demos/image,demos/text,demos/delimiter,demos,query/image"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Removal:
    """What to take away.

    Parameters
    ----------
    method
        knockout (hide tokens), uniform (attend alike to everything), mean or zero (replace what heads write by their
        mean over the episodes, or by nothing).
    hide
        What a knockout hides, with commas; each is taken away by itself. An owner (demos, demo0, demo1 …, query), or a
        part of it: demos/image, demos/text, demos/question, demos/answer, demos/delimiter; sink, template; what is
        joined by + is hidden together. The default is demos/image,demos/text,demos/delimiter,demos,query/image.
    rows
        From which positions: answer (those that predict the answer), all, or tokens named as in --hide. The default is
        answer; where heads are replaced (mean, zero), all.
    layers
        In which layers, such as 3, or 0,2,5, or 0:4 for 0 to 3; the default is all.
    window
        In every window of so many of these layers, each by itself.
    heads
        In which heads (layer.head, with commas) in place of whole layers.
    each_head
        Each head by itself: of --heads, or else of the layers.
    """

    method: str = "knockout"
    hide: str | None = None
    rows: str | None = None
    layers: str | None = None
    window: int | None = None
    heads: str | None = None
    each_head: Annotated[bool, Parameter(negative=())] = False

    def check(self) -> None:
        """Refuse options that do not go together, as far as that can be seen without a model."""
        if self.heads is not None and self.layers is not None:
            raise UsageError("--heads names its layers; leave out --layers.")
        if self.window is not None and (self.heads is not None or self.each_head):
            raise UsageError("--window is about whole layers; leave out --heads and --each-head.")
        if self.window is not None and self.window < 1:
            raise UsageError(f"--window must be 1 or more; got {self.window}.")
        for option, text in (("--hide", self.hide), ("--rows", self.rows)):
            if text is not None and not text.strip():
                raise UsageError(f"{option} names nothing; leave it out, or name tokens such as demos/image.")
        if self.hide is not None and self.method != "knockout":
            raise UsageError(f"--hide belongs to --method knockout; leave it out with {self.method}.")
        if self.method in ("mean", "zero") and self.heads is None and not self.each_head:
            raise UsageError(
                f"--method {self.method} replaces heads: name them (--heads 2.2,3.0), or give --each-head."
            )
        self.interventions(1, 1)  # names are read, so that wrong ones are refused before anything is loaded

    def interventions(self, n_layers: int, n_heads: int) -> list[Intervention]:
        """What is taken away from a model of so many layers and heads, one after the other."""
        from probe.experiments.interventions import Intervention

        layers, heads = parse_layers(self.layers), parse_heads(self.heads)
        hidden = (
            [part.strip() for part in (HIDDEN if self.hide is None else self.hide).split(",")]
            if self.method == "knockout"
            else [""]
        )
        in_order = list(range(n_layers)) if layers is None else sorted(set(layers))
        places: list[dict[str, tuple[int, ...] | tuple[tuple[int, int], ...] | None]]
        if self.window is not None:
            starts = range(max(1, len(in_order) - self.window + 1))
            places = [{"layers": tuple(in_order[start : start + self.window])} for start in starts]
        elif self.each_head:
            each = heads or [(layer, head) for layer in in_order for head in range(n_heads)]
            places = [{"heads": (head,)} for head in each]
        elif heads is not None:
            places = [{"heads": tuple(heads)}]
        else:
            places = [{"layers": None if layers is None else tuple(in_order)}]
        return [
            Intervention(self.method, keys, "" if self.rows is None else self.rows, **place)  # type: ignore[arg-type]
            for keys in hidden
            for place in places
        ]


def knockout(
    source: Source | None = None,
    removal: Removal | None = None,
    *,
    controls: int = 3,
    answers: bool = True,
    batch_size: int = 16,
    out: Path | None = None,
    json: Annotated[Json, Parameter(name="--json")] = False,
) -> None:
    """Take attention or heads away, and see whether it matters.

    Every episode is answered as it is, with something taken away, and with as much taken away at random. Printed are
    the effects on log p of the gold answer, on accuracy and on the copy rate, with paired 95 % intervals, and how far
    they go beyond the random control.

    What happens if the position that answers cannot see the demonstrations' images, their text, the query's image?

        probe knockout --task binding-uncued --shots 8

    The text alone, in every window of two layers, or in two heads only:

        probe knockout --hide demos/text --window 2
        probe knockout --hide demos/answer --heads 3.2,4.0

    Two heads replaced by their mean, together; and every head of two layers by itself:

        probe knockout --method mean --heads 3.2,2.2
        probe knockout --method mean --layers 2:4 --each-head

    Parameters
    ----------
    source
        Which model reads which episodes.
    removal
        What to take away.
    controls
        How many random controls of each kind: as many tokens of the same turns, as many other heads of the same layers.
    answers
        Whether to let the model answer too, for accuracy and copy rate; --no-answers is faster.
    batch_size
        Episodes in one forward; lower it if memory runs out.
    out
        The run directory; the default is a name under probe-runs/ made from the settings.
    json
        Print the summary as JSON and nothing else.
    """
    source, removal = source or Source(), removal or Removal()
    if controls < 0 or batch_size < 1:
        raise UsageError(f"--controls must be 0 or more and --batch-size 1 or more; got {controls} and {batch_size}.")

    from probe.cli.report import Reporter

    reporter = Reporter(quiet=json)
    with reporter.step("reading the episodes"):
        from probe.data.manifest import episodes_key

        removal.check()
        episodes = source.read_episodes()
        content = episodes_key(episodes)
    from probe.cli.running import experiment_run

    settings = {
        "episodes_key": content,
        **asdict(removal),
        "controls": controls,
        "answers": answers,
    }
    with experiment_run(reporter, source, out, "knockout", settings) as (run, located):
        reused = run.finished
        if not reused:
            _compute(run, source, located, episodes, removal, controls, answers, batch_size, reporter)
        result = run.result()

        from probe.cli.knockout_report import show

        with reporter.step("drawing"):
            draw(result, run.path(PICTURE))
        show(reporter, result, run.directory, run.path(PICTURE), reused=reused)


def _compute(
    run: Run,
    source: Source,
    located: Located,
    episodes: Sequence[Episode],
    removal: Removal,
    controls: int,
    answers: bool,
    batch_size: int,
    reporter: Reporter,
) -> None:
    """Do the work of a run that is not finished."""
    from probe.cli.running import finish, load_model, manifest
    from probe.experiments import knockout as experiment
    from probe.experiments.interventions import check_places

    with reporter.step("loading the model"):
        model = load_model(source, located)
        interventions = _there(model, removal, episodes)
        for intervention in interventions:  # what the model does not have is refused before anything is written
            check_places(model, intervention)
    n = experiment.n_conditions(interventions, controls) * len(episodes)
    with manifest(run, model, episodes), reporter.progress("reading episodes", n) as progress:
        result = experiment.knockout(
            model,
            episodes,
            interventions,
            controls=controls,
            answers=answers,
            seed=source.seed,
            batch_size=batch_size,
            keep=run.part,
            progress=progress,
        )
        progress(n)
    finish(run, source, result)


def _there(model: Model, removal: Removal, episodes: Sequence[Episode]) -> list[Intervention]:
    """What to take away from this model and these episodes.

    Layers without self-attention have no heads of their own; of tokens, where nobody named any, those that are there.
    """
    found = removal.interventions(model.n_layers, model.n_heads)
    if removal.hide is None and removal.method == "knockout":
        shots = any(episode.shots for episode in episodes)
        images = {
            "demos": any(x.images for episode in episodes for x in episode.demonstrations),
            "query": any(episode.query.images for episode in episodes),
        }
        turns = {"demos": shots, "query": True}
        found = [
            each
            for each in found
            for owner, _, role in [each.keys.partition("/")]
            if (images if role == "image" else turns)[owner]
        ]
        if not found:
            raise UsageError("These episodes have neither demonstrations nor images to hide; name tokens with --hide.")
    if removal.each_head and removal.heads is None:
        there = set(model.choose_layers(None))
        found = [each for each in found if each.heads and each.heads[0][0] in there]
    return found


def draw(result: xr.Dataset, path: Path) -> None:
    """Write the picture of a result."""
    from probe.plots.knockout import plot_knockout
    from probe.plots.page import write_page

    figures = [
        (
            "What it costs",
            "Effects of taking something away, beside those of taking away as much at random.",
            plot_knockout(result),
        )
    ]
    write_page(path, result, figures, title="Knockout")
