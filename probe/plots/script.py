"""What the scripts in ``figures/`` share: from a run directory to a figure in a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from probe.errors import ProbeError
from probe.plots.save import save_figure
from probe.store.atomic import read_zarr


def draw_run(
    plot: Callable[..., go.Figure], about: str, arguments: list[str] | None = None, **options: dict[str, Any]
) -> int:
    """Read ``RUN_DIR/result.zarr``, write its figure, and return the exit code.

    Parameters
    ----------
    plot
        A figure of this package, ``plot_x``; the file is ``x.html`` in the run directory unless ``--out`` is given.
    about
        The script's docstring; what stands before its first colon is shown as help.
    arguments
        Of the command line; by default those that the script was called with.
    options
        Further parameters of ``plot`` by name, each with what :meth:`argparse.ArgumentParser.add_argument` takes.
    """
    name = plot.__name__.removeprefix("plot_")
    parser = argparse.ArgumentParser(description=about.split(":")[0] + ".")
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="directory that holds result.zarr")
    for option, details in options.items():
        parser.add_argument(f"--{option}", **details)
    parser.add_argument(
        "--out", type=Path, help=f".html, .pdf, .svg or .png (default: {name}.html in the run directory)"
    )
    given = parser.parse_args(arguments)
    out = given.out or given.run / f"{name}.html"
    try:
        figure = plot(read_zarr(given.run / "result.zarr"), **{option: getattr(given, option) for option in options})
        save_figure(figure, out)
    except ProbeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"{out}\n")
    return 0
