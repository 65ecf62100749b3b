"""The summary of ``probe heads``: the heads of each kind, what ablating them together costs, and the whole table."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape

from probe.cli.knockout_report import as_json as effects_as_json
from probe.cli.report import Reporter, finite, table
from probe.measures.effects import effects
from probe.measures.head_summary import of_found, summarise_heads
from probe.store import write_text

if TYPE_CHECKING:
    import xarray as xr
    from rich.table import Table

COLUMNS = ("score", "beyond", "low", "high", "p", "rank")


def show(
    reporter: Reporter, result: xr.Dataset, directory: Path, picture: Path, csv_file: Path, *, reused: bool
) -> None:
    """Write the whole table, and print the summary."""
    summary = summarise_heads(result)
    write_text(csv_file, as_csv(summary))
    found = of_found(result)
    if reporter.quiet:
        paths = {"directory": str(directory), "picture": str(picture), "table": str(csv_file), "reused": reused}
        ablated = None if found is None else effects_as_json(effects(found))
        reporter.json({**result.attrs, "kinds": as_json(summary), "ablated_together": ablated, **paths})
        return
    reporter.facts(result, reused=reused)
    reporter.out.print(_kinds(summary, int(result.attrs["top"])))
    if found is not None:
        reporter.out.print(_together(effects(found)))
    reporter.note(
        "Heads (layer.head) of each kind as half of the sequences and episodes ranks them; scores, what they go beyond "
        "their null (95 % interval, BCa) and p (family-wise over all heads, sign flips) are those of the other half. "
        "Agreement: Spearman's correlation of the two halves over heads."
        + (
            " Ablated together: in the reporting episodes they write their means over other episodes; beyond random: "
            "minus as many other heads of the same layers, where there are as many."
            if found is not None
            else ""
        )
    )
    if "no_images" in result.attrs:
        reporter.note(f"There are no image rows: {result.attrs['no_images']}.")
    reporter.out.print(f"Table:   {csv_file}", soft_wrap=True, highlight=False, markup=False)
    reporter.ending(result, picture, directory)


def _kinds(summary: xr.Dataset, n: int) -> Table:
    """The first heads of every kind."""
    made = table("Heads by kind", ("kind", "agreement", "head", "score", "beyond its null", "p"))
    for kind in summary["kind"].values.tolist():
        own = summary.sel(kind=kind)
        agreement = float(own["reliability"])
        first = (kind, "–" if agreement != agreement else f"{agreement:.2f}")
        for place in range(1, n + 1):
            at = np.argwhere(own["rank"].values == place)
            if len(at):
                cell = own.isel(layer=at[0][0], head=at[0][1])
                made.add_row(*first, *_head(cell))
                first = ("", "")
    return made


def _head(cell: xr.Dataset) -> tuple[str, str, str, str]:
    estimate, low, high = cell["beyond"].values.tolist()
    interval = escape(f" [{low:+.3f}, {high:+.3f}]") if low == low else ""
    p = float(cell["p"])
    return (
        f"{int(cell['layer'])}.{int(cell['head'])}",
        f"{float(cell['score']):.3f}",
        f"{estimate:+.3f}{interval}",
        "–" if p != p else f"{p:.4f}",
    )


def _together(summary: xr.Dataset) -> Table:
    """What ablating the heads of a kind costs, beside random heads."""
    made = table("Ablated together", ("kind", "heads", "log p", "beyond\nrandom", "accuracy", "beyond\nrandom"))
    for label in summary["intervention"].values.tolist():
        kind, heads = label.rsplit(": ", 1)
        own = summary.sel(intervention=label)
        cells = []
        for measure in ("log_probability", "correct"):
            of = own.sel(measure=measure)
            cells.append(f"{float(of['effect'].sel(end='estimate')):+.3f}")
            estimate, low, high = of["beyond"].sel(control="heads").values.tolist()
            cells.append("–" if estimate != estimate else f"{estimate:+.3f}" + escape(f" [{low:+.2f}, {high:+.2f}]"))
        made.add_row(escape(kind.replace(", ", ",\n")), heads, *cells)
    return made


def as_csv(summary: xr.Dataset) -> str:
    """All heads of all kinds, a line for each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("kind", "layer", "head", *COLUMNS))
    for kind in summary["kind"].values.tolist():
        for row in rows(summary.sel(kind=kind)):
            writer.writerow((kind, row["layer"], row["head"], *("" if row[c] is None else row[c] for c in COLUMNS)))
    return text.getvalue()


def rows(own: xr.Dataset) -> list[dict[str, Any]]:
    """One kind, head by head."""
    found = []
    for layer in own["layer"].values.tolist():
        for head in own["head"].values.tolist():
            cell = own.sel(layer=layer, head=head)
            values = [float(cell["score"]), *cell["beyond"].values.tolist(), float(cell["p"]), float(cell["rank"])]
            found.append({"layer": layer, "head": head, **dict(zip(COLUMNS, map(finite, values), strict=True))})
    return found


def as_json(summary: xr.Dataset) -> dict[str, Any]:
    """The whole table, for programs."""
    return {
        kind: {
            "agreement": finite(float(summary["reliability"].sel(kind=kind))),
            "n": finite(float(summary["n"].sel(kind=kind))),
            "heads": rows(summary.sel(kind=kind)),
        }
        for kind in summary["kind"].values.tolist()
    }
