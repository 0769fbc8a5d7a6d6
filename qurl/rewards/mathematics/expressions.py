"""A reader of LaTeX expressions: text to a tree of numbers, symbols and operations, in time linear in its length.

Case counts, primes and accents belong to a symbol's name, decimals are exact fractions, and `2\\frac{1}{2}` is a mixed number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

MAX_DEPTH = 60  # of nested groups; deeper text is no answer
TOKEN = re.compile(r"\s*(?:(\\(?:[a-zA-Z]+|.))|(\d+\.(?=\s*\\overline)|\d+(?:\.\d+)?|\.\d+)|([a-zA-Z])|(\S))", re.DOTALL)
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth ln log exp gcd lcm max min".split()
)
INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot", "sec": "arcsec", "csc": "arccsc"}
ACCENTS = frozenset("dot ddot hat widehat bar overline vec overrightarrow tilde widetilde underline mathring".split())
UNKNOWN_FUNCTIONS = frozenset("fghFGHPQ")  # f(x+1) is no product
CONSTANTS = {"pi": "pi", "infty": "infty"}
NOT_SYMBOLS = frozenset(
    "cup cap setminus in notin ne le ge to pm mp sum prod int iint oint lim begin end mod pmod bmod ldots cdots dots vdots lor mid "
    "subset subseteq perp parallel forall exists neg iff % overset underset stackrel xrightarrow substack cases nabla".split()
)
CLOSERS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}


class Unreadable(ValueError):
    """The text is no expression that this reader knows."""


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. `kind`: number, symbol, constant, add, mul, div, pow, neg, call (of a known or unknown function)."""

    kind: str
    args: tuple[Node, ...] = ()
    value: Fraction | str | None = None  # of a number; the name of a symbol, constant or function


def number(value: int | Fraction) -> Node:
    """Return a number's node."""
    return Node("number", value=Fraction(value))


@lru_cache(maxsize=512)
def parse(text: str, tight: bool = False) -> Node:
    """Return the tree of a LaTeX expression in `canonical` form. Unreadable where it is none.

    tight: whether a product without a sign binds tighter than `/`, so that 1/2x is 1/(2x).

    Example:
        >>> parse("x-3").kind
        'add'
    """
    reader = _Reader(_tokens(text), tight)
    tree = reader.sum()
    if reader.peek() != "":
        raise Unreadable(f"{reader.peek()!r} in {text[:80]!r}")
    return tree


def _tokens(text: str) -> list[str]:
    return [next(filter(None, found.groups())) for found in TOKEN.finditer(text)]


class _Reader:
    """A recursive descent over tokens; the position only moves forward."""

    def __init__(self, tokens: list[str], tight: bool) -> None:
        self._tokens = [*tokens, ""]
        self._at = 0
        self._tight = tight
        self._depth = 0
        self._bars = 0  # open absolute values, inside which a bar closes

    def peek(self, ahead: int = 0) -> str:
        """Return a coming token; "" at the end."""
        return self._tokens[min(self._at + ahead, len(self._tokens) - 1)]

    def sum(self) -> Node:
        """Read terms with signs between them."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        terms = [self._term()]
        while self.peek() in ("+", "-"):
            sign = self._next()
            term = self._term()
            terms.append(Node("neg", (term,)) if sign == "-" else term)
        self._depth -= 1
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def _next(self) -> str:
        token = self.peek()
        self._at += 1
        return token

    def _expect(self, token: str) -> None:
        if self._next() != token:
            raise Unreadable(f"no {token!r} where one is due")

    def _term(self) -> Node:
        left = self._signed()
        while True:
            token = self.peek()
            if token in ("\\cdot", "\\times", "*"):
                self._at += 1
                left = Node("mul", (left, self._signed()))
            elif token in ("/", ":"):
                self._at += 1
                divisor = self._signed()
                while self._tight and self._starts_factor():
                    divisor = Node("mul", (divisor, self._factor()))
                left = Node("div", (left, divisor))
            elif self._starts_factor():
                left = self._beside(left)
            else:
                return left

    def _beside(self, left: Node) -> Node:
        """Read a factor without a sign before it: of a product, or of a mixed number, whose parts have no parentheses."""
        is_bare = self.peek(-1)[:1].isdigit() and self.peek() not in CLOSERS
        right = self._factor()
        if not is_bare:
            return Node("mul", (left, right))
        whole = left.args[0] if left.kind == "neg" else left
        is_fraction = right.kind == "div" and all(part.kind == "number" for part in right.args)
        if whole.kind == "number" and isinstance(whole.value, Fraction) and whole.value.denominator == 1 and is_fraction:
            mixed = Node("add", (whole, right))
            return Node("neg", (mixed,)) if left.kind == "neg" else mixed
        if right.kind == "number" and left.kind in ("number", "neg"):
            if self.peek() == "/" and re.fullmatch(r"\d+", self.peek(1)) and whole.kind == "number":  # 1 1/4
                self._at += 1
                mixed = Node("add", (whole, Node("div", (right, number(int(self._next()))))))
                return Node("neg", (mixed,)) if left.kind == "neg" else mixed
            raise Unreadable("two numbers side by side")
        return Node("mul", (left, right))

    def _signed(self) -> Node:
        if self.peek() == "-":
            self._at += 1
            return Node("neg", (self._signed(),))
        if self.peek() == "+":
            self._at += 1
            return self._signed()
        return self._factor()

    def _starts_factor(self) -> bool:
        token = self.peek()
        if token == "|":
            return self._bars == 0
        if token.startswith("\\"):
            name = token[1:]
            return name == "{" or name in ("lfloor", "lceil") or (name.isalpha() and name not in NOT_SYMBOLS | {"rfloor", "rceil"}
                                                                  and name not in ("cdot", "times", "circ", "rangle"))  # fmt: skip
        return token in ("(", "[", "{") or token.isalnum() or token[:1].isdigit() or token[:1] == "."

    def _factor(self) -> Node:
        node = self._atom()
        while True:
            token = self.peek()
            if token == "^":
                self._at += 1
                if self.peek() == "\\circ":  # degrees are what they are numbers of
                    self._at += 1
                    continue
                node = Node("pow", (node, self._argument(is_exponent=True)))
            elif token == "!":
                self._at += 1
                if self.peek() == "!":
                    self._at += 1
                    node = Node("call", (node,), "double_factorial")
                else:
                    node = Node("call", (node,), "factorial")
            else:
                return node

    def _atom(self) -> Node:
        token = self._next()
        if token in CLOSERS:
            inner = self._group(token)
            kind = {"\\lfloor": "floor", "\\lceil": "ceil"}.get(token)
            return Node("call", (inner,), kind) if kind else inner
        if token == "|":
            self._bars += 1
            inner = self.sum()
            self._bars -= 1
            self._expect("|")
            return Node("call", (inner,), "abs")
        if token[:1].isdigit() or (token[:1] == "." and len(token) > 1):
            return self._decimal(token)
        if token.isalpha():
            return self._symbol(token)
        if token.startswith("\\") and token[1:].isalpha():
            return self._command(token[1:])
        raise Unreadable(f"{token!r}")

    def _group(self, opener: str) -> Node:
        bars, self._bars = self._bars, 0
        inner = self.sum()
        self._bars = bars
        self._expect(CLOSERS[opener])
        return inner

    def _decimal(self, token: str) -> Node:
        if self.peek() == "_":
            raise Unreadable("a base")
        if self.peek() == "\\overline" and "." in self._tokens[max(self._at - 2, 0) : self._at] + list(token):  # 0.1\overline{6}
            self._at += 1
            self._expect("{")
            period = self._next()
            self._expect("}")
            if not period.isdigit():
                raise Unreadable("a period without digits")
            digits = len(token.partition(".")[2])
            return number(Fraction(token + "0" * (token[-1] == ".")) + Fraction(int(period), (10 ** len(period) - 1) * 10**digits))
        return number(Fraction(token))

    def _argument(self, is_exponent: bool = False) -> Node:
        """Read one argument of a command: a group, or one digit, letter or command."""
        token = self._next()
        if token in ("{", "("):
            return self._group(token)
        if token[:1].isdigit() and len(token) > 1 and not is_exponent:  # \frac12 is one half
            self._at -= 1
            self._tokens[self._at] = token[1:]
            return number(int(token[0]))
        if is_exponent and token == "-":
            return Node("neg", (self._argument(is_exponent),))
        self._at -= 1
        if token == "" or not (token.isalnum() or token.startswith("\\") or token[0].isdigit()):
            raise Unreadable("no argument")
        return self._atom()

    def _command(self, name: str) -> Node:
        if name == "frac":
            return Node("div", (self._argument(), self._argument()))
        if name == "sqrt":
            degree = number(2)
            if self.peek() == "[":
                self._at += 1
                degree = self._group("[")
            return Node("call", (self._argument(), degree), "root")
        if name in ("binom", "dbinom", "tbinom", "choose"):
            return Node("call", (self._argument(), self._argument()), "binom")
        if name in FUNCTIONS:
            return self._function(name)
        if name in CONSTANTS:
            return Node("constant", value=CONSTANTS[name])
        if name == "text" and self.peek() == "{":
            return self._symbol(self._raw_group().strip().lower())
        if name in ACCENTS:
            inner = self._raw_group() if self.peek() == "{" else self._next()
            return self._symbol(f"{name} {inner}".replace("widehat", "hat").replace("overline", "bar"))
        if name in NOT_SYMBOLS:
            raise Unreadable(name)
        return self._symbol(f"\\{name}")

    def _function(self, name: str) -> Node:
        base, power = None, None
        while self.peek() in ("^", "_"):
            if self._next() == "^":
                power = self._argument(is_exponent=True)
            else:
                base = self._argument()
        if power == Node("neg", (number(1),)) and name in INVERSE:
            name, power = INVERSE[name], None
        if self.peek() in ("(", "[", "{"):
            opener = self._next()
            arguments = [self.sum()]
            while self.peek() == ",":
                self._at += 1
                arguments.append(self.sum())
            self._expect(CLOSERS[opener])
            argument = tuple(arguments)
            if self.peek() == "^" and power is None:  # \sin(x)^2
                self._at += 1
                power = self._argument(is_exponent=True)
            elif self.peek() == "!":
                raise Unreadable("a factorial of a function")
        else:
            argument = (self._bare_argument(),)
        node = Node("call", argument + ((base,) if base else ()), f"{name}_base" if base else name)
        return Node("pow", (node, power)) if power else node

    def _bare_argument(self) -> Node:
        """Read what a function without parentheses takes: factors up to a sign or the next function."""
        node = self._signed()
        while self._starts_factor() and self.peek()[1:] not in FUNCTIONS and self.peek() not in ("(", "["):
            node = self._beside(node)
        while self.peek() == "/" and re.fullmatch(r"\d+|[a-zA-Z]", self.peek(1)):  # \sin x/2
            self._at += 1
            node = Node("div", (node, self._factor()))
        return node

    def _symbol(self, name: str) -> Node:
        while self.peek() in ("_", "'") or (self.peek() == "^" and self.peek(1) == "\\prime"):
            if self._next() == "_":
                below = self._raw_group() if self.peek() == "{" else self._next()
                name += "_" + re.sub(r"\\text|[{}\s]", "", below)
            else:
                name += "'"
                self._at += self.peek() == "\\prime"
        letter = name[0]
        if self.peek() == "(" and (letter in UNKNOWN_FUNCTIONS and len(name.rstrip("'")) == 1 or "'" in name):
            self._at += 1
            arguments = [self.sum()]
            while self.peek() == ",":
                self._at += 1
                arguments.append(self.sum())
            self._expect(")")
            return Node("call", tuple(arguments), f"?{name}")
        return Node("symbol", value=name)

    def _raw_group(self) -> str:
        """Read a group as it is written, which names something."""
        self._expect("{")
        parts, depth = [], 1
        while depth:
            token = self._next()
            depth += {"{": 1, "}": -1, "": -99}.get(token, 0)
            if depth < 0:
                raise Unreadable("an open group")
            parts.append(token)
        return "".join(parts[:-1])
