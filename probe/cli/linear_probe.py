"""``probe linear-probe``: what can be read linearly from the residual stream, by layer and position."""

from __future__ import annotations

from dataclasses import dataclass
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

PICTURE = "linear_probe.html"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ProbeSource(Source):
    """Which model reads which episodes."""

    episodes: int = 400


@dataclass(frozen=True)
class Choice:
    """What to read, where, and how to judge it."""

    targets: list[str]
    positions: list[str] | None
    layers: list[int] | None
    folds: int
    permutations: int


def linear_probe(
    source: ProbeSource | None = None,
    *,
    targets: str | None = None,
    positions: str | None = None,
    layers: str | None = None,
    folds: int = 5,
    permutations: int = 199,
    batch_size: int = 16,
    out: Path | None = None,
    json: Annotated[Json, Parameter(name="--json")] = False,
) -> None:
    """Tell what the residual stream holds in a form that a linear probe can read: the task, the image, the binding.

    For each target, layer and position a logistic regression is fitted on some episodes and judged on others, with the
    same example never on both sides. Beside its accuracy stand a control task, which a probe can only do by learning
    inputs by heart, the best guess that needs no vector, and a permutation test over all layers and positions.

    The bundled model:

        probe linear-probe
        probe linear-probe --task binding-uncued --shots 8
        probe linear-probe --task binding-uncued --shots 8 --targets binding --model toy-no-binding

    Your own checkpoint and data, where each line may have entries of its own ("animal": "cat"):

        probe linear-probe --model DIR --data my.jsonl --targets animal,answer --layers 0,8,16,24

    Parameters
    ----------
    source
        Which model reads which episodes; probes want some hundred.
    targets
        What to read, with commas. Synthetic: task (the hidden rule), colour, kind, count, size (of the query's
        picture), binding (the word bound to the query's class), demonstrated (the value that the last demonstration's
        answer stands for). Of any data: answer, or an entry of your examples. The default is all of a synthetic task,
        else answer.
    positions
        Where, with commas: demo_answer (the last demonstration's answer), image (mean over the query's image), question
        (its last token), answer (the row that predicts the answer). The default is all that there are.
    layers
        Which layers, such as 3 or 0,2,5 or 0:4; default all. Layer 0 reads embeddings.
    folds
        Parts for cross-validation.
    permutations
        Of the labels; the smallest p is 1 / (1 + permutations).
    batch_size
        Episodes in one forward; lower it if memory runs out.
    out
        The run directory; the default is a name under probe-runs/ made from the settings.
    json
        Print the summary as JSON and nothing else.
    """
    source = source or ProbeSource()
    source.check()
    numbers = parse_layers(layers)
    if folds < 2 or permutations < 1 or batch_size < 1:
        raise UsageError(
            "--folds must be 2 or more, --permutations and --batch-size 1 or more; got "
            f"{folds}, {permutations} and {batch_size}."
        )

    from probe.cli.report import Reporter

    reporter = Reporter(quiet=json)
    with reporter.step("reading the episodes"):
        from probe.data.manifest import episodes_key
        from probe.experiments.probe_targets import default_targets, find_target

        asked = _names(targets, "--targets")
        episodes = source.read_episodes()
        named = asked or default_targets(episodes)
        for name in named:
            find_target(name, episodes)  # found now, not after the model was loaded
        choice = Choice(named, _names(positions, "--positions"), numbers, folds, permutations)
        content = episodes_key(episodes)
    from probe.cli.running import experiment_run

    settings = {
        "episodes": content,
        "targets": choice.targets,
        "positions": choice.positions,
        "layers": choice.layers,
        "folds": folds,
        "permutations": permutations,
    }
    with experiment_run(reporter, source, out, "linear_probe", settings) as (run, located):
        reused = run.finished
        if not reused:
            _compute(run, source, episodes, choice, located, batch_size, reporter)
        result = run.result()

        from probe.cli.linear_probe_report import show

        with reporter.step("drawing"):
            draw(result, run.path(PICTURE))
        show(reporter, result, run.directory, run.path(PICTURE), reused=reused)


def _names(text: str | None, option: str) -> list[str] | None:
    """Read names with commas between them; ``None`` stands for what is the default."""
    if text is None:
        return None
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise UsageError(f"{option} {text!r} names none; write names with commas, or leave it out.")
    return names


def _compute(
    run: Run,
    source: ProbeSource,
    episodes: list[Episode],
    choice: Choice,
    located: Located,
    batch_size: int,
    reporter: Reporter,
) -> None:
    """Do the work of a run that is not finished."""
    from probe.cli.running import finish, load_model, manifest
    from probe.experiments import linear_probe as experiment

    with reporter.step("loading the model"):
        model = load_model(source, located)
    n = experiment.n_steps(len(episodes), len(choice.targets))
    with manifest(run, model, episodes), reporter.progress("reading and probing", n) as progress:
        result = experiment.linear_probe(
            model,
            episodes,
            targets=choice.targets,
            positions=choice.positions,
            layers=choice.layers,
            folds=choice.folds,
            permutations=choice.permutations,
            seed=source.seed,
            batch_size=batch_size,
            keep=run.part,
            progress=progress,
        )
        finish(run, source, result)


def draw(result: xr.Dataset, path: Path) -> None:
    """Write the picture of a result."""
    from probe.plots.linear_probe import plot_linear_probe
    from probe.plots.page import Table, write_page

    columns = ("target", "the label", "control task: labels are a random function of", "labels", "types", "left out")
    rows = [
        [
            name,
            str(result["about"].sel(target=name).item()),
            str(result["control"].sel(target=name).item()),
            *(int(result[number].sel(target=name)) for number in ("n_labels", "n_types", "n_left_out")),
        ]
        for name in result["target"].values.tolist()
    ]
    figures = [
        (
            "Linear probes",
            "Accuracy of linear probes on the residual stream, by target, position and layer, beside a control task "
            "and the best guess that needs no vector.",
            plot_linear_probe(result),
        )
    ]
    write_page(path, result, figures, title="What can be read linearly", tables=[Table("Targets", columns, rows)])
