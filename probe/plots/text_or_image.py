"""Do heads read the demonstrations' text or their images when the answer begins, and does it matter?"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe.errors import UsageError
from probe.measures.effects import WITHOUT, effects, unnest
from probe.plots import style
from probe.segments import CONTENT, by_group, group_lift, group_mass, select_row, without_sinks

WORDS = {"visual": "images", "textual": "text"}
HIDDEN = {"visual": "demos/image → answer", "textual": "demos/text → answer"}
PANELS = ("mass", "mass per token ÷ uniform", "contribution", "log p lost without")
HEIGHT = 300


def plot_text_or_image(result: xr.Dataset, *, row: str = "answer") -> go.Figure:
    """Draw what a row reads of the demonstrations' images and of their text, by layer, and what it costs to hide them.

    From the left: attention mass, which many tokens gather more easily; mass relative to uniform attention;
    contribution to the residual stream; and the loss of log p of the answer when the row cannot see the tokens in any
    layer, beside as many random tokens. Points are heads, lines their mean, dashed without attention sinks where there
    are any.

    Parameters
    ----------
    result
        Of ``probe attention-map --knockout``; without knockouts, the last panel says so.
    row
        One label of the coordinate ``row``.

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    UsageError
        If the result has no such row, or its episodes no demonstrations.
    """
    if not bool((result["demonstration"] >= 0).any()):
        raise UsageError("These episodes have no demonstrations to read; run with one shot or more.")
    layers = result["layer"].values
    values = {
        "mass": group_mass(result, row=row),
        "mass per token ÷ uniform": group_lift(result, row=row),
        "contribution": by_group(select_row(result, row)["contribution"]),
    }
    left = without_sinks(result) if bool((result["n_sinks"] > 0).any()) else None
    figure = make_subplots(cols=4, column_widths=[0.27, 0.27, 0.27, 0.19], horizontal_spacing=0.06)
    for column, name in enumerate(PANELS[:3], start=1):
        for group in CONTENT:
            by_head = values[name].sel(group=group).mean("episode").transpose("layer", "head")
            _heads(figure, layers, by_head, group, column)
            _line(figure, layers, by_head.mean("head").values, group, column, dash="solid")
            if left is not None and name != "contribution":
                rest = (group_mass if name == "mass" else group_lift)(left, row=row).sel(group=group)
                _line(figure, layers, rest.mean(("episode", "head")).values, group, column, dash="dash")
    knocked = unnest(result, WITHOUT)
    _knockouts(figure, knocked)
    where = _where(knocked)
    for column, name in enumerate(PANELS, start=1):
        style.heading(figure, name, row=1, col=column)
    shown = "Dashed: without attention sinks." if left is not None else "No attention sinks were found."
    style.finish(
        figure,
        result,
        "Text or images? What is read of the demonstrations when the answer begins",
        [
            f"Row “{row}”. Points are heads, means over episodes; lines are means over heads. {shown}",
            "Contribution: the norms of what a head writes because of each demonstration's part, added up. Loss of log "
            f"p in nats with 95 % intervals (BCa) when the row cannot see the tokens{where}; squares: as many random "
            "tokens of the demonstrations.",
        ],
        body=HEIGHT,
        extra=58,
        note="There are more image tokens than words in most prompts: raw mass alone does not compare them.",
    )
    figure.update_xaxes(showgrid=False)
    for column in (1, 2, 3):
        ticks = {"tickmode": "array", "tickvals": layers.tolist(), "ticktext": [str(layer) for layer in layers]}
        figure.update_xaxes(title_text="layer", **(ticks if len(layers) <= 12 else {}), row=1, col=column)
    figure.update_yaxes(gridcolor=style.GRID)
    figure.update_yaxes(type="log", col=2)
    figure.update_yaxes(rangemode="tozero", col=1)
    figure.update_yaxes(rangemode="tozero", col=3)
    figure.update_layout(legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.13, "yanchor": "bottom"})
    return figure


def _where(knocked: xr.Dataset | None) -> str:
    """In which layers tokens are hidden, in words."""
    labels = [] if knocked is None else knocked["intervention"].values.tolist()
    windows = [label.split(", ", 1)[1] for label in labels if ", layer" in label]
    return f" in {windows[0]}" if windows else " in any layer"


def _heads(figure: go.Figure, layers: np.ndarray, by_head: xr.DataArray, group: str, column: int) -> None:
    """A point for each head."""
    heads = by_head["head"].values
    aside = (np.arange(len(heads)) - (len(heads) - 1) / 2) * 0.5 / max(1, len(heads))
    figure.add_trace(
        go.Scatter(
            x=(layers[:, None] + aside).ravel(),
            y=by_head.values.ravel(),
            mode="markers",
            marker={"color": style.COLOURS[group], "size": 5, "opacity": 0.45},
            customdata=[(layer, head) for layer in layers.tolist() for head in heads.tolist()],
            hovertemplate=f"{WORDS[group]}, head %{{customdata[0]}}.%{{customdata[1]}}: %{{y:.3g}}<extra></extra>",
            showlegend=False,
            legendgroup=group,
        ),
        row=1,
        col=column,
    )


def _line(figure: go.Figure, layers: np.ndarray, values: np.ndarray, group: str, column: int, *, dash: str) -> None:
    """The mean over heads."""
    figure.add_trace(
        go.Scatter(
            x=layers,
            y=values,
            mode="lines",
            name=f"demonstrations’ {WORDS[group]}",
            line={"color": style.COLOURS[group], "width": 2, "dash": dash},
            hovertemplate=f"{WORDS[group]}, layer %{{x}}: %{{y:.3g}}<extra></extra>",
            showlegend=column == 1 and dash == "solid",
            legendgroup=group,
        ),
        row=1,
        col=column,
    )


def _knockouts(figure: go.Figure, knocked: xr.Dataset | None) -> None:
    """The loss of log p without each, beside random tokens."""
    if knocked is None:
        style.hold(figure, row=1, col=4)
        style.say(figure, "not measured:<br>--knockout", row=1, col=4)
        figure.update_xaxes(visible=False, row=1, col=4)
        figure.update_yaxes(visible=False, row=1, col=4)
        return
    found = effects(knocked).sel(measure="log_probability")
    known = found["intervention"].values.tolist()
    for place, group in enumerate(CONTENT):
        label = next((each for each in known if each.startswith(HIDDEN[group]) and "." not in each), None)
        if label is None:
            continue
        own = found.sel(intervention=label)
        for ends, colour, symbol, aside, what in (
            (own["effect"].values, style.COLOURS[group], "circle", -0.12, f"without {WORDS[group]}"),
            (own["of_control"].sel(control="keys").values, style.FAINT, "square", 0.12, "as many random tokens"),
        ):
            if np.isnan(ends[0]):
                continue
            lost = -ends[[0, 2, 1]]
            points = style.points(
                [place + aside],
                lost[None],
                [int(found["n"])],
                [label],
                what=what,
                quantity="log p lost",
                colour=colour,
                symbol=symbol,
                showlegend=False,
            )
            figure.add_trace(points, row=1, col=4)
    figure.add_hline(y=0, line={"color": style.FAINT, "width": 1}, row=1, col=4)
    figure.update_xaxes(tickmode="array", tickvals=[0, 1], ticktext=["images", "text"], range=[-0.6, 1.6], row=1, col=4)
