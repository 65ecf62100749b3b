"""Judge the finder of heads on the bundled model, whose card says what removing each head does.

    python analyses/head_bars.py [--model DIR --evaluation FILE] [--episodes 200] [--seed 1]

The card's effects are changes of accuracy when a head's output is set to zero by a plain torch hook, on other episodes.
The finder's are losses of log p(answer) when nnsight replaces the head by its mean. Both are averaged over cued and
uncued binding. Asked for: a rank correlation of 0.7 over all heads, and the card's three most effective heads among the
finder's first five. Intervals are percentiles of resampled episodes of the finder; the card is taken as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

import probe
from probe.experiments.head_effects import head_effects
from probe.experiments.head_scores import head_scores

CARD = Path(probe.__file__).parent / "toy" / "evaluations" / "toy.json"
TASKS = ("binding-cued", "binding-uncued")
SHOTS = 8
RESAMPLES = 2000


def card_effects(path: Path, places: list[str]) -> np.ndarray:
    """Loss of accuracy by head, averaged over the tasks."""
    cells = {cell["task"]: cell for cell in json.loads(path.read_text())["heads"]}
    rows = []
    for task in TASKS:
        effects = [cells[task]["effects"][place] for place in places]
        rows.append([(effect["lost"] - effect["gained"]) / cells[task]["n"] for effect in effects])
    return np.mean(rows, 0)


def correlation(values: np.ndarray, truth: np.ndarray) -> float:
    return float(spearmanr(values, truth).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the finder of heads against the card of the bundled model.")
    parser.add_argument("--model", default="toy", help="the bundled model, or the directory of another training seed")
    parser.add_argument("--evaluation", type=Path, default=CARD, help="its evaluation, with the effects of all heads")
    parser.add_argument("--episodes", type=int, default=200, help="of each task")
    parser.add_argument("--seed", type=int, default=1, help="of the episodes; report on one that was not used before")
    given = parser.parse_args()
    model = probe.load(given.model)
    places = [f"{layer}.{head}" for layer in range(model.n_layers) for head in range(model.n_heads)]
    truth = card_effects(given.evaluation, places)
    found, others = [], {}
    for task in TASKS:
        episodes = probe.synthetic_episodes(task, shots=SHOTS, n=given.episodes, seed=given.seed)
        found.append(head_effects(model, episodes, function_vectors=False)["ablation"].values.reshape(-1, len(places)))
        scores = head_scores(model, episodes, seed=given.seed)
        for name in ("label_matching", "task_learning"):
            others.setdefault(name, []).append(scores[name].mean("episode").values.ravel())
    values = np.mean([part.mean(0) for part in found], 0)
    rng = np.random.default_rng(0)
    drawn, within = [], []
    top = set(np.argsort(-truth)[:3].tolist())
    for _ in range(RESAMPLES):
        sample = np.mean([part[rng.integers(len(part), size=len(part))].mean(0) for part in found], 0)
        drawn.append(correlation(sample, truth))
        within.append(top <= set(np.argsort(-sample)[:5].tolist()))
    low, high = np.quantile(drawn, [0.025, 0.975])
    estimate = correlation(values, truth)
    first = [places[i] for i in np.argsort(-values)[:5]]
    best = [places[i] for i in np.argsort(-truth)[:3]]
    print(f"model {given.model}; {', '.join(TASKS)}: {given.episodes} episodes each, {SHOTS} shots, seed {given.seed}")
    met = "met" if low >= 0.7 else "missed"
    print(f"rank correlation with the card, ablation: {estimate:.3f} [{low:.3f}, {high:.3f}], bar >= 0.7: {met}")
    met = "met" if set(best) <= set(first) else "missed"
    print(
        f"the card's first three {', '.join(best)} among the finder's first five {', '.join(first)}: {met} (in "
        f"{np.mean(within):.1%} of resamples)"
    )
    for name, parts in others.items():
        print(f"for comparison, {name}: {correlation(np.mean(parts, 0), truth):.3f}")


if __name__ == "__main__":
    main()
