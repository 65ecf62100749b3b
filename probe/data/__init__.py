"""Data: what a model is shown and asked.

An :class:`Example` is a question about images with its accepted answers; an :class:`Episode` is demonstrations and a
query. A user's examples come from ``readers``, those of known data sets from ``published``, and ``choose`` makes
episodes of them; ``tasks`` makes synthetic episodes, drawn by ``scenes``. ``manifest`` writes episodes down before
anything runs; ``images`` opens pictures.
"""

from probe.data.example import Episode, Example, Picture

__all__ = ["Episode", "Example", "Picture"]
