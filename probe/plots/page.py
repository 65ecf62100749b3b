"""One self-contained HTML file: what was run, its figures and tables, and where they come from.

Nothing is fetched when it is opened: plotly.js is inside, once, and there is no MathJax, style sheet or font from
elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.offline import get_plotlyjs

from probe.plots import style
from probe.stats import wilson
from probe.store.atomic import write_text

CSS = """
:root { --ink: #1f2430; --faint: #5b6270; --rule: #dfe2e8; --wash: #f6f7f9; } * { box-sizing: border-box; } body {
margin: 0; color: var(--ink); background: white; font: 16px/1.55 FONT; } main { max-width: 1164px; margin: 0 auto;
padding: 40px 32px 64px; } h1 { font-size: 29px; line-height: 1.2; margin: 0 0 20px; letter-spacing: -0.01em; } h2 {
font-size: 21px; line-height: 1.3; margin: 52px 0 4px; padding-top: 22px; border-top: 1px solid var(--rule); } p,
.caption { max-width: 76ch; margin: 8px 0; } .caption { color: var(--faint); } .facts { display: grid;
grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px 28px; margin: 0; } .facts dt { color:
var(--faint); font-size: 13px; } .facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; } .facts small {
display: block; color: var(--faint); font-weight: 400; font-size: 13px; } .note { border-left: 4px solid #d97706;
background: #fff7ea; padding: 10px 16px; margin: 24px 0 0; max-width: none; } .figure { overflow-x: auto; margin: 14px
0 0 -14px; } .scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; margin: 12px 0;
font-variant-numeric: tabular-nums; } th, td { text-align: left; padding: 5px 28px 5px 0; border-bottom: 1px solid
var(--rule); vertical-align: top; } thead th { border-bottom: 2px solid var(--ink); font-weight: 600; } td.number,
th.number { text-align: right; } details { margin-top: 52px; border-top: 1px solid var(--rule); padding-top: 20px; }
summary { cursor: pointer; font-size: 21px; font-weight: 700; } details th { font-weight: 400; color: var(--faint);
white-space: nowrap; } details td { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space:
pre-wrap; overflow-wrap: anywhere; } @page { size: A4; margin: 11mm; } @media print {
  body { font-size: 13px; }
  main { max-width: none; padding: 0; }
  section, .figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; margin-top: 24px; }
  .figure { overflow: visible; zoom: 0.64; }
  .modebar { display: none !important; }
  summary { list-style: none; }
}
""".replace("FONT", style.FONT)

OPEN_FOR_PRINT = (
    "addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(d => d.open = true));"
)


@dataclass(frozen=True)
class Table:
    """A simple table of a page.

    Attributes
    ----------
    heading
        Stands above it.
    columns
        The head of each column.
    rows
        Cells, as many in each row as there are columns. Numbers stand to the right, with four significant digits if
        they are not whole; NaN and None are shown as a dash.
    caption
        Plain text.
    """

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""


def write_page(
    path: Path,
    result: xr.Dataset,
    figures: Sequence[tuple[str, str, go.Figure]],
    *,
    title: str,
    tables: Sequence[Table] = (),
) -> None:
    """Write a page about a result.

    Parameters
    ----------
    path
        Of the HTML file.
    result
        As in ``docs/results.md``; its attributes fill the header and the provenance.
    figures
        (heading, caption, figure) in the order of the page. The caption is HTML and goes in as it is; whoever writes
        it escapes what a user gave. Everything else is escaped here.
    title
        Of the page.
    tables
        Shown after the figures.

    Raises
    ------
    ProbeError
        If the file cannot be written.
    """
    note = style.caveat(result)
    sections = [_figure_section(number, *figure) for number, figure in enumerate(figures, start=1)]
    sections += [_table_section(table) for table in tables]
    write_text(
        path,
        "\n".join(
            [
                "<!doctype html>",
                '<html lang="en"><head><meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{escape(title)}</title>",
                f"<style>{CSS}</style>",
                "<script>window.PlotlyConfig = {MathJaxConfig: 'local'};</script>",
                f"<script>{get_plotlyjs()}</script>",
                "</head><body><main>",
                f"<header><h1>{escape(title)}</h1>",
                _facts(result),
                f'<p class="note"><strong>Mind:</strong> {escape(note)}</p>' if note else "",
                "</header>",
                *sections,
                _provenance(result),
                f"</main><script>{OPEN_FOR_PRINT}</script></body></html>\n",
            ]
        ),
    )


def _facts(result: xr.Dataset) -> str:
    """The header: model, data, n, accuracy, and how exact the numbers are."""
    attributes = result.attrs
    facts = [("model", str(attributes.get("model", "unnamed")), str(attributes.get("dtype", "")))]
    for name in ("task", "data"):
        if attributes.get(name):
            facts.append((name, str(attributes[name]), f"seed {attributes['seed']}" if "seed" in attributes else ""))
    shots = sorted({int(k) for k in result["shots"].values}) if "shots" in result.coords else []
    n = result.sizes["episode"] if "episode" in result.sizes else attributes["n_done"]
    facts.append(("episodes", f"{n}", _n_note(result)))
    if shots:
        facts.append(("demonstrations each", f"{shots[0]}" if len(shots) == 1 else f"{shots[0]} to {shots[-1]}", ""))
    if "correct" in result and result["correct"].dims == ("episode",):
        known = result["correct"].values.astype(float)
        known = known[~np.isnan(known)]
        share = wilson(int(known.sum()), len(known))
        facts.append(
            (
                "accuracy",
                f"{share.estimate:.3f}" if share.n else "–",
                f"{int(known.sum())} of {share.n} correct, 95 % interval {share.low:.3f} to {share.high:.3f} (Wilson)",
            )
        )
    if "residual" in result:
        worst = float(result["residual"].max())
        bound = f"bound {attributes['residual_bound']}, " if "residual_bound" in attributes else ""
        facts.append(
            (
                "head outputs rebuilt within",
                "–" if np.isnan(worst) else f"{worst:.1e}",
                f"{bound}relative to the model’s own",
            )
        )
    items = [
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(small)}</small></dd></div>"
        for name, value, small in facts
    ]
    return f'<dl class="facts">{"".join(items)}</dl>'


def _n_note(result: xr.Dataset) -> str:
    attempted, failed = result.attrs.get("n_attempted"), result.attrs.get("n_failed", 0)
    return f"{attempted} attempted, {failed} failed" if attempted is not None else ""


def _figure_section(number: int, heading: str, caption: str, figure: go.Figure) -> str:
    # A name instead of plotly's random one: the same result gives the same file.
    drawing = figure.to_html(full_html=False, include_plotlyjs=False, config=style.CONFIG, div_id=f"figure-{number}")
    return (
        f'<section><h2>{escape(heading)}</h2><div class="caption">{caption}</div>'
        f'<div class="figure">{drawing}</div></section>'
    )


def _table_section(table: Table) -> str:
    numeric = [all(_is_number(row[i]) for row in table.rows) for i in range(len(table.columns))]
    marks = [' class="number"' if flag else "" for flag in numeric]
    head = "".join(f"<th{mark}>{escape(name)}</th>" for mark, name in zip(marks, table.columns, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{mark}>{_cell(cell)}</td>" for mark, cell in zip(marks, row, strict=True)) + "</tr>"
        for row in table.rows
    )
    caption = f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    return (
        f"<section><h2>{escape(table.heading)}</h2>{caption}"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>'
    )


def _is_number(cell: object) -> bool:
    return cell is None or (isinstance(cell, (int, float, np.number)) and not isinstance(cell, bool))


def _cell(cell: object) -> str:
    if cell is None or (isinstance(cell, (float, np.floating)) and np.isnan(cell)):
        return "–"
    if isinstance(cell, (float, np.floating)):
        return f"{cell:.4g}"
    return escape(str(cell))


def _provenance(result: xr.Dataset) -> str:
    """All attributes, folded away on the screen and open on paper."""
    rows = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(_as_text(value))}</td></tr>"
        for name, value in sorted(result.attrs.items())
    )
    return f"<details><summary>Provenance</summary><table><tbody>{rows}</tbody></table></details>"


def _as_text(value: object) -> str:
    return (
        json.dumps(value, indent=1, ensure_ascii=False, default=str) if isinstance(value, (dict, list)) else str(value)
    )
