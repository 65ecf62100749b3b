"""In-context vectors: what demonstrations do to a model, written into a few numbers and put back without them.

A *method* is a frozen dataclass of its options, and the whole of what is special about it: the parameters that it
starts from, the edits that they are, and how they are found. All methods have one contract
(:class:`~probe.vectors.method.Method`): ``fit(model, episodes) -> InContextVector``. An
:class:`~probe.vectors.vector.InContextVector` is a method with its parameters and a card; it gives ``edits()``, and
``save`` and ``load`` it as safetensors and JSON. Training, the frozen teacher that it learns from and its losses are
one place each, whatever the method.

==========================================  ===========================================================================
:class:`~probe.vectors.live.Live`           a vector a layer, added to its output, which keeps its norm (LIVE)
:class:`~probe.vectors.mimic.Mimic`         a vector a head, sized by the query (MimIC)
:class:`~probe.vectors.m2iv.M2iv`           a vector a layer behind attention and one behind the MLP (M²IV-style)
:class:`~probe.vectors.mean.MeanDifference` the mean difference of the states with and without demonstrations
:class:`~probe.vectors.fitted.FittedShift`  MimIC's form, fitted to the shifts of attention without a gradient
==========================================  ===========================================================================
"""
