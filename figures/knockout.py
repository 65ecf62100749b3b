"""Draw the effects of a saved run of knockouts: ``python figures/knockout.py RUN_DIR [--out figure.pdf]``."""

from __future__ import annotations

import sys

from probe.plots.knockout import plot_knockout
from probe.plots.script import draw_run


def main(arguments: list[str] | None = None) -> int:
    """Read the run, write the figure, and return the exit code."""
    return draw_run(plot_knockout, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
