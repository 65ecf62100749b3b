"""The words of the synthetic tasks: two vocabularies for the same attribute values, nonce words, questions."""

from __future__ import annotations

from probe.data.scenes import ATTRIBUTES, DIGITS, KINDS, VALUES

ENGLISH: dict[str, tuple[str, ...]] = {
    "colour": VALUES["colour"],
    "kind": KINDS,
    "count": ("one", "two", "three", "four"),
    "size": VALUES["size"],
}

ITALIAN: dict[str, tuple[str, ...]] = {
    "colour": ("rosso", "verde", "blu", "giallo", "arancio", "viola", "rosa", "ciano"),
    "kind": (
        *("cerchio", "quadrato", "triangolo", "stella", "croce", "cuore", "rombo", "anello"),
        *("zero", "uno", "due", "tre", "quattro", "cinque", "sei", "sette", "otto", "nove"),
    ),
    "count": ("singolo", "coppia", "trio", "quartetto"),
    "size": ("piccolo", "grande"),
}

LANGUAGES = {"english": ENGLISH, "italian": ITALIAN}

PLURALS = (
    *("circles", "squares", "triangles", "stars", "crosses", "hearts", "diamonds", "rings"),
    *(f"{digit}s" for digit in DIGITS),
)

NONCE = (
    *("dax", "wug", "blick", "toma", "fep", "gorp", "zav", "kiki", "bouba", "mib", "lorp", "snark"),
    *("plim", "vash", "quib", "drun", "yeth", "jirp", "nalo", "cagu", "slok", "hobu", "terv", "murg"),
    *("ponk", "rilf", "sefi", "wazo", "glim", "doff", "krel", "bawn", "fust", "zelt", "nibo", "tarn"),
    *("chob", "vure", "pask", "lumo", "grib", "hain", "jovo", "skep", "threl", "ombi", "quon", "yarb"),
)

NUMERALS = tuple("0123456789")

CUES = {attribute: f"{attribute}?" for attribute in ATTRIBUTES}
"""The question that names an attribute."""

UNCUED = "?"
"""The question that leaves it to the demonstrations what is asked."""

DESCRIBE = "describe:"
