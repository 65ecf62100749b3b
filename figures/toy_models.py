"""Draw what the bundled models can do and what their heads do: ``python figures/toy_models.py [--out toy.html]``.

Reads the evaluations of the bundled model and of its control in ``probe/toy/evaluations``. Upper panels: accuracy by
shots. Lower panel: what removing each head of the bundled model does to each task.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probe.data.tasks import DRAW_RULE, TEXT_SUFFIX
from probe.errors import ProbeError
from probe.models.load import CAVEAT
from probe.models.names import BUNDLED
from probe.plots.save import save_figure
from probe.plots.style import COLOURS, DIVERGING, FAINT, FONT, INK, WARNING
from probe.stats import wilson
from probe.toy.evaluate import EVALUATIONS
from probe.toy.tables import guided_heads

GREY = "#8d95a3"
LINES = {
    "toy": ("pictures", "", {"color": COLOURS["visual"], "width": 2.5}),
    "text": ("text-only twin", TEXT_SUFFIX, {"color": COLOURS["textual"], "width": 1.5, "dash": "dot"}),
    "toy-no-binding": ("control, pictures", "", {"color": GREY, "width": 1.5}),
}


def plot_toy_models(toy: dict[str, Any], control: dict[str, Any]) -> go.Figure:
    """The figure, from the evaluations of the bundled model and of the control."""
    tasks = list(DRAW_RULE)
    figure = make_subplots(
        rows=3,
        cols=3,
        specs=[[{}, {}, {}], [{}, {}, {}], [{"colspan": 3}, None, None]],
        subplot_titles=[*tasks, "change of accuracy at 8 shots without a head, in points"],
        row_heights=[0.26, 0.26, 0.48],
        vertical_spacing=0.09,
        horizontal_spacing=0.05,
    )
    for place, task in enumerate(tasks):
        for kind, (name, suffix, line) in LINES.items():
            result = control if kind == "toy-no-binding" else toy
            cells = sorted((c for c in result["accuracy"] if c["task"] == task + suffix), key=lambda c: c["shots"])
            shares = [wilson(c["right"], c["n"]) for c in cells]
            figure.add_scatter(
                x=[str(c["shots"]) for c in cells],
                y=[s.estimate for s in shares],
                error_y={
                    "array": [s.high - s.estimate for s in shares],
                    "arrayminus": [s.estimate - s.low for s in shares],
                    "width": 0,
                },
                name=name,
                line=line,
                showlegend=place == 0,
                legendgroup=kind,
                row=1 + place // 3,
                col=1 + place % 3,
            )
    _draw_heads(figure, toy)
    figure.update_xaxes(type="category")
    figure.update_xaxes(title_text="shots", title_standoff=2, row=2)
    figure.update_yaxes(range=[-0.03, 1.05], gridcolor="#e7e9ee")
    figure.update_yaxes(autorange="reversed", range=None, type="category", showgrid=False, row=3, col=1)
    number = _either({cell["n"] for result in (toy, control) for cell in result["accuracy"]})
    seed = _either({toy["seed"], control["seed"]})
    figure.update_layout(
        template="none",
        width=1100,
        height=1120,
        font={"family": FONT, "size": 12, "color": INK},
        margin={"l": 145, "r": 30, "t": 150, "b": 90},
        legend={"orientation": "h", "x": 0, "y": 1.05, "yanchor": "bottom"},
        title={
            "text": "<b>The bundled model and its control: accuracy by shots, and what heads do</b>",
            "subtitle": {
                "text": f'<span style="color:{FAINT}">n = {number} episodes a point, with 95 % '
                f"Wilson intervals; heads: {toy['heads'][0]['n']} episodes a task; episodes of seed {seed}.</span><br>"
                f'<span style="color:{WARNING}">{CAVEAT}</span>'
            },
            "x": 0.01,
            "y": 0.985,
            "yanchor": "top",
        },
    )
    return figure


def _either(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def _draw_heads(figure: go.Figure, toy: dict[str, Any]) -> None:
    told = guided_heads(toy["recipe"])
    heads = list(toy["heads"][0]["effects"])
    change = [
        [100 * (c["effects"][head]["gained"] - c["effects"][head]["lost"]) / c["n"] for head in heads]
        for c in toy["heads"]
    ]
    figure.add_heatmap(
        z=change,
        x=[
            f"{head}<br>{told[head].replace(' ', '<br>')}" if head in told else head.replace("+", "<br>+")
            for head in heads
        ],
        y=[c["task"] for c in toy["heads"]],
        text=[[f"{value:.0f}" if abs(value) >= 1.5 else "" for value in row] for row in change],
        texttemplate="%{text}",
        zmid=0,
        zmin=-100,
        zmax=100,
        colorscale=DIVERGING,
        reversescale=True,
        showscale=False,
        xgap=1,
        ygap=1,
        row=3,
        col=1,
    )
    figure.update_xaxes(title_text="layer.head, and what it was seeded to do", tickangle=0, row=3, col=1)


def main(arguments: list[str] | None = None) -> int:
    """Read the evaluations, write the figure, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("toy_models.html"), help=".html, .pdf, .svg or .png")
    options = parser.parse_args(arguments)
    try:
        toy, control = (json.loads((EVALUATIONS / f"{name}.json").read_text()) for name in BUNDLED)
        save_figure(plot_toy_models(toy, control), options.out)
    except ProbeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
