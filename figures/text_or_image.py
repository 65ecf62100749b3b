"""Draw what is read of demonstrations' text and images: ``python figures/text_or_image.py RUN_DIR [--out figure.pdf]``.

The run is one of ``probe attention-map --knockout``.
"""

from __future__ import annotations

import sys

from probe.plots.script import draw_run
from probe.plots.text_or_image import plot_text_or_image


def main(arguments: list[str] | None = None) -> int:
    """Read the run, write the figure, and return the exit code."""
    return draw_run(plot_text_or_image, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
