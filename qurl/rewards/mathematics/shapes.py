"""What kind of thing an answer is: a quantity, a tuple or interval, a set, a relation, a matrix, a union of intervals, a word.

An answer in `canonical` form is split at the signs outside all brackets; only what holds none of them is read as an expression."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

from qurl.rewards.mathematics.expressions import Node, Unreadable, parse
from qurl.rewards.mathematics.units import Unit, split_unit

MAX_ITEMS = 60
RELATIONS = ("=", "<", ">", "\\le", "\\ge", "\\ne", "\\in")
PIECE = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
DECIMAL = re.compile(r"-?\s*(\d*\.\d+|\d+\.?)(?:\s*(?:\\times|\\cdot)\s*10\s*\^\s*\{?\s*([-+]?\s*\d{1,4})\s*\}?)?")
SCIENTIFIC = re.compile(r"(-?\s*(?:\d+\.?\d*|\.\d+))\s*[eE]\s*([-+]?\d{1,4})")
MATRIX = re.compile(r"\\begin\s*\{([pbvBV]?matrix|array)\}(?:\s*\{[clr|\s]*\})?(.*)\\end\s*\{\1\}", re.DOTALL)
WORD = re.compile(r"\(?\s*(?:\\text\s*\{([^{}]*)\}|([a-zA-Z][a-zA-Z' -]*))\s*\)?")
BASED = re.compile(r"\(?(-?[0-9A-Z]+)\)?\s*_\s*\{?\s*(\d+)\s*\}?")


@dataclass(frozen=True, slots=True)
class Shape:
    """Anything an answer can be; use one of the subclasses."""

    text: str


@dataclass(frozen=True, slots=True)
class Quantity(Shape):
    """An expression, perhaps with a unit. `nodes`: its readings, of which a slash may allow two."""

    nodes: tuple[Node, ...]
    unit: Unit | None = None
    is_percent: bool = False
    digits: tuple[int, int] | None = None  # of a decimal as written: significant ones, and places behind the point


@dataclass(frozen=True, slots=True)
class Items(Shape):
    """Several things: in parentheses or brackets in order (a tuple or interval), in braces or bare as a set."""

    items: tuple[Shape, ...]
    opener: str = ""
    closer: str = ""
    is_alternative: bool = False  # joined by "or"


@dataclass(frozen=True, slots=True)
class Relation(Shape):
    """Sides with signs of `RELATIONS` between them."""

    sides: tuple[Shape, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sets(Shape):
    """Two sets joined by `\\cup`, `\\cap` or `\\setminus`."""

    sides: tuple[Shape, Shape]
    sign: str


@dataclass(frozen=True, slots=True)
class Matrix(Shape):
    """Rows of entries."""

    rows: tuple[tuple[Shape, ...], ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Based(Shape):
    """Digits with a base: 1011_2."""

    digits: str
    base: str


@dataclass(frozen=True, slots=True)
class Word(Shape):
    """Words that are no mathematics; `is_text` where they stand in \\text."""

    word: str
    is_text: bool


@dataclass(frozen=True, slots=True)
class Opaque(Shape):
    """What this reader does not know."""


def read(text: str, letters: bool = False) -> Shape:
    """Return the shape of an answer in `canonical` form. letters: see `units.split_unit`.

    Example:
        >>> type(read("(1,2)")).__name__, type(read("x \\\\ge 2")).__name__, type(read("5 \\\\text{cm}")).__name__
        ('Items', 'Relation', 'Quantity')
    """
    text = _bare(text.strip())
    for separators in ((";",), (",", "\\lor")):
        parts, found = split(text, separators)
        if found:
            items = [part for part in parts if part.strip()]
            return Items(text, _read_all(items, letters), is_alternative="\\lor" in found)
    based = BASED.fullmatch(text)
    if based:
        return Based(text, based[1], based[2])
    matrix = MATRIX.fullmatch(text)
    if matrix:
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", matrix[2]) if row.strip().replace("\\hline", "")]
        return Matrix(text, tuple(_read_all(row.split("&"), letters) for row in rows))
    sides, signs = split(text, RELATIONS)
    if len(sides) > 1:
        if not sides[0].strip():
            return read(text[text.index(signs[0]) + len(signs[0]) :], letters) if signs == ["="] else Opaque(text)
        return Relation(text, _read_all(sides, letters), tuple(signs))
    for group in (("\\setminus",), ("\\cup", "\\cap")):
        sides, signs = split(text, group)
        if len(sides) > 1:
            last = text.rindex(signs[-1])
            left, right = text[:last], text[last + len(signs[-1]) :]
            return Sets(text, (read(left, letters), read(right, letters)), signs[-1])
    return _enclosed(text, letters) or _signs(text, letters) or _leaf(text, letters)


def split(text: str, signs: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return the parts of `text` between any of `signs` outside all brackets, and the signs."""
    parts, found, depth, begin = [], [], 0, 0
    for piece in PIECE.finditer(text):
        token = piece[0]
        if token in ("(", "[", "{", "\\{", "\\langle", "\\begin", "\\lfloor", "\\lceil"):
            depth += 1
        elif token in (")", "]", "}", "\\}", "\\rangle", "\\end", "\\rfloor", "\\rceil"):
            depth -= 1
        elif depth == 0 and token in signs:
            parts.append(text[begin : piece.start()])
            found.append(token)
            begin = piece.end()
    return [*parts, text[begin:]], found


def nesting(text: str) -> int:
    """Return the depth of the deepest brackets."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _read_all(parts: list[str], letters: bool) -> tuple[Shape, ...]:
    if len(parts) > MAX_ITEMS:
        raise Unreadable("more items than an answer has")
    return tuple(read(part, letters) for part in parts)


def _closes_last(text: str, opener: str) -> bool:
    """Whether the bracket that opens `text` closes at its very end."""
    depth = 0
    for piece in PIECE.finditer(text):
        token = piece[0]
        depth += (token in ("(", "[", "{", "\\{", "\\langle")) - (token in (")", "]", "}", "\\}", "\\rangle"))
        if depth == 0:
            return piece.end() == len(text) and text.startswith(opener)
    return False


def _bare(text: str) -> str:
    while text.startswith("{") and text.endswith("}") and _closes_last(text, "{"):
        text = text[1:-1].strip()
    return text


def _enclosed(text: str, letters: bool) -> Shape | None:
    """Read a tuple, interval or set; parentheses around one thing mean nothing."""
    for opener in ("\\{", "\\langle", "(", "["):
        if not (text.startswith(opener) and _closes_last(text, opener)):
            continue
        closer = next(c for c in ("\\}", "\\rangle", ")", "]") if text.endswith(c))
        inner = text[len(opener) : -len(closer)]
        if opener == "\\{":
            condition = re.match(r"\s*[a-zA-Z]\s*(?:\\in\s*(?:\\mathbb\{R\}|R)\s*)?(?:\\mid|\||:)(.*)", inner, re.DOTALL)
            if condition:
                return read(condition[1], letters)
            parts = [part for part in split(inner, (",", ";"))[0] if part.strip()]
            return Items(text, _read_all(parts, letters), "\\{", "\\}")
        parts = split(inner, (",", ";"))[0]
        if len(parts) > 1:
            shown = ("(", ")") if opener == "\\langle" else (opener, closer)
            return Items(text, _read_all(parts, letters), *shown)
        if opener == "(" and closer == ")":
            return read(inner, letters)
        if opener == "[" and closer == "]":
            return read(inner, letters)
    return None


def _signs(text: str, letters: bool) -> Shape | None:
    """Read `a \\pm b` as its two values."""
    if not re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text):
        return None
    values = [
        re.sub(r"\\mp(?![a-zA-Z])", f" {other} ", re.sub(r"\\pm(?![a-zA-Z])", f" {sign} ", text)) for sign, other in ("+-", "-+")
    ]
    return Items(text, _read_all(values, letters))


def _leaf(text: str, letters: bool) -> Shape:
    given, text = text, re.sub(r"^\\text\{\s*(?:\\?\$|euros|pounds)\s*\}", "", text)
    is_percent = text.endswith("\\%")
    text, unit = split_unit(text.removesuffix("\\%").rstrip(), letters)
    if text != given and _closes_last(text, "(") and len(split(text[1:-1], (",",))[0]) > 1:  # (3,-1,2) units
        return read(text, letters)
    scientific = SCIENTIFIC.fullmatch(text)
    if scientific:
        text = rf"{scientific[1]} \times 10^{{{int(scientific[2])}}}"
    nodes = []
    for tight in (False, True) if "/" in text else (False,):
        try:
            nodes.append(parse(text, tight))
        except (Unreadable, RecursionError):
            continue
    word = WORD.fullmatch(given)
    if word and (word[1] is not None or not nodes or len(re.sub(r"[^a-zA-Z]", "", word[2])) > 2):
        shown = (word[1] if word[1] is not None else word[2]).strip()
        if word[1] is not None or " " in shown or not nodes:
            return Word(given, shown, word[1] is not None)
    if not nodes:
        return Opaque(given)
    decimal = DECIMAL.fullmatch(text)
    digits = None
    if decimal and "." in decimal[1]:
        places = len(decimal[1].partition(".")[2]) - int((decimal[2] or "0").replace(" ", ""))
        digits = len(decimal[1].replace(".", "").lstrip("0")), places
    if is_percent:
        nodes = [Node("div", (node, Node("number", value=Fraction(100)))) for node in nodes]
    return Quantity(given, tuple(nodes), unit, is_percent, digits)
