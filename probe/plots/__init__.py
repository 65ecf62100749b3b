"""Results to figures: ``plot_x(result, *, …) -> plotly.graph_objects.Figure``.

The contract of this room:

- A figure is computed from a result (``docs/results.md``) and nothing else, so it can be drawn again from a file.
  These files import xarray, plotly, :mod:`probe.stats` and :mod:`probe.segments`, :mod:`probe.measures` for summaries
  of what a model answered, and :mod:`probe.store` for writing.
- Every figure carries the model's name, its n, and what must be minded with figures of its kind: of attention, that
  mass is not use and a knockout belongs beside it. On the bundled model it carries the ``caveat`` as well.
  :func:`probe.plots.style.finish` sees to all of that.
- What is missing (NaN) is hatched grey, or left out with a word, and never looks like 0. A colour scale is shared and
  its range is stated; where values are clipped, the ends of the scale say so. Colours are safe for the colour-blind.
- Text that a user gave (attributes, labels) is escaped before it reaches a figure or a page.

One figure is one file: :mod:`~probe.plots.attention_map`, :mod:`~probe.plots.demonstration_position`,
:mod:`~probe.plots.overlay`; and of answers, :mod:`~probe.plots.copy_rate` and :mod:`~probe.plots.task_split`.
:mod:`~probe.plots.page` puts figures into one self-contained HTML file, :mod:`~probe.plots.save` writes a single one,
:mod:`~probe.plots.script` is what the scripts in ``figures/`` share. Nothing is imported here, so that plotly loads
only when something is drawn.
"""
