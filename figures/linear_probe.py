"""Draw the linear probes of a saved run: ``python figures/linear_probe.py RUN_DIR [--out figure.pdf]``."""

from __future__ import annotations

import sys

from probe.plots.linear_probe import plot_linear_probe
from probe.plots.script import draw_run


def main(arguments: list[str] | None = None) -> int:
    """Read the run, write the figure, and return the exit code."""
    return draw_run(plot_linear_probe, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
