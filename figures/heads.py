"""Draw the scores of all heads of a saved run: ``python figures/heads.py RUN_DIR [--top 3] [--out figure.pdf]``."""

from __future__ import annotations

import sys

from probe.plots.heads import plot_heads
from probe.plots.script import draw_run


def main(arguments: list[str] | None = None) -> int:
    """Read the run, write the figure, and return the exit code."""
    return draw_run(plot_heads, __doc__, arguments, top={"type": int, "help": "heads to mark in each map"})


if __name__ == "__main__":
    sys.exit(main())
