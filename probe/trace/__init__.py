"""The one room that touches a running model, on nnsight.

:func:`~probe.trace.read.read` runs a forward, hands the values of each layer to a *reducer* where they are produced,
and returns what it made of them: no layer x head x token x token array ever leaves the trace.
:class:`~probe.trace.edit.Edit` is the one way to change a forward.
"""
