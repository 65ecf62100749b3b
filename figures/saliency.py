"""Draw the flows of saliency of a saved run: ``python figures/saliency.py RUN_DIR [--out figure.pdf]``."""

from __future__ import annotations

import sys

from probe.plots.saliency import plot_saliency
from probe.plots.script import draw_run


def main(arguments: list[str] | None = None) -> int:
    """Read the run, write the figure, and return the exit code."""
    return draw_run(plot_saliency, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
