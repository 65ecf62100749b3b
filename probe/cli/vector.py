"""``probe vector``: find vectors that stand for demonstrations, put them into a model, compare them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from probe.cli.options import Json
from probe.cli.vector_options import Learning, Lessons, Placing, Queries, Several, load_vectors, same_task
from probe.errors import UsageError

if TYPE_CHECKING:
    import xarray as xr

    from probe.data.example import Episode
    from probe.experiments.ways import Way
    from probe.models.model import Model

JsonOption = Annotated[Json, Parameter(name="--json")]

app = App(name="vector", help="Vectors in place of demonstrations: fit, train, put into a model, compare.")


@app.command
def train(
    source: Lessons | None = None,
    learning: Learning | None = None,
    several: Several | None = None,
    *,
    method: str = "live,mimic,m2iv",
    out: Path | None = None,
    json: JsonOption = False,
) -> None:
    """Train vectors that stand for demonstrations; the model stays as it is.

    A teacher reads the demonstrations, a student the query alone with the vector in it. The same command goes on where
    it stopped.

    The bundled model, on a task whose rule is hidden (count + 3), learned from eight demonstrations:

        probe vector train --task operator:3

    Several seeds, numbers of demonstrations and of training episodes in one go; MimIC with one mu for a layer, and LIVE
    without a teacher:

        probe vector train --seeds 0,1,2 --shots 2,8 --sizes 40,160,320
        probe vector train --method mimic,mimic:size=shared,live:kl=0

    Without a teacher: virtual keys and values in every head, states behind examples, and the baseline in weight space:

        probe vector train --method hificl,i2cl,lora

    Parameters
    ----------
    source
        Which model learns from which episodes.
    learning
        How.
    several
        How many in one go.
    method
        live, mimic, m2iv, hificl, i2cl, lora; several with commas. Options stand behind colons:
        live:site=mlp_output:alpha=0.1:kl=1:ce=0.5,
        mimic:size=head|shared|constant:align_site=mlp_output|attention_output|layer_output:align=1:ce=0.5:kl=0,
        m2iv:kl=1:synergy=0.1:ce=0.5:off_diagonal=0.005, hificl:pairs=8:rank_k=8:rank_v=8:merge=true:kl=0,
        i2cl:strength=0.1, lora:rank=16:alpha=32:where=text|everywhere:kl=0. With released=true, live and mimic train as
        their released codes do. What `probe vector fit` finds can be found along with them.
    out
        The run directory; the default is a name under probe-runs/ made from the settings.
    json
        Print the summary as JSON and nothing else.
    """
    from probe.cli.vector_training import find

    given = source or Lessons(), learning or Learning(), several or Several()
    find(*given, method=method, out=out, json=json, gradients=True)


@app.command
def fit(
    source: Lessons | None = None,
    learning: Learning | None = None,
    several: Several | None = None,
    *,
    method: str = "fitted-shift,mean-difference,task-vector",
    out: Path | None = None,
    json: JsonOption = False,
) -> None:
    """Fit vectors to what demonstrations do, without a gradient.

    `fitted-shift` fits to every head the shift of its attention: its direction by least squares, its size by ridge
    regression on the query. In one layer, at the position that predicts the answer: `mean-difference` adds what
    demonstrations change there on average, `task-vector` (TV) puts the mean state with demonstrations in its place, and
    `function-vector` (FV) adds what the heads with the largest causal effects write on average. `icv` turns the outputs
    of all MLPs towards what demonstrations change in all layers, and `mtv` lets some heads write their mean.

    FV takes one forward of 25 prompts for every head of the model, and MTV 600 forwards of 32; they have to be asked
    for.

        probe vector fit --task operator:3
        probe vector fit --task operator:3 --method function-vector:heads=10,icv,mtv

    Parameters
    ----------
    source
        Which model reads which episodes.
    learning
        Of this, batches and the share of the episodes that validate.
    several
        How many in one go.
    method
        fitted-shift, mean-difference, task-vector, function-vector, icv, mtv; several with commas, options behind
        colons (mean-difference:layer=2, function-vector:heads=10:prompts=25, icv:strength=0.1,
        mtv:steps=600:samples=32).
    out
        The run directory; the default is a name under probe-runs/ made from the settings.
    json
        Print the summary as JSON and nothing else.
    """
    from probe.cli.vector_training import find

    given = source or Lessons(), learning or Learning(), several or Several()
    find(*given, method=method, out=out, json=json, gradients=False)


@app.command
def apply(
    vector: Path,
    /,
    source: Queries | None = None,
    placing: Placing | None = None,
    *,
    shown: Annotated[bool, Parameter(negative=())] = False,
    batch_size: int = 16,
    out: Path | None = None,
    json: JsonOption = False,
) -> None:
    """Answer queries with a vector in the model, in place of demonstrations.

    As it is, or in two layers at half its strength:

        probe vector apply probe-runs/…/vectors/mimic.8shot.320ep.seed0
        probe vector apply DIR --layers 2:4 --scale 0.5

    Parameters
    ----------
    vector
        Its directory, with vector.safetensors and card.json.
    source
        Which model answers which queries; the default is the task that the vector was fitted on.
    placing
        Where the vector acts.
    shown
        Show the demonstrations too.
    batch_size
        Episodes in one forward.
    out
        The run directory; the default is a name under probe-runs/ made from the settings.
    json
        Print the summary as JSON and nothing else.
    """
    source, placing = source or Queries(), placing or Placing()
    options = placing.options()

    from probe.cli.report import Reporter

    reporter = Reporter(quiet=json)
    with reporter.step("reading the vector and the episodes"):
        from probe.data.manifest import episodes_key
        from probe.experiments.compare import unseen
        from probe.vectors.pairs import alone

        vectors = load_vectors((vector,))
        if len(vectors) != 1:
            raise UsageError(
                f"{vector} holds {len(vectors)} vectors ({', '.join(vectors)}); name the directory of one, or compare "
                "them all (probe vector compare)."
            )
        (label, own), source = next(iter(vectors.items())), same_task(source, vectors)
        asked = source.read_episodes()
        episodes = unseen(asked, [own])
        read = episodes if shown else [alone(episode) for episode in episodes]
        settings = {
            "episodes_key": episodes_key(read),
            "vector": own.identity,
            "shown": shown,
            **asdict(placing),
        }
    from probe.cli.running import experiment_run, finish, load_model, manifest

    with experiment_run(reporter, source, out, "vector_apply", settings) as (run, located):
        reused = run.finished
        if not reused:
            from probe.experiments.answering import answering
            from probe.trace.steer import inject

            with reporter.step("loading the model"):
                model = load_model(source, located)
                steered = inject(model, own, **options)
            with manifest(run, model, read), reporter.progress("answering", 2 * len(read)) as progress:
                result = answering(
                    steered,
                    read,
                    probable="gold",
                    batch_size=batch_size,
                    keep=run.part,
                    name="with-",
                    progress=progress,
                )
                plain = answering(
                    model,
                    read,
                    probable="gold",
                    batch_size=batch_size,
                    keep=run.part,
                    name="without-",
                    progress=lambda done: progress(len(read) + done),
                )
            for name in ("prediction", "correct", "score", "log_probability"):
                result[f"{name}_without"] = plain[name]
            about = {"experiment": "vector_apply", "vector": label, "n_left_out": len(asked) - len(read)}
            result.attrs |= {**about, **asdict(placing)}
            finish(run, source, result)
        from probe.cli.training_report import show_application

        show_application(reporter, run.result(), run.directory, reused=reused)


@app.command
def compare(
    vectors: tuple[Path, ...] = (),
    /,
    source: Queries | None = None,
    *,
    random: int = 1,
    put_back: Annotated[bool, Parameter(negative=())] = False,
    oracle: Annotated[bool, Parameter(negative=())] = False,
    parts: str | None = None,
    cost: Annotated[bool, Parameter(negative=())] = False,
    distances: int = 128,
    batch_size: int = 16,
    out: Path | None = None,
    json: JsonOption = False,
) -> None:
    """Compare vectors with demonstrations, with nothing, and with random vectors of their size, on the same queries.

    All that a training found, and the same with demonstrations put back:

        probe vector compare probe-runs/vector-toy-operator-3-…
        probe vector compare RUN --put-back --random 3

    One vector layer by layer, or at some positions only:

        probe vector compare RUN/vectors/mimic.8shot.320ep.seed0 --parts layers
        probe vector compare RUN/vectors/mimic.8shot.320ep.seed0 --parts rows

    Parameters
    ----------
    vectors
        Directories of vectors, or of runs that found some.
    source
        Which model answers which queries; the default is the task that the vectors were fitted on.
    random
        How many random vectors of the same size beside each.
    put_back
        Each vector with the demonstrations shown again, too.
    oracle
        Add the oracle, each query's own shift of attention, and what is left of it when its size or direction is the
        same for all queries, or comes from images or text alone.
    parts
        Parts of each vector by themselves: layers, heads, or rows (sink and template, the query's image and question,
        and the positions that answer).
    cost
        Measure the time to the first token and for each decoded one.
    distances
        For how many episodes to measure how far states are from those with demonstrations.
    batch_size
        Episodes in one forward.
    out
        The run directory; the default is a name under probe-runs/ made from the settings.
    json
        Print the summary as JSON and nothing else.
    """
    source = source or Queries()
    if random < 0 or distances < 0 or batch_size < 1:
        raise UsageError("--random and --distances must be 0 or more and --batch-size 1 or more.")

    from probe.cli.report import Reporter

    reporter = Reporter(quiet=json)
    with reporter.step("reading the vectors and the episodes"):
        from probe.cli.vector_ways import ways_of
        from probe.data.manifest import episodes_key

        found = load_vectors(vectors)
        source = same_task(source, found)
        episodes = source.read_episodes()
        ways = ways_of(found, random=random, put_back=put_back, parts=parts, seed=source.seed)
        settings = {
            "episodes_key": episodes_key(episodes),
            "ways": [way.identity for way in ways],
            "oracle": oracle,
            "distances": distances,
            "cost": cost,
        }
    from probe.cli.running import experiment_run, finish, load_model, manifest
    from probe.experiments import compare as experiment

    with experiment_run(reporter, source, out, "vector_compare", settings) as (run, located):
        reused = run.finished
        if not reused:
            with reporter.step("loading the model"):
                model = load_model(source, located)
            with manifest(run, model, episodes), reporter.progress("answering", len(episodes)) as progress:
                result = experiment.compare(
                    model,
                    episodes,
                    ways,
                    oracle=oracle,
                    distances=distances,
                    batch_size=batch_size,
                    keep=run.part,
                    progress=progress,
                )
            if cost:
                with reporter.step("measuring times"):
                    times = _times(model, episodes, ways, batch_size)
                result = result.merge(times, join="left").assign_attrs(result.attrs)
            finish(run, source, result)
        from probe.cli.vector_report import figures_of, show_comparison
        from probe.plots.page import write_page

        result, picture = run.result(), run.path("compare.html")
        with reporter.step("drawing"):
            write_page(picture, result, figures_of(result), title="In-context vectors")
        show_comparison(reporter, result, run.directory, picture, reused=reused)


def _times(model: Model, episodes: Sequence[Episode], ways: Sequence[Way], batch_size: int) -> xr.Dataset:
    """What answering costs in the ways that are worth timing: vectors as a whole, in place of demonstrations."""
    from probe.experiments.answering import units
    from probe.experiments.vector_cost import vector_cost

    timed = [way for way in ways if way.kind != "random" and way.whole and (not way.shown or way.vector is None)]
    return vector_cost(model, next(units(model, episodes, min(16, batch_size))), timed).drop_attrs()
