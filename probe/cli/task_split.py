"""``probe task-split``: what demonstrations teach, told apart from what they only remind of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from probe.cli.options import Json, Material
from probe.errors import UsageError

if TYPE_CHECKING:
    import xarray as xr

    from probe.cli.report import Reporter
    from probe.data.example import Episode, Example
    from probe.models.model import Model
    from probe.models.names import Located
    from probe.store import Run

PICTURE = "task_split.html"

POOL = 1200
"""Examples in the pool of a synthetic task."""

RELIANCE_SHOTS = 4


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SplitSource(Material):
    """Which model reads which examples."""

    episodes: int = 60


def task_split(
    source: SplitSource | None = None,
    *,
    shots: str = "0,1,2,4,8,16",
    seeds: int = 3,
    labels: int = 4,
    symbols: str | None = None,
    batch_size: int = 16,
    out: Path | None = None,
    json: Annotated[Json, Parameter(name="--json")] = False,
) -> None:
    """Tell task recognition (TR) from task learning (TL), by changing the demonstrations' labels.

    Every episode stays within one question and a closed set of labels, each demonstrated equally often. With random
    labels the model can only recognise the task; with symbols in place of labels it has to learn which is which; with
    flipped labels the two pull apart. Accuracies are printed with 95 % intervals, beside the best guess that needs no
    input, with the share of wrong answers that are copies. Where a synthetic task has a text-only twin, both are read.

    Where the pool asks several questions, the modality reliance is measured too: what blurring the query's image costs,
    against asking another question.

    The bundled model, and its control without binding:

        probe task-split
        probe task-split --model toy-no-binding

    Your own checkpoint and data:

        probe task-split --model ~/models/Qwen2.5-VL-7B-Instruct --data ~/vqav2 --format vqav2 --labels 3

    Parameters
    ----------
    source
        Which model reads which examples; --episodes is for each seed. Synthetic: vqa, recognition, operator, describe
        and their twins; the default is recognition.
    shots
        Numbers of demonstrations, with commas.
    seeds
        How many seeds, from --seed on; their spread is shown.
    labels
        At most so many of the commonest answers to a question are its labels.
    symbols
        What labels become, with commas; single tokens of the model. The default is @,#,$,… and for synthetic tasks
        their nonce words.
    batch_size
        Episodes in one forward; lower it if memory runs out.
    out
        The run directory; the default is a name under probe-runs/ made from the settings.
    json
        Print the summary as JSON and nothing else.
    """
    source = source or SplitSource()
    source.check()
    numbers = parse_shots(shots)
    if seeds < 1 or labels < 2 or batch_size < 1:
        raise UsageError(
            f"--seeds and --batch-size must be 1 or more, --labels 2 or more; got {seeds}, {batch_size} and {labels}."
        )

    from probe.cli.report import Reporter

    reporter = Reporter(quiet=json)
    with reporter.step("reading the examples"):
        from probe.data.manifest import episodes_key

        meaningless = choose_symbols(source, symbols)
        shown = read_episodes(source, max(numbers), seeds, labels)
        rests = read_reliance_episodes(source)
        content = {name: episodes_key(episodes) for name, episodes in shown.items()}
    from probe.cli.running import experiment_run

    settings = {
        "episodes_keys": content,
        "reliance_key": None if isinstance(rests, str) else episodes_key(rests),
        "shots": numbers,
        "seeds": seeds,
        "symbols": list(meaningless),
    }
    with experiment_run(reporter, source, out, "task_split", settings) as (run, located):
        reused = run.finished
        if not reused:
            _compute(run, source, shown, rests, numbers, meaningless, located, batch_size, reporter)
        result = run.result()

        from probe.cli.split_report import show

        with reporter.step("drawing"):
            draw(result, run.path(PICTURE))
        show(reporter, result, run.directory, run.path(PICTURE), reused=reused)


def parse_shots(text: str) -> list[int]:
    """Read numbers of shots: ``0,1,2``.

    >>> parse_shots("4, 0,4")
    [0, 4]
    """
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = [-1]
    if numbers[0] < 0:
        raise UsageError(f"--shots {text!r} is not a list of numbers of demonstrations; write 0,1,2,4.")
    return numbers


def choose_symbols(source: Material, symbols: str | None) -> tuple[str, ...]:
    """What labels become."""
    from probe.data.changes import SYMBOLS
    from probe.data.words import NONCE

    if symbols is None:
        return SYMBOLS if source.data is not None else NONCE
    chosen = tuple(dict.fromkeys(part.strip() for part in symbols.split(",") if part.strip()))
    if len(chosen) < 2:
        raise UsageError(f"--symbols {symbols!r} gives fewer than two; write @,#,$.")
    return chosen


def read_episodes(source: Material, shots: int, seeds: int, labels: int) -> dict[str, list[Episode]]:
    """Labelled episodes of all seeds, by how they are shown: ``images``, and ``words`` for a twin."""
    from probe.data.groups import labelled_episodes

    shown: dict[str, list[Episode]] = {}
    for number, seed in enumerate(range(source.seed, source.seed + seeds)):
        for name, (pool, queries) in _pools(source, seed).items():
            # No query is asked by two seeds: intervals take episodes for independent.
            asked = (queries or pool)[number::seeds] if source.data is not None else queries
            shown.setdefault(name, []).extend(
                labelled_episodes(pool, asked, shots=shots, n=source.episodes, seed=seed, labels=labels)
            )
    return shown


def read_reliance_episodes(source: Material) -> list[Episode] | str:
    """Episodes with demonstrations at random, for the modality reliance; or why there are none."""
    from probe.data.choose import choose
    from probe.data.perturb import perturb
    from probe.experiments.reliance import READINGS

    pools = _pools(source, source.seed)
    if "images" not in pools:
        return "it needs images"
    pool, queries = pools["images"]
    if len({example.question for example in pool}) < 2:
        return "all questions are the same"
    try:
        episodes = choose(pool, queries, shots=RELIANCE_SHOTS, n=source.episodes, seed=source.seed)
        if not all(episode.query.images for episode in episodes):
            return "it needs images"
        perturb(episodes, READINGS["other-question"], seed=source.seed, pool=pool)  # found now, not after the rest
    except UsageError as error:
        return str(error)
    return episodes


def _pools(source: Material, seed: int) -> dict[str, tuple[list[Example], list[Example] | None]]:
    if source.data is not None:
        return {"images": _read_once(source)}
    from probe.data.tasks import TASKS, TEXT_SUFFIX, synthetic_examples

    task = source.task or source.default_task
    if task.endswith(TEXT_SUFFIX):
        return {"words": (synthetic_examples(task, n=POOL, seed=seed), None)}
    tasks = {"images": task}
    if task + TEXT_SUFFIX in TASKS:
        tasks["words"] = task + TEXT_SUFFIX
    return {name: (synthetic_examples(each, n=POOL, seed=seed), None) for name, each in tasks.items()}


@cache  # for every seed the same, and large
def _read_once(source: Material) -> tuple[list[Example], list[Example] | None]:
    return source.read_data()


def _compute(
    run: Run,
    source: Material,
    shown: dict[str, list[Episode]],
    rests: list[Episode] | str,
    shots: list[int],
    symbols: Sequence[str],
    located: Located,
    batch_size: int,
    reporter: Reporter,
) -> None:
    """Do the work of a run that is not finished."""
    import xarray as xr

    from probe.cli.running import finish, load_model, manifest
    from probe.experiments import task_split as experiment

    with reporter.step("loading the model"):
        model = load_model(source, located)
    everything = [replace(e, id=f"{name}-{e.id}") for name, episodes in shown.items() for e in episodes]
    n = experiment.n_readings(len(everything), tuple(experiment.SETTINGS), shots)
    parts, done = [], 0
    with manifest(run, model, everything), reporter.progress("reading episodes", n) as progress:
        for name, episodes in shown.items():
            part = experiment.task_split(
                model,
                episodes,
                shots=shots,
                symbols=symbols,
                seed=source.seed,
                batch_size=batch_size,
                keep=lambda unit, compute, name=name: run.part(f"{name}-{unit}", compute),  # type: ignore[misc]
                progress=lambda now, before=done: progress(before + now),  # type: ignore[misc]
            )
            done += experiment.n_readings(len(episodes), tuple(experiment.SETTINGS), shots)
            parts.append(part)
            progress(done)
        result = xr.concat(parts, xr.Variable("shown", list(shown)), join="override", combine_attrs="override")
        if isinstance(rests, str):
            result.attrs["no_reliance"] = rests
        else:
            result = result.merge(_reliance(run, source, rests, model, batch_size))
    finish(run, source, result)


def _reliance(run: Run, source: Material, episodes: list[Episode], model: Model, batch_size: int) -> xr.Dataset:
    """What the answers rest on, on dimensions of its own."""
    from probe.experiments.reliance import modality_reliance

    found = modality_reliance(
        model,
        episodes,
        pool=_pools(source, source.seed)["images"][0],
        seed=source.seed,
        batch_size=batch_size,
        keep=lambda unit, compute: run.part(f"reliance-{unit}", compute),
    )
    scores = found["score"].drop_vars([name for name in found.coords if name not in ("reading", "episode")])
    return scores.rename(episode="reliance_episode").to_dataset(name="reliance_score")


def draw(result: xr.Dataset, path: Path) -> None:
    """Write the picture of a result."""
    from probe.plots.page import write_page
    from probe.plots.task_split import plot_task_split

    figures = [
        (
            "Recognition and learning",
            "Accuracy with right, random, abstract and flipped labels by the number of demonstrations; what is left of "
            "it beyond guessing; and how often the answer is one of the labels, or a copy.",
            plot_task_split(result),
        )
    ]
    write_page(path, result, figures, title="Task recognition and task learning")
