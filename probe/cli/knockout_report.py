"""The summary of ``probe knockout``: effects beside those of the random controls, as a table or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from probe.cli.report import Reporter, finite, table
from probe.measures.effects import CONTROLS, effects

if TYPE_CHECKING:
    import xarray as xr
    from rich.table import Table

TITLES = {"log_probability": "Log p of the gold answer (nats)", "correct": "Accuracy", "copied": "Copy rate"}
CONTROL_WORDS = {"keys": "random\ntokens", "heads": "random\nheads"}


def show(reporter: Reporter, result: xr.Dataset, directory: Path, picture: Path, *, reused: bool) -> None:
    """Print the summary."""
    summary = effects(result)
    if reporter.quiet:
        paths = {"directory": str(directory), "picture": str(picture), "reused": reused}
        reporter.json({**result.attrs, **as_json(summary), **paths})
        return
    reporter.facts(result, reused=reused)
    for measure in summary["measure"].values.tolist():
        reporter.out.print(_table(summary.sel(measure=measure), TITLES[measure]))
    reporter.note(
        "Effect: with it taken away minus as it is, mean over episodes with a 95 % interval (of "
        "shares Newcombe's, else BCa). p: "
        "family-wise over the rows, by sign flips of whole episodes. "
        + (
            "Beyond: the effect minus that of as many random tokens of the same turns, or random heads of the same "
            f"layers, mean of {result.attrs['controls']} draws. "
            if result.attrs["controls"]
            else "No random control was drawn. "
        )
        + "Others may stand in for what is taken away: an effect is a lower bound of its use."
    )
    idle = summary["intervention"].values[summary["n_defined"].values == 0].tolist()
    if idle:
        reporter.note(f"Undefined, for the rows cannot see these tokens there anyway: {'; '.join(idle)}.")
    reporter.ending(result, picture, directory)


def _table(summary: xr.Dataset, title: str) -> Table:
    """One measure, a row for each intervention."""
    controls = [name for name in CONTROLS if not bool(summary["beyond"].sel(control=name).isnull().all())]
    words = [column for name in controls for column in (CONTROL_WORDS[name], "beyond")]
    heading = f"{title}: {float(summary['as_is']):.3f} as it is"
    hides = bool((summary["n_hidden"] > 0).any())
    made = table(heading, ("taken away", *(("tokens",) if hides else ()), "effect", "p", *words))
    for label in summary["intervention"].values.tolist():
        row = summary.sel(intervention=label)
        hidden = float(row["n_hidden"])
        made.add_row(
            escape(label.replace(" → ", "\n→ ").replace(", ", ",\n", 1)),
            *((f"{hidden:g}" if hidden == round(hidden) else f"{hidden:.1f}",) if hides else ()),
            _cell(row["effect"]),
            "–" if bool(row["p"].isnull()) else f"{float(row['p']):.4f}",
            *(
                text
                for name in controls
                for text in (
                    _cell(row["of_control"].sel(control=name), ends=False),
                    _cell(row["beyond"].sel(control=name)),
                )
            ),
        )
    return made


def _cell(values: xr.DataArray, *, ends: bool = True) -> str:
    estimate, low, high = values.values.tolist()
    if estimate != estimate:
        return "–"
    return f"{estimate:+.3f}" + (escape(f" [{low:+.2f}, {high:+.2f}]") if ends and low == low else "")


def as_json(summary: xr.Dataset) -> dict[str, Any]:
    """The tables, for programs."""
    names = summary["end"].values.tolist()

    def ends(values: xr.DataArray) -> dict[str, float | None]:
        return dict(zip(names, map(finite, values.values.tolist()), strict=True))

    rows = []
    for label in summary["intervention"].values.tolist():
        own = summary.sel(intervention=label)
        measures = {}
        for measure in summary["measure"].values.tolist():
            of = own.sel(measure=measure)
            controls = {
                name: {part: ends(of[part].sel(control=name)) for part in ("of_control", "beyond")} for name in CONTROLS
            }
            measures[measure] = {"effect": ends(of["effect"]), "p": finite(float(of["p"])), "controls": controls}
        counts = {"n_hidden": float(own["n_hidden"]), "n_defined": int(own["n_defined"])}
        rows.append({"taken_away": label, **counts, **measures})
    as_is = {measure: float(summary["as_is"].sel(measure=measure)) for measure in summary["measure"].values.tolist()}
    return {"as_is": as_is, "interventions": rows, "n": int(summary["n"])}
