"""Published data sets, read from the files that their authors offer.

=============================== ===================== =================================================================
data set                        from given files      by name, in :func:`read_published`
=============================== ===================== =================================================================
VQAv2, OK-VQA                   :func:`read_vqa`      ``vqav2``, ``okvqa``
VizWiz                          :func:`read_vizwiz`   ``vizwiz``
VizWiz as OpenFlamingo has it   :func:`read_vqa`      ``vizwiz-openflamingo``
VL-ICL: images to text          :func:`read_vl_icl`   ``vl-icl:clevr``, ``vl-icl:textocr``, ``vl-icl:matching_mi``,
                                                      ``vl-icl:operator_induction:+`` (and ``-``, ``x``),
                                                      ``vl-icl:operator_induction_interleaved:+`` (and ``-``, ``x``)
VL-ICL: ``open_mi``             :func:`read_open_mi`  (its demonstrations belong to the query)
TrueMICL                        :func:`read_truemicl` ``truemicl:sudoku``, ``truemicl:<task>``
=============================== ===================== =================================================================

A pool, from which demonstrations are chosen, and queries stay apart as their authors have them apart: the training and
the validation split, or ``support`` and ``query``. :func:`check_disjoint` looks whether they share images.

Nothing is skipped: what is missing, doubled or of another type is an error that names the file, the entry, counted
from 1, and the field.

Not read are VL-ICL's tasks whose answers are images or whose questions are text only.
"""

from probe.data.published.disjoint import check_disjoint
from probe.data.published.names import NAMES, read_published
from probe.data.published.split import Published
from probe.data.published.truemicl import read_truemicl
from probe.data.published.vl_icl import read_open_mi, read_vl_icl
from probe.data.published.vqa import ShownAnswer, read_vizwiz, read_vqa

__all__ = [
    "NAMES",
    "Published",
    "ShownAnswer",
    "check_disjoint",
    "read_open_mi",
    "read_published",
    "read_truemicl",
    "read_vizwiz",
    "read_vl_icl",
    "read_vqa",
]
