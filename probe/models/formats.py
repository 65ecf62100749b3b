"""Prompt formats for models without a chat template, written as chat templates.

An episode is a conversation: the user shows an image and asks, the assistant answers. A base model was never taught to
chat, but continues text in which image, question and answer follow one another. Such a format is a Jinja template like
any other, so the rest of probe does not know the difference; a template of your own is a file of the same kind.

============ ====================================================================================== ==================
format       a demonstration                                                                        used by
============ ====================================================================================== ==================
``live``     ``<image>Question:… Short answer:….``, blank line; an instruction before the first     LIVE (VQA)
``mimic``    ``Image:<image> Question: … Answer: …``, line break; an instruction before the first   MimIC (Idefics)
``flamingo`` ``<image>Question:… Short answer:…<|endofchunk|>``                                     OpenFlamingo (VQA)
``pair``     ``<image><bos>…``, line break, answer, line break                                      PaliGemma, repeated
============ ====================================================================================== ==================

Where a demonstration has several images they follow one another. What the ends of demonstrations look like in the
released code of these papers is in ``docs/families.md``.
"""

from __future__ import annotations

_INSTRUCTION = "Provide an answer to the question. Use the image to answer.\n"


def _interleaved(user: str, answer: str, end: str, *, instruction: str = "", before: str = "", after: str = "") -> str:
    """A template.

    ``user`` is a question's turn with ``{images}`` and ``{text}``, ``answer`` what stands before an answer, ``end``
    what ends a demonstration; ``before`` and ``after`` stand around images, where there are any.
    """
    images = (
        "{% for part in message['content'] if part['type'] == 'image' %}"
        f"{{% if loop.first %}}{before}{{% endif %}}IMAGE{{% if loop.last %}}{after}{{% endif %}}{{% endfor %}}"
    )
    text = "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    asked = user.replace("{images}", images).replace("{text}", text)
    template = (
        f"{instruction}{{% for message in messages %}}{{% if message['role'] == 'user' %}}{asked}"
        f"{{% else %}}{answer}{text}{end}{{% endif %}}{{% endfor %}}"
    )
    # A line break behind a block would be trimmed by the settings under which transformers runs templates.
    return template.replace("\n", "{{ '\\n' }}")


FORMATS = {
    "live": _interleaved("{images}Question:{text} Short answer:", "", ".\n\n", instruction=_INSTRUCTION),
    "mimic": _interleaved(
        "{images}Question: {text} Answer:",
        " ",
        "\n",
        instruction=f"Instruction: {_INSTRUCTION}",
        before="Image:",
        after=" ",
    ),
    "flamingo": _interleaved("{images}Question:{text} Short answer:", "", "<|endofchunk|>"),
    "pair": _interleaved("{images}{{ bos_token }}{text}\n", "", "\n"),
}
"""Templates by name; ``IMAGE`` stands for the family's placeholder."""


def template_of(name: str, placeholder: str) -> str:
    """The template of a format, for a family that writes an image as ``placeholder``."""
    return FORMATS[name].replace("IMAGE", placeholder)
