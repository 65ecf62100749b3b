"""In-context vectors: what demonstrations do to a model, written into a few numbers and put back without them.

A *method* is a frozen dataclass of its options, and the whole of what is special about it: the parameters that it
starts from, the edits that they are, and how they are found. All methods have one contract
(:class:`~probe.vectors.method.Method`): ``fit(model, episodes) -> InContextVector``. An
:class:`~probe.vectors.vector.InContextVector` is a method with its parameters and a card; it gives ``edits()``, and
``save`` and ``load`` it as safetensors and JSON. Training, the frozen teacher that it learns from and its losses are
one place each, whatever the method.

=====================================================  ================================================================
:class:`~probe.vectors.live.Live`                      a vector a layer, added to its output, which keeps its norm
:class:`~probe.vectors.mimic.Mimic`                    a vector a head, sized by the query
:class:`~probe.vectors.m2iv.M2iv`                      a vector a layer behind attention and one behind the MLP
:class:`~probe.vectors.hificl.Hificl`                  keys and values in every head, attended to like any others
:class:`~probe.vectors.i2cl.I2cl`                      states behind examples, added with learned coefficients
:class:`~probe.vectors.lora.Lora`                      the baseline in weight space
:class:`~probe.vectors.fitted.FittedShift`             MimIC's form, fitted to shifts of attention without a gradient
:class:`~probe.vectors.mean.MeanDifference`            in one layer, what demonstrations add to the state on average
:class:`~probe.vectors.task_vector.TaskVector`         in one layer, the mean state with demonstrations in its place
:class:`~probe.vectors.function_vector.FunctionVector` in one layer, what a few heads write on average
:class:`~probe.vectors.icv.Icv`                        a direction in all layers that MLP outputs are turned towards
:class:`~probe.vectors.mtv.Mtv`                        some heads write their mean, whatever they read
=====================================================  ================================================================
"""
