"""Draw what more training buys: ``python figures/vector_curves.py RUN_DIR [--out figure.pdf]``."""

from __future__ import annotations

import sys

from probe.plots.script import draw_run
from probe.plots.vector_curves import plot_vector_curves


def main(arguments: list[str] | None = None) -> int:
    """Read the run, write the figure, and return the exit code."""
    return draw_run(plot_vector_curves, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
