"""Draw what vectors cost, of a saved comparison: ``python figures/vector_times.py RUN_DIR [--out figure.pdf]``."""

from __future__ import annotations

import sys

from probe.plots.script import draw_run
from probe.plots.vector_times import plot_vector_times


def main(arguments: list[str] | None = None) -> int:
    """Read the run, write the figure, and return the exit code."""
    return draw_run(plot_vector_times, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
