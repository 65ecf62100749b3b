"""``probe copy-rate``: how often a model answers what a demonstration answers, strategy by strategy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from cyclopts import Parameter

from probe.cli.choosing import Candidates, Choice, choose_episodes
from probe.cli.options import Json, Source
from probe.errors import UsageError

if TYPE_CHECKING:
    import xarray as xr

    from probe.cli.report import Reporter
    from probe.models.model import Model
    from probe.models.names import Located
    from probe.store import Run

PICTURE = "copy_rate.html"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CopySource(Source):
    """Which model reads which examples."""

    episodes: int = 100
    default_task: ClassVar[str] = "vqa"


def copy_rate(
    source: CopySource | None = None,
    choice: Choice | None = None,
    *,
    counterfactual: bool = True,
    sweep: Annotated[bool, Parameter(negative=())] = False,
    batch_size: int = 16,
    out: Path | None = None,
    json: Annotated[Json, Parameter(name="--json")] = False,
) -> None:
    """Measure how often the model answers what a demonstration answers, and whether it does so because of it.

    The raw copy rate (CR) cannot be read alone: a model that is right looks like a copier wherever the right answer is
    shown. So beside it stand how often that is, a permutation null where demonstrations are random, harmful copying
    (wrong, and a demonstration's answer) and counterfactual copying (a planted wrong answer that is given because it is
    there), all with 95 % intervals. The published copy rates of OpenFlamingo are shown for comparison.

    The bundled model, on a pool of synthetic questions:

        probe copy-rate

    Your own checkpoint on VQAv2, images compared by CLIP and questions by their words:

        probe copy-rate --model ~/models/Qwen2.5-VL-7B --data ~/vqav2 --format vqav2 --episodes 1000
        --image-encoder openai/clip-vit-base-patch32 --text-encoder tfidf

    Episodes as a synthetic task draws them:

        probe copy-rate --task binding-cued --shots 8

    Parameters
    ----------
    source
        Which model reads which examples. A synthetic task whose examples only mean something together (all but vqa and
        describe) gives whole episodes, and --choose does not apply.
    choice
        How demonstrations are chosen.
    counterfactual
        Read every episode a second time, with a wrong answer planted in one demonstration.
    sweep
        Also plant a wrong answer in 0, 1, … demonstrations that are more and less like the query: by image, or by
        question where there are no images.
    batch_size
        Episodes in one forward; lower it if memory runs out.
    out
        The run directory; the default is a name under probe-runs/ made from the settings.
    json
        Print the summary as JSON and nothing else.
    """
    source, choice = source or CopySource(), choice or Choice()
    source.check()
    if sweep and choice.perturbations:
        raise UsageError("--sweep plants answers in plain episodes; leave out --perturb, or --sweep.")
    if source.shots < 1 or batch_size < 1:
        raise UsageError(f"--shots and --batch-size must be 1 or more here; got {source.shots} and {batch_size}.")
    strategies, changes = choice.strategies, choice.perturbations

    from probe.cli.report import Reporter

    reporter = Reporter(quiet=json)
    with reporter.step("reading the examples"):
        from probe.cli.choosing import identify, read_material

        material = read_material(source, choice)
        if sweep and material.episodes is not None:
            raise UsageError(f"--sweep needs a pool to choose from, which {source.task} has not; leave it out.")
    from probe.cli.running import experiment_run

    settings = {
        **material.describe(),
        "n_episodes": source.episodes,
        "strategies": strategies,
        "order": choice.order,
        "distinct_images": choice.distinct_images,
        "encoders": {name: identify(name) for name in (choice.image_encoder, choice.text_encoder)},
        "image_encoder": choice.image_encoder,
        "text_encoder": choice.text_encoder,
        "first_round": choice.first_round if "SQPA" in strategies else None,
        "perturb": changes,
        "counterfactual": counterfactual,
        "sweep": sweep,
    }
    with experiment_run(reporter, source, out, "copy_rate", settings) as (run, located):
        reused = run.finished
        if not reused:
            _compute(run, source, choice, material, located, counterfactual, sweep, batch_size, reporter)
        result = run.result()

        from probe.cli.copy_report import show
        from probe.measures.copy_summary import summarise_copying

        with reporter.step("drawing"):
            summary = summarise_copying(result)
            draw(result, run.path(PICTURE))
        show(reporter, result, summary, run.directory, run.path(PICTURE), reused=reused)


# ---------------------------------------------------------------------------------------------------------- the work


def _compute(
    run: Run,
    source: Source,
    choice: Choice,
    material: Candidates,
    located: Located,
    counterfactual: bool,
    sweep: bool,
    batch_size: int,
    reporter: Reporter,
) -> None:
    """Do the work of a run that is not finished."""
    from probe.cli.running import finish, load_model, manifest
    from probe.experiments import copy_rate as experiment

    with reporter.step("loading the model"):
        model = load_model(source, located)
    with reporter.step("choosing demonstrations"):
        episodes = choose_episodes(source, choice, material, model, run, batch_size)
    n = experiment.n_readings(episodes, counterfactual=counterfactual)
    with manifest(run, model, episodes), reporter.progress("reading episodes", n) as progress:
        result = experiment.copy_rate(
            model,
            episodes,
            pool=material.pool or None,
            counterfactual=counterfactual,
            seed=source.seed,
            batch_size=batch_size,
            keep=run.part,
            progress=progress,
        )
        progress(n)
    if sweep:
        found = _sweep(run, source, choice, material, model, batch_size, reporter)
        result = result.merge(found.drop_attrs()).assign_attrs({**result.attrs, **found.attrs})
    asked = material.episodes or material.queries or material.pool
    result.attrs |= {"order": choice.order, "image_encoder": choice.image_encoder, "text_encoder": choice.text_encoder}
    finish(run, source, result.assign_attrs(n_queries=min(source.episodes, len(asked))))


def _sweep(
    run: Run,
    source: Source,
    choice: Choice,
    material: Candidates,
    model: Model,
    batch_size: int,
    reporter: Reporter,
) -> xr.Dataset:
    """The sweep over likeness and repetition, on dimensions of its own."""
    from probe.cli.choosing import encoders_for
    from probe.experiments.copy_sweep import LEVELS, copy_sweep
    from probe.models.spaces import embed

    pool, queries = material.pool, material.queries
    strategy = "SI" if all(example.images for example in (*pool, *(queries or ()))) else "SQ"
    images, texts = encoders_for(choice, pool, [strategy], model, batch_size)
    [space] = embed(pool, queries, strategies=[strategy], images=images, texts=texts).values()
    n = len(LEVELS) * (source.shots + 1) * min(source.episodes, len(queries or pool))
    with reporter.progress("planting wrong answers", n) as progress:
        found = copy_sweep(
            model,
            pool,
            queries,
            space=space,
            shots=source.shots,
            n=source.episodes,
            seed=source.seed,
            batch_size=batch_size,
            keep=lambda unit, compute: run.part(f"sweep-{unit}", compute),
            progress=progress,
        )
    found = found.rename({name: f"sweep_{name}" for name in (*found.data_vars, "query")})
    kept = {"encoder": space.encoder, "sweep_n_attempted": found.attrs["n_attempted"]}
    return found.rename(episode="sweep_episode").drop_attrs().assign_attrs(kept)


def draw(result: xr.Dataset, path: Path) -> None:
    """Write the picture of a result."""
    from probe.plots.copy_rate import plot_copy_rate
    from probe.plots.page import write_page

    figures = [
        (
            "What is copied",
            "The copy rate beside what it has to be read with: how often the right answer was there to be copied, "
            "copying that was wrong, and copying that was caused by planting an answer.",
            plot_copy_rate(result),
        )
    ]
    if "sweep_said_planted" in result:
        from probe.plots.copy_sweep import plot_copy_sweep

        figures.append(
            (
                "Likeness and repetition",
                "How often a wrong answer is given that was planted in so many of the demonstrations, by how like they "
                "are to the query.",
                plot_copy_sweep(result),
            )
        )
    write_page(path, result, figures, title="Copy rate")
