"""Draw distances to the states with demonstrations: ``python figures/vector_distance.py RUN_DIR [--out FILE]``."""

from __future__ import annotations

import sys

from probe.plots.script import draw_run
from probe.plots.vector_distance import plot_vector_distance


def main(arguments: list[str] | None = None) -> int:
    """Read the run, write the figure, and return the exit code."""
    return draw_run(plot_vector_distance, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
