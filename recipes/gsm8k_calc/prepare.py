"""Makes verifiable arithmetic problems of GSM8K's calculator annotations, and a small model warm-started on made-up ones.

A GSM8K solution marks each calculation, "<<48/2=24>>". The left side becomes a problem, "48/2", whose answer is checked exactly.
Training problems come from the training split. Test problems come from the test split, without those that also occur in
training. The warm start sees neither: it demonstrates training expressions whose numbers were replaced at random, most answered
at once and the others worked out operation by operation, with long multiplication."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from qurl.cli.main import Parser
from qurl.config import DatasetConfig
from qurl.data import load_rows
from qurl.warmstart import (
    Demonstration,
    model_config,
    new_model,
    run_stage,
    save_model,
    train_tokenizer,
    warm_start,
    write_problems,
)

ANNOTATION = re.compile(r"<<([^<>]*)>>")
NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
PERCENT = re.compile(rf"({NUMBER.pattern})%")
KNOWN_NODES = (ast.BinOp, ast.UnaryOp, ast.Constant, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub, ast.UAdd)
SYMBOLS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the outcome, besides the seed and the data."""

    num_demonstrations: int = 60000
    direct_fraction: float = 0.6  # of the demonstrations
    largest: int = 100000  # result of a demonstrated operation
    vocab_size: int = 320
    hidden_size: int = 256
    num_layers: int = 4
    batch_size: int = 32
    learning_rate: float = 1.5e-3


def parse(expression: str) -> ast.expr:
    """The tree of +, -, *, / and parentheses over decimals; "5%" is (5/100). Raises ValueError for anything else."""
    try:
        tree = ast.parse(PERCENT.sub(r"(\1/100)", expression), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{expression!r} is no arithmetic") from error
    for node in ast.walk(tree):
        if not isinstance(node, KNOWN_NODES) or (isinstance(node, ast.Constant) and type(node.value) not in (int, float)):
            raise ValueError(f"{expression!r} holds more than +, -, *, / and numbers")
    return tree


def evaluate(node: ast.expr) -> Fraction:
    """The exact value of a tree from `parse`. Raises ZeroDivisionError."""
    if isinstance(node, ast.Constant):
        return Fraction(repr(node.value))
    if isinstance(node, ast.UnaryOp):
        return -evaluate(node.operand) if isinstance(node.op, ast.USub) else evaluate(node.operand)
    assert isinstance(node, ast.BinOp)
    left, right = evaluate(node.left), evaluate(node.right)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case _:
            return left / right


def is_decimal(value: Fraction) -> bool:
    """Whether the decimals of `value` end, within twelve places."""
    return (value * 10**12).denominator == 1


def decimal_text(value: Fraction) -> str:
    """The shortest decimal of `value`, e.g. "0.5", "-12". Raises ValueError where its decimals do not end."""
    if not is_decimal(value):
        raise ValueError(f"{value} has no short decimal")
    places = next(n for n in range(13) if (value * 10**n).denominator == 1)
    return f"{Decimal(int(value * 10**places)).scaleb(-places):f}"


def annotated_problems(solutions: Iterable[str], counts: Counter[str]) -> Iterator[tuple[str, str]]:
    """(expression, answer) of every annotation that is a correct calculation, repeated ones once.

    `counts` receives what came of each annotation."""
    seen: set[str] = set()
    for annotation in (text for solution in solutions for text in ANNOTATION.findall(solution)):
        expression, _, claim = re.sub(r"[\s,$]", "", annotation).partition("=")
        try:
            tree = parse(expression)
            value, claimed = evaluate(tree), evaluate(parse(claim))
        except (ValueError, ZeroDivisionError):
            counts["malformed"] += 1
            continue
        if not any(isinstance(node, ast.BinOp) for node in ast.walk(tree)):
            counts["without an operation"] += 1
        elif value != claimed or not is_decimal(value):
            counts["rounded or wrong"] += 1
        elif expression in seen:
            counts["repeated"] += 1
        else:
            counts["kept"] += 1
            seen.add(expression)
            yield expression, decimal_text(value)


def worked(node: ast.expr, largest: int) -> tuple[list[str], str]:
    """One line for each operation, innermost first, and the text of the value.

    Raises ValueError where a result is negative, beyond `largest`, or has more than two decimals, and ZeroDivisionError."""
    if not isinstance(node, ast.BinOp):
        return [], decimal_text(evaluate(node))
    left_lines, left = worked(node.left, largest)
    right_lines, right = worked(node.right, largest)
    value = evaluate(node)
    if not 0 <= value <= largest or value * 100 != int(value * 100):
        raise ValueError(f"{value} is outside what is demonstrated")
    parts = [f"{left}{SYMBOLS[type(node.op)]}{right}"]
    if isinstance(node.op, ast.Mult):
        parts += long_multiplication(left, right)
    return [*left_lines, *right_lines, "=".join([*parts, decimal_text(value)])], decimal_text(value)


def long_multiplication(left: str, right: str) -> list[str]:
    """24*13 -> ["24*10+24*3", "240+72"]; nothing where the right factor has a single digit other than zero or is no integer."""
    digits = [f"{digit}{'0' * (len(right) - 1 - place)}" for place, digit in enumerate(right) if digit != "0"]
    if "." in right or len(digits) < 2:
        return []
    products = [decimal_text(Fraction(left) * int(digit)) for digit in digits]
    return ["+".join(f"{left}*{digit}" for digit in digits), "+".join(products)]


def made_up(rng: random.Random, expression: str) -> str:
    """`expression` with other numbers of as many digits."""
    return NUMBER.sub(lambda match: re.sub(r"\d", lambda _: str(rng.randint(0, 9)), match[0]), expression)


def demonstrations(seed: int, expressions: list[str], taken: set[str], settings: Settings) -> list[Demonstration]:
    """Made-up variants of `expressions`, none of which is in `taken`."""
    rng = random.Random(seed)
    found: list[Demonstration] = []
    while len(found) < settings.num_demonstrations:
        form = rng.choice(expressions)
        for _ in range(30):  # a random division rarely comes out even
            expression = made_up(rng, form)
            if expression in taken:
                continue
            try:
                lines, answer = worked(parse(expression), settings.largest)
            except (ValueError, ZeroDivisionError):  # also 007, which is no number
                continue
            work = [] if rng.random() < settings.direct_fraction else lines
            found.append(Demonstration(prompt=f"{expression}=", response="\n".join([*work, f"#### {answer}"])))
            break
    return found


def read_solutions(source: str, split: str) -> list[str]:
    """The worked solutions of a JSONL file, or of a split of a hub dataset by name."""
    config = DatasetConfig(path=source, name="main", split=split, prompt_key="question")
    return [problem.answer for problem in load_rows(config, f"--{split}")]


def prepare(folder: Path, train_source: str, test_source: str, seed: int, force: bool, settings: Settings) -> None:
    """Fills `folder` with train.jsonl, test.jsonl and model/."""
    counts: dict[str, Counter[str]] = {"train": Counter(), "test": Counter()}
    train = list(annotated_problems(read_solutions(train_source, "train"), counts["train"]))
    every_test = list(annotated_problems(read_solutions(test_source, "test"), counts["test"]))
    trained = {expression for expression, _ in train}
    test = [problem for problem in every_test if problem[0] not in trained]
    for split, count in counts.items():
        print(f"{split}: {count.total()} annotations: " + ", ".join(f"{n} {what}" for what, n in count.most_common()), flush=True)
    print(f"test: {len(every_test) - len(test)} removed that occur in training, {len(test)} left", flush=True)

    def write() -> list[Path]:
        return [write_problems(folder / "train.jsonl", train), write_problems(folder / "test.jsonl", test)]

    def teach() -> list[Path]:
        taken = trained | {expression for expression, _ in test}
        shown = demonstrations(seed, sorted(trained), taken, settings)
        tokenizer = train_tokenizer((d.prompt + d.response for d in shown[:2000]), settings.vocab_size)
        config = model_config(tokenizer, architecture="qwen3", hidden_size=settings.hidden_size, num_layers=settings.num_layers)
        model = new_model(config, seed)
        loss = warm_start(model, tokenizer, shown, batch_size=settings.batch_size, learning_rate=settings.learning_rate, seed=seed)
        print(f"warm start: {model.num_parameters():,} parameters, loss {loss:.3f} nats per response token", flush=True)
        return [save_model(model, tokenizer, folder / "model")]

    decided_by = {"train": train_source, "test": test_source, "seed": seed, **asdict(settings)}
    built = run_stage(folder, "problems", decided_by, write, force=force)
    print(f"problems: {'written' if built else 'already there'}", flush=True)
    built = run_stage(folder, "model", decided_by, teach, force=built)
    print(f"model: {folder / 'model'} {'written' if built else 'already there'}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="qurl prepare gsm8k_calc", description=__doc__.splitlines()[0])
    parser.add_argument("--train", default="openai/gsm8k", help="JSONL file of the training split, or a hub dataset by name")
    parser.add_argument("--test", default="openai/gsm8k", help="JSONL file of the test split, or a hub dataset by name")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/gsm8k_calc"))
    parser.add_argument("--num-demonstrations", type=int, default=Settings.num_demonstrations)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="also redo what is already there")
    args = parser.parse_args(argv)
    settings = Settings(num_demonstrations=args.num_demonstrations)
    prepare(args.output_dir, args.train, args.test, args.seed, args.force, settings)


if __name__ == "__main__":
    main()
