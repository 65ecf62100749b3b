"""Draw the recognition and the learning of a saved run: ``python figures/task_split.py RUN_DIR [--out figure.pdf]``."""

from __future__ import annotations

import sys

from probe.plots.script import draw_run
from probe.plots.task_split import plot_task_split


def main(arguments: list[str] | None = None) -> int:
    """Read the run, write the figure, and return the exit code."""
    return draw_run(plot_task_split, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
