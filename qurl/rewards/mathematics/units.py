"""Units behind a number. A missing unit is as good as none; another unit must give the same quantity: 5 km is 5000 m."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_UNITS = {  # dimension: {names: size}
    "length": {
        "m meter metre": "1", "km kilometer kilometre": "1000", "cm centimeter centimetre": "1/100",
        "mm millimeter millimetre": "1/1000", "nm nanometer nanometre": "1/1000000000", "in inch inches": "127/5000",
        "ft foot feet": "381/1250", "yd yard": "1143/1250", "mi mile": "201168/125",
    },
    "time": {
        "s sec second": "1", "ms millisecond": "1/1000", "min minute": "60", "h hr hour": "3600", "day": "86400", "week": "604800",
    },
    "mass": {"kg kilogram": "1000", "g gram gm": "1", "mg milligram": "1/1000", "lb lbs pound": "45359237/100000"},
    "volume": {"l liter litre": "1", "ml milliliter millilitre": "1/1000"},
    "money": {"dollar": "1", "cent": "1/100"},
    "angle": {"degree": "1", "rad radian": "radians"},
    "temperature": {"k kelvin": "1"}, "force": {"n newton": "1"}, "energy": {"j joule": "1"}, "power": {"w watt": "1"},
    "speed": {"mph": "1397/3125", "m/s": "1", "km/h kmh kmph": "5/18", "cm/s": "1/100"},
    "frequency": {"hz hertz": "1"},
}  # fmt: skip
KNOWN = {name: (dimension, size) for dimension, units in _UNITS.items() for names, size in units.items() for name in names.split()}
# a unit that needs no \text: words, and abbreviations that nobody takes for a product
PLAIN = sorted((name for name in KNOWN if len(name) > 2 or name in ("km", "cm", "mm", "ft", "kg")), key=len, reverse=True)
SPELLED = re.compile(rf"(?<=[\d}}\s)])\s*(?<![a-zA-Z\\])({'|'.join(PLAIN)})(?:e?s)?(?:\s*\^\s*\{{?([23])\}}?)?$")
LETTER = re.compile(r"(?<=[\d}])\s+([a-zA-Z]{1,2})(?:\s*\^\s*\{?([23])\}?)?$")
WORDED = re.compile(r"\s*\\text\s*\{\s*([^{}]*?)\s*\}((?:\s*(?:/|\\cdot|\^\s*\{?-?\d\}?|\\text\s*\{[^{}]*\}))*)$")


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit as read: one of `KNOWN` has a dimension and a size, any other only its words."""

    words: str
    dimension: str = ""
    size: str = ""


def split_unit(text: str, letters: bool) -> tuple[str, Unit | None]:
    """Return an expression in `canonical` form without the unit behind it, and the unit.

    letters: whether a letter after a space is a unit ("5 m"), which it is not where the truth has that letter as a symbol.

    Example:
        >>> split_unit("5 \\\\text{cm}", letters=False)
        ('5', Unit(words='cm', dimension='length', size='1/100'))
    """
    found = WORDED.search(text)
    if found and text[: found.start()].strip():
        words = found[1] + re.sub(r"\\text|[{}\s]", "", found[2])
        return text[: found.start()].rstrip().removesuffix("\\cdot").rstrip(), _unit(words)
    found = SPELLED.search(text)
    if found and text[: found.start()].strip():
        return text[: found.start()].rstrip(), _unit(found[1] + (f"^{found[2]}" if found[2] else ""))
    found = LETTER.search(text) if letters else None
    if found and found[1] in KNOWN and re.search(r"[\d}]$", text[: found.start()]):
        return text[: found.start()].rstrip(), _unit(found[1] + (f"^{found[2]}" if found[2] else ""))
    if text.endswith("^\\circ") and len(text) > 6:
        return text[:-6].rstrip(), _unit("degree")
    return text, None


def _unit(words: str) -> Unit:
    words = " ".join(words.lower().replace(".", "").split())
    power = re.fullmatch(r"(?:(square|sq|cubic|cu) )?(.*?)(?:\^([23]))?", words)
    assert power is not None
    exponent = {"square": "2", "sq": "2", "cubic": "3", "cu": "3", None: power[3] or "1"}[power[1]]
    name = power[2].replace(" per ", "/").replace("seconds", "s").replace("second", "s").replace("hours", "h").replace("hour", "h")
    for candidate in (power[2], power[2].removesuffix("s"), power[2].removesuffix("es"), name, name.replace("meters/", "m/")):
        if candidate in KNOWN:
            dimension, size = KNOWN[candidate]
            return Unit(words, f"{dimension}^{exponent}", size)
    return Unit(words)


def factor_between(truth: Unit | None, answer: Unit | None) -> Fraction | None:
    """Return by what the answer's number must be multiplied to be in the truth's unit; None where the units contradict."""
    if truth is None or answer is None or not truth.dimension or not answer.dimension or truth.size == answer.size == "radians":
        return Fraction(1)
    if truth.dimension != answer.dimension or "radians" in (truth.size, answer.size):
        return None
    exponent = int(truth.dimension[-1])
    return (Fraction(answer.size) / Fraction(truth.size)) ** exponent
