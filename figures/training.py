"""Draw the training of vectors of a saved run: ``python figures/training.py RUN_DIR [--out figure.pdf]``."""

from __future__ import annotations

import sys

from probe.plots.script import draw_run
from probe.plots.training import plot_training


def main(arguments: list[str] | None = None) -> int:
    """Read the run, write the figure, and return the exit code."""
    return draw_run(plot_training, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
