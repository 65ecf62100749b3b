"""The summary of ``probe linear-probe``: where each target can be read, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from probe.cli.report import Reporter, finite, table
from probe.measures.probe_summary import LEVEL, Peak, peaks, selectivity, summarise_probes

if TYPE_CHECKING:
    import xarray as xr

    from probe.stats import Interval

NOTE = (
    "Accuracy out of fold, with 95 % intervals over episodes; selectivity is accuracy - accuracy on the control task. "
    "The best layer is chosen on every other episode, and both are of the rest. The guess is the best that needs no "
    f"vector. Read at: layers where p <= {LEVEL:g} in a permutation test over all layers and positions of the target. "
    "A layer is the stream that enters its attention. That something can be read does not say that it is used: see "
    "probe knockout."
)


def show(reporter: Reporter, result: xr.Dataset, directory: Path, picture: Path, *, reused: bool) -> None:
    """Print the summary."""
    found = peaks(result)
    if reporter.quiet:
        paths = {"directory": str(directory), "picture": str(picture), "reused": reused}
        reporter.json({**result.attrs, "targets": _as_json(result, found), **paths})
        return
    more = [("probes", f"{result.attrs['folds']} folds, {result.attrs['permutations']} permutations")]
    reporter.facts(result, more, reused=reused)
    guesses = summarise_probes(result)["guess"]
    columns = ("position", "layer", "accuracy", "selectivity", "read at")
    for target in result["target"].values.tolist():
        cell = result.sel(target=target)
        made = table(
            f"{target}: {int(cell['n_labels'])} labels, guess {float(guesses.sel(target=target)):.3f}", columns
        )
        for peak in (peak for peak in found if peak.target == target):
            shares = (_cell(x) for x in (peak.accuracy, peak.selectivity))
            made.add_row(peak.position, str(peak.layer), *shares, _ranges(peak.told, result["layer"].values.tolist()))
        reporter.out.print(made)
        left_out = int(cell["n_left_out"])
        if left_out:
            reporter.note(f"Left out: {left_out} without a label of {target}, or with one that no other episode has.")
        if not int(cell["n_types"]):
            reporter.note(f"No control task for {target}: {cell['control'].item()}.")
    reporter.note(NOTE)
    reporter.ending(result, picture, directory)


def _cell(interval: Interval) -> str:
    if interval.estimate != interval.estimate:
        return "–"
    return escape(f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]")


def _ranges(layers: Sequence[int], all_layers: Sequence[int]) -> str:
    """Layers in short: neighbours of those that were read are written as a range.

    >>> _ranges([0, 4, 8, 9], [0, 4, 8, 9, 10])
    '0–9'
    >>> _ranges([1, 3], [1, 2, 3])
    '1, 3'
    """
    runs: list[list[int]] = []
    for place, layer in enumerate(all_layers):
        if layer in layers:
            if place and all_layers[place - 1] in layers:
                runs[-1].append(layer)
            else:
                runs.append([layer])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "none"


def _as_json(result: xr.Dataset, found: Sequence[Peak]) -> dict[str, Any]:
    """By target, position and layer."""
    summary = summarise_probes(result).assign(selectivity=selectivity(result))

    def ends(values: Sequence[float]) -> dict[str, float | None]:
        return dict(zip(("estimate", "low", "high"), map(finite, values), strict=True))

    def site(target: str, position: str, layer: int) -> dict[str, Any]:
        at = {"target": target, "position": position, "layer": layer}
        names = ("accuracy", "control", "selectivity")
        numbers = {name: float(result[name].sel(at)) for name in ("ridge_accuracy", "p", "p_family")}
        return {name: ends(summary[name].sel(at).values.tolist()) for name in names} | numbers

    def best(target: str, position: str) -> dict[str, Any]:
        [peak] = [peak for peak in found if (peak.target, peak.position) == (target, position)]
        shares = {"accuracy": peak.accuracy, "control": peak.control, "selectivity": peak.selectivity}
        return {"layer": peak.layer, "read_at": peak.told, **{name: ends(x.ends) for name, x in shares.items()}}

    positions, layers = result["position"].values.tolist(), result["layer"].values.tolist()
    shown: dict[str, Any] = {}
    for target in result["target"].values.tolist():
        cell = result.sel(target=target)
        guesses = dict(
            zip(cell["guess"].values.tolist(), map(finite, cell["guess_accuracy"].values.tolist()), strict=True)
        )
        shown[target] = {
            **{name: str(cell[name].item()) for name in ("about", "control")},
            **{name: int(cell[name]) for name in ("n_labels", "n_groups", "n_types", "n_left_out")},
            "n": int(summary["n"].sel(target=target)),
            "guesses": guesses,
            "best": {position: best(target, position) for position in positions},
            "positions": {p: {str(layer): site(target, p, layer) for layer in layers} for p in positions},
        }
    return shown
