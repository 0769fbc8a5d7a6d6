"""Makes the quickstart's problems and its warm-started model.

The problems are chains of additions and subtractions, "7+5-9+3+6-2". In the demonstrations short chains are worked from left to
right; of the chains as long as the problems, most are answered in one go, which a model this small mostly gets wrong. Greedy
decoding of the warm-started model follows that habit. Reinforcement learning is told only which answers were right and has to find
out that work pays."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path

from qurl.cli.main import Parser
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


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the outcome, besides the seed."""

    min_numbers: int = 6  # in a problem; demonstrations start at 2
    max_numbers: int = 8
    largest: int = 9  # each number is 1..largest
    largest_total: int = 99  # each partial result is 0..largest_total
    num_train: int = 8000
    num_held_out: int = 500
    num_demonstrations: int = 24000
    direct_fraction: float = 0.65  # of the demonstrations with min_numbers or more
    vocab_size: int = 320
    hidden_size: int = 256
    num_layers: int = 3
    batch_size: int = 32
    learning_rate: float = 1.5e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """7+5-9: terms ["7", "+5", "-9"], totals [7, 12, 3]."""

    terms: list[str]
    totals: list[int]

    @property
    def problem(self) -> str:
        return "".join(self.terms)

    @property
    def answer(self) -> str:
        return str(self.totals[-1])

    def demonstration(self, direct: bool) -> Demonstration:
        """Direct: "#### 3". Else "7+5=12-9=3", then "#### 3" on a line of its own."""
        steps = zip(self.terms[1:], self.totals[1:], strict=True)
        work = self.terms[0] + "".join(f"{term}={total}" for term, total in steps) + "\n"
        return Demonstration(prompt=f"{self.problem}=", response=f"{'' if direct else work}#### {self.answer}")


def random_chain(rng: random.Random, min_numbers: int, settings: Settings) -> Chain:
    """A chain of min_numbers..max_numbers numbers whose partial results stay within 0..largest_total."""
    total = rng.randint(1, settings.largest)
    terms, totals = [str(total)], [total]
    for _ in range(rng.randint(min_numbers, settings.max_numbers) - 1):
        largest = settings.largest
        steps = [step for step in range(-largest, largest + 1) if step and 0 <= total + step <= settings.largest_total]
        step = rng.choice(steps)
        total += step
        terms.append(f"{step:+d}")
        totals.append(total)
    return Chain(terms=terms, totals=totals)


def problems(seed: int, settings: Settings) -> list[Chain]:
    """Held-out problems, then those to train on; all distinct."""
    rng = random.Random(seed)
    found: dict[str, Chain] = {}
    while len(found) < settings.num_held_out + settings.num_train:
        chain = random_chain(rng, settings.min_numbers, settings)
        found.setdefault(chain.problem, chain)
    return list(found.values())


def demonstrations(seed: int, taken: set[str], settings: Settings) -> list[Demonstration]:
    """Short and long chains, none of which is in `taken`; a short one may come again."""
    rng = random.Random(f"demonstrations {seed}")
    found: list[Demonstration] = []
    while len(found) < settings.num_demonstrations:
        chain = random_chain(rng, 2, settings)
        if chain.problem not in taken:
            is_long = len(chain.terms) >= settings.min_numbers
            found.append(chain.demonstration(direct=is_long and rng.random() < settings.direct_fraction))
    return found


def prepare(folder: Path, seed: int, force: bool, settings: Settings) -> None:
    """Fills `folder` with train.jsonl, held_out.jsonl and model/. Held-out, training and demonstrated problems share none."""
    chains = problems(seed, settings)
    held_out, train = chains[: settings.num_held_out], chains[settings.num_held_out :]

    def write() -> list[Path]:
        return [
            write_problems(folder / name, ((chain.problem, chain.answer) for chain in part))
            for name, part in [("train.jsonl", train), ("held_out.jsonl", held_out)]
        ]

    def teach() -> list[Path]:
        shown = demonstrations(seed, {chain.problem for chain in chains}, settings)
        tokenizer = train_tokenizer((d.prompt + d.response for d in shown[:2000]), settings.vocab_size)
        config = model_config(tokenizer, architecture="qwen3", hidden_size=settings.hidden_size, num_layers=settings.num_layers)
        model = new_model(config, seed)
        print(f"warm start: {model.num_parameters():,} parameters, {len(shown)} demonstrations", flush=True)
        loss = warm_start(model, tokenizer, shown, batch_size=settings.batch_size, learning_rate=settings.learning_rate, seed=seed)
        print(f"warm start: loss {loss:.3f} nats per response token", flush=True)
        return [save_model(model, tokenizer, folder / "model")]

    decided_by = {"seed": seed, **asdict(settings)}
    built = run_stage(folder, "problems", decided_by, write, force=force)
    print(f"problems: {len(train)} to train on, {len(held_out)} held out, {'written' if built else 'already there'}", flush=True)
    built = run_stage(folder, "model", decided_by, teach, force=built)
    print(f"model: {folder / 'model'} {'written' if built else 'already there'}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="qurl prepare quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="also redo what is already there")
    args = parser.parse_args(argv)
    prepare(args.output_dir, args.seed, args.force, Settings())


if __name__ == "__main__":
    main()
