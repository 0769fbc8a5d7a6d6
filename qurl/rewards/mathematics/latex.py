"""One spelling for what people write in many: Unicode, plain text and LaTeX that changes only looks become plain LaTeX."""

from __future__ import annotations

import re
import unicodedata

SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f", "0123456789+-n")
SUBSCRIPTS = str.maketrans("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089\u2090\u2099", "0123456789an")
UNICODE = {
    "\u221a": "\\sqrt ", "\u221b": "\\sqrt[3]", "\u221e": "\\infty ", "\u03c0": "\\pi ", "\u00d7": "\\times ", "\u00b7": "\\cdot ",
    "\u22c5": "\\cdot ", "\u2219": "\\cdot ", "\u00f7": "/", "\u2212": "-", "\u2013": "-", "\u2010": "-", "\u2011": "-",
    "\u2264": "\\le ", "\u2265": "\\ge ", "\u2a7d": "\\le ", "\u2a7e": "\\ge ", "\u2260": "\\ne ", "\u2248": "=",
    "\u222a": "\\cup ", "\u2229": "\\cap ", "\u2208": "\\in ", "\u2205": "\\emptyset ", "\u00b0": "^\\circ ", "\u00ba": "^\\circ ",
    "\u211d": "\\mathbb{R}", "\u2124": "\\mathbb{Z}", "\u2115": "\\mathbb{N}", "\u211a": "\\mathbb{Q}", "\u2102": "\\mathbb{C}",
    "\u230a": "\\lfloor ", "\u230b": "\\rfloor ", "\u2308": "\\lceil ", "\u2309": "\\rceil ", "\u2032": "'", "\u2033": "''",
    "\u2019": "'", "\u2216": "\\setminus ", "\u00b1": "\\pm ", "\u2213": "\\mp ", "\u27e8": "\\langle ", "\u27e9": "\\rangle ",
    "\u2220": "\\angle ", "\u2223": "|", "\u2211": "\\sum ", "\u222b": "\\int ", "\u2044": "/", "\u2215": "/",
    "\u20ac": "\\text{euros}", "\u00a3": "\\text{pounds}", "\u2026": "\\ldots ", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
}  # fmt: skip
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
).split()
for _name in GREEK:
    _size = "CAPITAL" if _name[0].isupper() else "SMALL"
    _letter = unicodedata.lookup(f"GREEK {_size} LETTER {_name.upper().replace('LAMBDA', 'LAMDA')}")
    UNICODE.setdefault(_letter, f"\\{_name} ")
UNICODE["\u00b5"] = UNICODE["\u03bc"]
FUNCTIONS = (
    "arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth sin cos tan cot sec csc ln log exp gcd lcm max min det"
).split()

TEXT_COMMANDS = "mathrm|textrm|mbox|textbf|textit|textnormal|textsf|texttt|mathsf|mathit|mathtt|hbox|operatorname\\*?|text"
ENVIRONMENTS = "aligned|align\\*?|gathered|split|equation\\*?"
LOOKS = (
    (r"\\(?:left|right|middle|[bB]ig+[lrm]?)(?![a-zA-Z])\s*\.?(?=\s*[\[\](){}|\\/]|$)", ""),
    (r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|hfill|cal)(?![a-zA-Z])", ""),
    (r"\\(?:hspace|vspace|phantom|label|tag)\*?\{[^{}]*\}", " "),
    (r"\\!", ""),
    (r"(?<!\\)\\(?:[,;:> ]|(?:quad|qquad|enspace|thinspace|thickspace)(?![a-zA-Z]))|~", " "),
    (r"(?<!\\)\\[()\[\]]|\\?\$", ""),
    (r"\{,\}", ","),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (rf"\\(?:{TEXT_COMMANDS})(?=\s*\{{)", r"\\text"),
    (r"\{\\(?:rm|bf|it|sf)\s+([^{}]*)\}", r"\\text{\1}"),
    (r"\\(?:rm|bf|it)\s+([a-zA-Z]+)", r"\\text{\1}"),
    (r"\\(?:rm|bf|it|sf)(?![a-zA-Z])", ""),
    (rf"\\text\s*\{{\s*({'|'.join(FUNCTIONS)})\s*\}}(?!\s*$)", r"\\\1 "),
    (r"\\text\s*\{\s*\}", ""),
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ|\\degree(?![a-zA-Z])|\\text\{\s*(?:degrees?|deg)\s*\}", r"^\\circ "),
    (r"\\%|(?<!\\)%|\\text\{\s*(?:percent|%|\\%)\s*\}", r"\\% "),
    (rf"\\begin\{{(?:{ENVIRONMENTS})\}}|\\end\{{(?:{ENVIRONMENTS})\}}", " "),
    (r"\\text\s*\{\s*,?\s*or\s*,?\s*\}|(?<![a-zA-Z\\{])\bor\b(?![^{}]*\})|\\(?:lor|vee)(?![a-zA-Z])", r" \\lor "),
    (r"\\text\s*\{\s*,?\s*and\s*,?\s*\}|(?<![a-zA-Z\\{])\band\b(?![^{}]*\})|\\land(?![a-zA-Z])", ","),
)  # fmt: skip
"""What is spelled in one way first; the rest only outside \\text."""
MATHEMATICS = (
    (r"\\varnothing|\\O(?![a-zA-Z])", r"\\emptyset "),
    (r"\\\{\s*\\\}", r"\\emptyset "),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"), (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"\\lbrack(?![a-zA-Z])", "["), (r"\\rbrack(?![a-zA-Z])", "]"),
    (r"\\(?:lvert|rvert|vert)(?![a-zA-Z])", "|"),
    (r"\\(?:leq|leqslant|leqq)(?![a-zA-Z])|<=|=<", r"\\le "), (r"\\(?:geq|geqslant|geqq)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\neq?(?![a-zA-Z])|\\not\s*=|!=", r"\\ne "), (r"\\lt(?![a-zA-Z])", "<"), (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\(?:approx|simeq|doteq|cong|equiv(?!.*mod))(?![a-zA-Z])|:=", "="),
    (r"\\(?:ast|bullet)(?![a-zA-Z])", r"\\cdot "), (r"\\div(?![a-zA-Z])", "/"), (r"\\colon(?![a-zA-Z])", ":"),
    (r"\\backslash(?![a-zA-Z])", r"\\setminus "),
    (r"\\var(epsilon|phi|theta|rho|sigma)(?![a-zA-Z])", r"\\\1 "),
    (r"\\(?:bold|Bbb|mathbf|mathbb)\s*(?:\{([RZNQC])\}|([RZNQC])(?![a-zA-Z]))", r"\\mathbb{\1\2}"),
    (r"\\reals(?![a-zA-Z])|\\R(?![a-zA-Z])", r"\\mathbb{R}"),
    (r"\\(?:mathbf|boldsymbol|bm|mathcal|mathscr)\s*\{([^{}]*)\}", r"{\1}"),
    (r"(?<![a-zA-Z\\])(?:infinity|inf|infty|oo)(?![a-zA-Z])", r"\\infty "),
    (rf"(?<![a-zA-Z\\])({'|'.join(GREEK)})(?![a-zA-Z])", r"\\\1 "),
    (rf"(?<![a-zA-Z\\])({'|'.join(FUNCTIONS)}|sqrt)(?=\s*[\d(\[{{\\]|\s+[a-z])", r"\\\1 "),
    (r"(?<![a-zA-Z\\])abs\s*\(([^()]*)\)", r"|\1|"),
    (r"\*\*", "^"), (r"\+\s*/\s*-", r"\\pm "),
    (r"(?<=[\])}])\s*(?:U|union)\s*(?=[\[({\\])", r" \\cup "),
    (r"(?<![a-zA-Z\\])(?:percent|percentage|pct)(?![a-zA-Z])", r"\\% "),
    (r"\\(?:rightarrow|Rightarrow|implies|longrightarrow)(?![a-zA-Z])|->", r"\\to "),
)  # fmt: skip
LOOKS_PATTERNS = [(re.compile(pattern), replacement) for pattern, replacement in LOOKS]
PATTERNS = [(re.compile(pattern), replacement) for pattern, replacement in MATHEMATICS]
VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
SUPER = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b\u207f]+")
SUB = re.compile("[\u2080-\u2089\u2090\u2099]+")
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
THOUSANDS = re.compile(r"(?<![\d,.])(\d{1,3}(?:,\d{3})+)(?![\d,])")
GROUPED = re.compile(r"(?<![\d,.])(\d{1,3}(?: \d{3})+)(?![\d,]|\s*/)")


def canonical(text: str) -> str:
    """Return the answer in plain LaTeX, without what changes only its looks; case and words are kept.

    Example:
        >>> canonical("\\\\dfrac{1}{2}~\\\\mathrm{cm}."), canonical("x\u00b2 \u2265 \u00bd"), canonical("exp(2pi)")
        ('\\\\frac{1}{2} \\\\text{cm}', 'x^{2} \\\\ge \\\\frac{1}{2}', '\\\\exp (2\\\\pi )')
    """
    text = VULGAR.sub(lambda found: "\\frac{" + unicodedata.normalize("NFKC", found[0]).replace("\u2044", "}{") + "}", text)
    text = re.sub("(?:\u221a|(?<![a-zA-Z\\\\])sqrt) ?([0-9]+)", r"\\sqrt{\1}", text)
    text = SUPER.sub(lambda found: "^{" + found[0].translate(SUPERSCRIPTS) + "}", text)
    text = SUB.sub(lambda found: "_{" + found[0].translate(SUBSCRIPTS) + "}", text)
    text = "".join(UNICODE.get(character, character) for character in text)
    text = unicodedata.normalize("NFKC", text)
    if "\\\\" in text and "\\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)  # a response that escapes its backslashes twice
    text = BOX.sub("{", text)
    for pattern, replacement in LOOKS_PATTERNS:
        text = pattern.sub(replacement, text)
    words: list[str] = []

    def hide(found: re.Match[str]) -> str:
        words.append(found[0])
        return f"\\text@{len(words) - 1}@"

    text = TEXT.sub(hide, text)
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\\text@(\d+)@", lambda found: words[int(found[1])], text)
    text = THOUSANDS.sub(lambda found: found[1].replace(",", "") if _depth(text, found.start()) == 0 else found[0], text)
    text = GROUPED.sub(lambda found: found[1].replace(" ", ""), text)
    text = " ".join(text.split()).strip()
    return re.sub(r"(?<![.\\])[.;,:]$|\\\\$", "", text.removeprefix("=").strip()).strip()


def _depth(text: str, position: int) -> int:
    before = text[:position]
    return sum(before.count(b) for b in ("(", "[", "\\{")) - sum(before.count(b) for b in (")", "]", "\\}"))
