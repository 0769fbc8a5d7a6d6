"""Finding the final answer in a text; every function takes time linear in its length, whatever the text holds."""

from __future__ import annotations

import ast
import re

MARKER = "####"  # GSM8K's mark of the final answer
BOX = re.compile(r"\\(?:boxed|fbox)\s{0,9}\{")
FORMATTING = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|(?<!\\)\\[!,;: %$]|[\s$]")
DECIMAL_ZEROS = re.compile(r"(-?[0-9]+)\.0{1,9}")
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


def accepted_answers(ground_truth: str) -> list[str]:
    """The reference answer, or its alternatives where it is a list of strings written as Python writes one ("['2', '3']"); an
    interval such as [0,3) or [1,2] is not such a list. ValueError where any is empty."""
    truth = reference_answer(ground_truth)
    answers = [truth]
    if truth.startswith("[") and truth.endswith("]"):
        try:
            values = ast.literal_eval(truth)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            values = []
        if values and all(isinstance(value, str) for value in values):
            answers = [value.strip() for value in values]
    if not all(answers):
        raise ValueError(f"the ground truth {ground_truth[:80]!r} holds no answer")
    return answers


def boxed_answer(text: str) -> str | None:
    """The last box, normalized; None where there is none or it is empty."""
    answer = last_boxed(text)
    return whole_number(normalize_latex(answer)) or None if answer is not None else None


def whole_number(answer: str) -> str:
    """ "142.0" as "142"; any other text as it is."""
    found = DECIMAL_ZEROS.fullmatch(answer)
    return found[1] if found else answer


def normalize_latex(answer: str) -> str:
    """The answer without what changes only its looks: spaces, $, %, delimiter sizes, \\text, fraction
    styles, a final period."""
    answer = FORMATTING.sub("", answer).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return WRAPPERS.sub(r"\1", answer).rstrip(".")
