"""Makes a small from-scratch model for GSM8K: it learns its tokenizer and the shape of an answer from the training split.

It exists to run every stage of the recipe without a network or a GPU. A model this small writes sentences that look like solutions
and earns little; for results start from a pretrained one, as the recipe does by default."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from qurl.cli.main import Parser
from qurl.config import DatasetConfig
from qurl.config.compose import compose
from qurl.data import load_rows
from qurl.warmstart import Demonstration, model_config, new_model, run_stage, save_model, train_tokenizer, warm_start

ANNOTATION = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the outcome, besides the seed and the data."""

    num_epochs: int = 2
    vocab_size: int = 2048
    hidden_size: int = 256
    num_layers: int = 4
    batch_size: int = 32
    learning_rate: float = 2e-3


def prepare(folder: Path, source: str, seed: int, force: bool, settings: Settings) -> None:
    """Fills `folder` with model/, warm-started on the questions and solutions of `source` in the recipe's own prompt."""
    dataset = DatasetConfig(path=source, name="main", prompt_key="question")
    problems = load_rows(dataset, "--train")
    prompt_template = compose(["recipe=gsm8k"]).data.prompt_template

    def teach() -> list[Path]:
        solutions = [ANNOTATION.sub("", problem.answer) for problem in problems]
        texts = [problem.text for problem in problems] + solutions
        tokenizer = train_tokenizer(texts, settings.vocab_size, chat=True)
        demonstrations = [
            Demonstration(prompt=_render(tokenizer, prompt_template.format(**problem.columns)), response=solution)
            for problem, solution in zip(problems, solutions, strict=True)
        ]
        config = model_config(tokenizer, hidden_size=settings.hidden_size, num_layers=settings.num_layers)
        model = new_model(config, seed)
        loss = warm_start(
            model, tokenizer, demonstrations, num_epochs=settings.num_epochs, batch_size=settings.batch_size,
            learning_rate=settings.learning_rate, seed=seed,
        )  # fmt: skip
        print(f"warm start: {model.num_parameters():,} parameters, loss {loss:.3f} nats per response token", flush=True)
        return [save_model(model, tokenizer, folder / "model")]

    decided_by = {"train": source, "seed": seed, "prompt_template": prompt_template, **asdict(settings)}
    built = run_stage(folder, "model", decided_by, teach, force=force)
    print(f"model: {folder / 'model'} {'written' if built else 'already there'}", flush=True)


def _render(tokenizer, text: str) -> str:
    """One user turn, open for the answer."""
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="qurl prepare gsm8k", description=__doc__.splitlines()[0])
    parser.add_argument("--train", default="openai/gsm8k", help="JSONL file of the training split, or a hub dataset by name")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/gsm8k"))
    parser.add_argument("--num-epochs", type=int, default=Settings.num_epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="also redo what is already there")
    args = parser.parse_args(argv)
    prepare(args.output_dir, args.train, args.seed, args.force, Settings(num_epochs=args.num_epochs))


if __name__ == "__main__":
    main()
