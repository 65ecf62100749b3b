"""Draw the sweep of a run of copy-rate: ``python figures/copy_sweep.py RUN_DIR [--out figure.pdf]``."""

from __future__ import annotations

import sys

from probe.plots.copy_sweep import plot_copy_sweep
from probe.plots.script import draw_run


def main(arguments: list[str] | None = None) -> int:
    """Read the run, write the figure, and return the exit code."""
    return draw_run(plot_copy_sweep, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
