"""What a fitted shift recovers without a gradient, and what it is worth as a start.

    python analyses/fitted_bars.py [--seed 7111] [--queries 200]

For every operator: the fitted shift; MimIC trained for three epochs from it and from nothing; MimIC trained for twenty.
Training seed and the seed after it, for the queries, were not used in development (100 to 111 were).
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import xarray as xr

import probe
from probe.experiments.compare import compare
from probe.experiments.ways import Way, ways_for
from probe.measures.vector_summary import summarise_vectors
from probe.vectors.fitted import FittedShift
from probe.vectors.mimic import Mimic
from probe.vectors.teacher import Teacher
from probe.vectors.training import Training

SHOTS, EPISODES, SPEED = 8, 160, 4.0


def measure(model: probe.Model, task: str, seed: int, queries: int) -> xr.Dataset:
    """Fit and train the vectors of one task and let them answer."""
    episodes = probe.synthetic_episodes(task, shots=SHOTS, n=EPISODES, seed=seed)
    teacher = Teacher(model)
    few, many = (Training(epochs=n, batch_size=32, speed=SPEED) for n in (3, 20))
    start = time.perf_counter()
    fitted = FittedShift().fit(model, episodes, training=many)
    print(f"{task}: fitted in {time.perf_counter() - start:.0f} s", flush=True)
    vectors = {
        "fitted shift": fitted,
        "MimIC from it, 3 epochs": Mimic().fit(model, episodes, training=few, teacher=teacher, begin=fitted),
        "MimIC, 3 epochs": Mimic().fit(model, episodes, training=few, teacher=teacher),
        "MimIC from it, 20 epochs": Mimic().fit(model, episodes, training=many, teacher=teacher, begin=fitted),
        "MimIC, 20 epochs": Mimic().fit(model, episodes, training=many, teacher=teacher),
    }
    ways = [*ways_for(vectors, random=0), Way("fitted shift, twice", fitted, scale=2.0)]
    asked = probe.synthetic_episodes(task, shots=SHOTS, n=queries, seed=seed + 1)
    return compare(model, asked, ways, distances=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a fitted shift recovers on the operators of the bundled model.")
    parser.add_argument("--seed", type=int, default=7111)
    parser.add_argument("--queries", type=int, default=200, help="of each operator")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model = probe.load("toy")
    tasks = [f"operator:{k}" for k in range(1, 6)]
    results = {task: measure(model, task, given.seed, given.queries) for task in tasks}
    together = xr.concat(
        list(results.values()), "episode", data_vars="minimal", coords="minimal", compat="override", join="exact"
    )
    print(f"\n{SHOTS} shots, {EPISODES} episodes of seed {given.seed}, queries of seed {given.seed + 1}")
    for name, result in {**results, "all": together}.items():
        summary = summarise_vectors(result, distances=False)
        print(f"\n{name}, n = {result.sizes['episode']}")
        for label in result["way"].values.tolist():
            row = summary.sel(way=label)
            shares = (row[part].values for part in ("accuracy", "recovered"))
            print(f"{label:26}" + "   ".join(f"{x:.3f} [{low:.3f}, {high:.3f}]" for x, low, high in shares))


if __name__ == "__main__":
    main()
