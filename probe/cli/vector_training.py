"""Finding vectors, for ``probe vector train`` and ``probe vector fit``: one after the other, each kept when done."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from probe.cli.vector_options import TASK, VECTORS, Learning, Lessons, Several, parse_methods, parse_numbers
from probe.errors import UsageError

if TYPE_CHECKING:
    import xarray as xr

    from probe.cli.report import Reporter
    from probe.data.example import Episode
    from probe.models.names import Located
    from probe.store import Run
    from probe.vectors.method import Method
    from probe.vectors.training import Training
    from probe.vectors.vector import InContextVector

STATES = "training"
"""Where a run keeps the state of a training that is not done."""

PICTURE = "training.html"


@dataclass(frozen=True)
class Job:
    """One vector to find."""

    method: Method
    shots: int
    episodes: int
    seed: int

    @property
    def name(self) -> str:
        """Of its directory, and in tables."""
        what = re.sub(r"[^A-Za-z0-9._-]", "-", self.method.label.replace(" ", "_"))
        return f"{what}.{self.shots}shot.{self.episodes}ep.seed{self.seed}"


def find(
    source: Lessons,
    learning: Learning,
    several: Several,
    *,
    method: str,
    out: Path | None,
    json: bool,
    gradients: bool,
) -> None:
    """Find vectors; the commands `train` and `fit` say what for."""
    source.check()
    methods = parse_methods(method)
    from probe.vectors.method import Trained

    if not gradients and (wrong := [each.name for each in methods if isinstance(each, Trained)]):
        raise UsageError(f"{', '.join(wrong)} is found by gradient descent; use probe vector train.")
    all_shots, all_seeds = parse_numbers("--shots", several.shots, 1), parse_numbers("--seeds", several.seeds, 0)
    counts = [source.episodes] if several.sizes is None else parse_numbers("--sizes", several.sizes, 2)
    if max(counts) > source.episodes:
        raise UsageError(f"--sizes asks for {max(counts)} episodes of {source.episodes}; raise --episodes.")
    jobs = [Job(each, k, n, seed) for k in all_shots for n in counts for seed in all_seeds for each in methods]
    for job in jobs:
        learning.of(job.method, source.model, job.seed)  # refuses numbers that are out of range

    from probe.cli.report import Reporter

    reporter = Reporter(quiet=json)
    with reporter.step("reading the episodes"):
        from probe.data.manifest import episodes_key

        episodes = {k: source.read(k) for k in all_shots}
        content = [episodes_key(some) for some in episodes.values()]
        there = min(len(some) for some in episodes.values())  # data may hold fewer examples than were asked for
        if several.sizes is not None and max(counts) > there:
            raise UsageError(f"--sizes asks for {max(counts)} episodes; the data give {there}.")
        jobs = [replace(job, episodes=min(job.episodes, there)) for job in jobs]
    from probe.cli.running import experiment_run

    settings = {
        "task": source.task or (None if source.data else TASK),
        "episodes_key": content,
        "jobs": [job.name for job in jobs],
        **asdict(learning),
    }
    with experiment_run(reporter, source, out, "vector", settings) as (run, located):
        reused = run.finished
        if not reused:
            _find(run, source, located, learning, episodes, jobs, reporter)
        from probe.cli.training_report import show_training
        from probe.plots.page import write_page
        from probe.plots.training import plot_training

        result, picture = run.result(), run.path(PICTURE)
        if "validation" in result:
            with reporter.step("drawing"):
                figures = [("Training", "The loss on the episodes that validate.", plot_training(result))]
                write_page(picture, result, figures, title="Training of vectors")
        show_training(reporter, result, run.directory, picture, reused=reused)


def _find(
    run: Run,
    source: Lessons,
    located: Located,
    learning: Learning,
    episodes: dict[int, list[Episode]],
    jobs: list[Job],
    reporter: Reporter,
) -> None:
    """Do the work of a run that is not finished."""
    import xarray as xr

    from probe.cli.running import finish, load_model, manifest
    from probe.experiments.answering import facts, within_memory
    from probe.vectors.method import Trained
    from probe.vectors.teacher import Teacher

    with reporter.step("loading the model"):
        model = load_model(source, located)
    teacher = Teacher(model)
    found = []
    with manifest(run, model, episodes[max(episodes)]):
        for number, job in enumerate(jobs):
            some = episodes[job.shots][: job.episodes]
            training = learning.of(job.method, source.model, job.seed)
            n = training.epochs * -(-(len(some) - round(training.validation * len(some))) // training.batch_size)

            def compute(
                job: Job = job, some: list[Episode] = some, training: Training = training, n: int = n, at: int = number
            ) -> xr.Dataset:
                size = training.batch_size
                if isinstance(job.method, Trained):  # others read their episodes themselves
                    goal, title = job.method.objective, "reading demonstrations"
                    title = title if goal.kl or goal.align else "encoding queries"
                    with reporter.progress(title, len(some)) as progress, within_memory(model, size):
                        teacher.lessons(some, goal.site, logits=goal.kl > 0, batch_size=size, progress=progress)
                title = f"{job.name} ({at + 1} of {len(jobs)})"
                with reporter.progress(title, n) as progress, within_memory(model, size):
                    vector = job.method.fit(
                        model,
                        some,
                        training=training,
                        teacher=teacher,
                        directory=run.path(STATES) / job.name,
                        progress=lambda done, total: progress(round(n * done / total)),
                    )
                vector.save(run.path(VECTORS) / job.name)
                return _curve(job, vector)

            found.append(run.part(f"{number:04d}-{job.name}", compute))
    result = xr.concat(found, "vector", data_vars="all", coords="different", compat="equals", join="outer")
    result.attrs = {
        **facts(model),
        "experiment": "vector",
        "n_done": max(map(len, episodes.values())),
        "teacher": str(teacher),
    }
    finish(run, source, result)

    shutil.rmtree(run.path(STATES), ignore_errors=True)


def _curve(job: Job, vector: InContextVector) -> xr.Dataset:
    """How training went, one row of the run's result."""
    import numpy as np
    import xarray as xr

    curve = vector.card.get("curve", [])
    values = {
        name: (("vector", "epoch"), np.array([[point.get(name, np.nan) for point in curve]], dtype=float))
        for name in ("loss", "validation")
    }
    return xr.Dataset(
        values,
        coords={
            "vector": [job.name],
            "epoch": np.arange(1, len(curve) + 1),
            "method": ("vector", [job.method.label]),
            "shots": ("vector", [job.shots]),
            "training_episodes": ("vector", [job.episodes]),
            "training_seed": ("vector", [job.seed]),
            "n_parameters": ("vector", [vector.n_parameters]),
            "best_epoch": ("vector", [vector.card.get("best_epoch", 0)]),
        },
    )
