"""Finding the final answer in a text; every function takes time linear in its length, whatever the text holds."""

from __future__ import annotations

import re

MARKER = "####"  # GSM8K's mark of the final answer
BOX = re.compile(r"\\(?:boxed|fbox)\s{0,9}\{")
FORMATTING = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|(?<!\\)\\[!,;: %$]|[\s$]")
WRAPPERS = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit)\{([^{}]*)\}")


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...}, which may nest braces; "" where that one never closes, None where there is no box."""
    start = max((box.end() for box in BOX.finditer(text)), default=None)
    if start is None:
        return None
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):  # an escaped brace is not a brace
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : start + brace.start()]
    return ""


def after_marker(text: str) -> str | None:
    """The rest of the line after the last "####", stripped; None where there is no such mark."""
    _, marker, rest = text.rpartition(MARKER)
    return rest.strip().partition("\n")[0].strip() if marker else None


def reference_answer(ground_truth: str) -> str:
    """The answer in a ground truth that may be a whole worked solution: after "####", in the last box, else all of it. Stripped."""
    for answer in (after_marker(ground_truth), last_boxed(ground_truth)):
        if answer is not None:
            return answer.strip()
    return ground_truth.strip()


def normalize_latex(answer: str) -> str:
    """The answer without what changes only its looks: spaces, $, %, delimiter sizes, \\text, fraction
    styles, a final period."""
    answer = FORMATTING.sub("", answer).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return WRAPPERS.sub(r"\1", answer).rstrip(".")
