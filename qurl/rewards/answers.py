"""Finding the final answer in a text; every function takes time linear in its length, whatever the text holds."""

from __future__ import annotations

import ast
import re

MARKER = "####"  # GSM8K's mark of the final answer
BOX = re.compile(r"\\(?:boxed|fbox)\s{0,9}\{")
FORMATTING = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|(?<!\\)\\[!,;: %$]|[\s$]")
WHOLE_NUMBER = re.compile(r"(-?)0{0,99}([0-9]{1,999})(?:\.0{1,9})?")
THOUGHT = re.compile(r"</?think(?:ing)?>")
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
    """Return the answers in a ground truth, any of which counts: of a worked solution the final one, of a list all of them."""
    return alternatives(reference_answer(ground_truth))


def alternatives(truth: str) -> list[str]:
    """Return the elements of a list of strings as Python or JSON writes it, each stripped; of any other text the text itself.

    An interval such as [0,3) or [1,2] is not such a list. ValueError where any is empty.

    Example:
        >>> alternatives("['2', '3']"), alternatives("[2,3]")
        (['2', '3'], ['[2,3]'])
    """
    answers = [truth.strip()]
    if re.match(r"\[\s*['\"]", answers[0]) and answers[0].endswith("]"):
        try:
            values = ast.literal_eval(answers[0])
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            values = []
        if values and all(isinstance(value, str) for value in values):
            answers = [value.strip() for value in values]
    if not all(answers):
        raise ValueError(f"the ground truth {truth[:80]!r} holds no answer")
    return answers


def after_thought(response: str) -> str:
    """Return what follows the last finished thought: "" where a thought is still open, all of it where there is none."""
    marks = list(THOUGHT.finditer(response))
    if not marks:
        return response
    return response[marks[-1].end() :] if marks[-1][0].startswith("</") else ""


def boxed_answer(text: str) -> str | None:
    """The last box, normalized; None where there is none or it is empty."""
    answer = last_boxed(text)
    return whole_number(normalize_latex(answer)) or None if answer is not None else None


def whole_number(answer: str) -> str:
    """Return "142" for "142.0" and for "0142"; any other text as it is. Data frames store integers so, AIME three digits."""
    found = WHOLE_NUMBER.fullmatch(answer)
    return found[1] * (found[2] != "0") + found[2] if found else answer


def normalize_latex(answer: str) -> str:
    """The answer without what changes only its looks: spaces, $, %, delimiter sizes, \\text, fraction
    styles, a final period."""
    answer = FORMATTING.sub("", answer).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return WRAPPERS.sub(r"\1", answer).rstrip(".")
