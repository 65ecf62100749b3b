"""Write one figure to a file: a page that works offline, or a picture for a paper."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from probe.errors import ProbeError, UsageError
from probe.plots.style import CONFIG
from probe.store.atomic import write_bytes, write_text

PICTURES = (".pdf", ".png", ".svg")


def save_figure(figure: go.Figure, path: Path) -> None:
    """Write a figure; the suffix of ``path`` says how.

    Parameters
    ----------
    figure
        Of any ``plot_x``.
    path
        Ends in ``.html`` (self-contained, with plotly.js inside), ``.pdf``, ``.svg`` or ``.png`` (three pixels for
        one).

    Raises
    ------
    UsageError
        If the suffix is another.
    ProbeError
        If a picture is asked for and kaleido or the browser that it drives is missing, or the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix == ".html":
        write_text(path, figure.to_html(include_plotlyjs=True, config=CONFIG))
    elif suffix in PICTURES:
        write_bytes(path, _picture(figure, path))
    else:
        raise UsageError(
            f"A figure cannot be written as {path.name}; its name must end in .html, {', '.join(PICTURES)}."
        )


def _picture(figure: go.Figure, path: Path) -> bytes:
    way_out = f"or write {path.with_suffix('.html').name}, whose camera button saves an SVG."
    try:
        import kaleido  # noqa: F401
    except ImportError:
        raise ProbeError(
            f"{path.name} needs kaleido, which is not installed: pip install 'probe[figures]', {way_out}"
        ) from None
    try:
        picture: bytes = figure.to_image(
            format=path.suffix[1:].lower(), scale=3 if path.suffix.lower() == ".png" else 1
        )
    # kaleido drives a browser, and what can go wrong there has no common class
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        raise ProbeError(
            f"kaleido could not draw {path.name} ({reason}); install Chrome (plotly_get_chrome does), {way_out}"
        ) from error
    return picture
