"""One small file a family: what is special about it."""

from __future__ import annotations

from collections.abc import Mapping

from probe.models.families.gemma3 import GEMMA3
from probe.models.families.idefics import IDEFICS
from probe.models.families.idefics2 import IDEFICS2
from probe.models.families.idefics3 import IDEFICS3, SMOLVLM
from probe.models.families.internvl import INTERNVL
from probe.models.families.llava import LLAVA
from probe.models.families.llava_next import LLAVA_NEXT
from probe.models.families.llava_onevision import LLAVA_ONEVISION
from probe.models.families.mllama import MLLAMA
from probe.models.families.paligemma import PALIGEMMA
from probe.models.families.qwen import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from probe.models.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(QWEN2_5_VL, QWEN2_VL, QWEN3_VL),
        *(LLAVA, LLAVA_NEXT, LLAVA_ONEVISION),
        *(IDEFICS, IDEFICS2, IDEFICS3, SMOLVLM),
        *(INTERNVL, GEMMA3, PALIGEMMA, MLLAMA),
    )
}
"""All families by ``model_type``."""

ALIASES: Mapping[str, str] = {alias: repo for family in FAMILIES.values() for alias, repo in family.aliases.items()}
"""Short names of checkpoints: the repository of each."""
