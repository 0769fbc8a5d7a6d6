"""Makes a small language model from scratch, and held-out text to measure what a format does to it.

The text is problems with their solutions. A problem is held out where the SHA-256 of its text, white space aside, is a multiple
of HELD_OUT, so a problem that stands in two files, or twice in one, is on one side only; the tokenizer and the model see the other
side."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.progress import Progress

from qurl.cli.main import Parser
from qurl.data.documents import load_documents
from qurl.warmstart import model_config, new_model, run_stage, save_model, train_tokenizer
from qurl.warmstart.pretrain import PretrainConfig, pretrain

HELD_OUT = 20
SOURCES = ["openai/gsm8k:main", "agentica-org/DeepScaleR-Preview-Dataset"]
NUM_LOG_LINES = 40  # of progress, where standard error is no terminal


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the outcome, besides the seed and the text."""

    num_tokens: int = 2_560_000
    vocab_size: int = 2048
    hidden_size: int = 256  # a multiple of 128, as every format can take
    num_layers: int = 6


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """The documents to train on, in stored order, and those held out, by hash: the first ones are a mixture of all sources."""
    train, held_out = [], []
    for document in documents:
        (train if _digest(document) % HELD_OUT else held_out).append(document)
    return train, sorted(held_out, key=_digest)


def _digest(document: str) -> int:
    """Of the problem, which is the first line."""
    problem = " ".join(document.partition("\n")[0].split())
    return int.from_bytes(hashlib.sha256(problem.encode()).digest())


def prepare(folder: Path, sources: list[str], seed: int, force: bool, settings: Settings) -> None:
    """Fills `folder` with held_out.jsonl and model/."""
    documents = [document for source in sources for document in load_documents(source, "--text")]
    train, held_out = split(documents)
    if not train or not held_out:
        raise ValueError(f"--text {' '.join(sources)}: {len(documents)} documents are too few to hold some out")

    def hold_out() -> list[Path]:
        path = folder / "held_out.jsonl"
        path.write_text("".join(json.dumps({"text": document}) + "\n" for document in held_out))
        return [path]

    def teach() -> list[Path]:
        tokenizer = train_tokenizer(train, settings.vocab_size)
        tokens = [[*tokenizer.encode(document), tokenizer.eos_token_id] for document in train]
        config = model_config(
            tokenizer, architecture="qwen3", hidden_size=settings.hidden_size, num_layers=settings.num_layers,
            tie_word_embeddings=True,
        )  # fmt: skip
        model = new_model(config, seed)
        print(f"{len(train):,} documents, {sum(map(len, tokens)):,} tokens; {len(held_out):,} documents held out; "
              f"{model.num_parameters():,} parameters", flush=True)  # fmt: skip
        state_file = folder / "pretrain.pt"
        pretraining = PretrainConfig(num_tokens=settings.num_tokens, seed=seed)
        with _Reporter(pretraining.num_steps) as progress:
            loss = pretrain(model, tokens, pretraining, state_file, progress)
        print(f"training loss {loss:.3f} nats per token after {settings.num_tokens:,} tokens", flush=True)
        written = save_model(model, tokenizer, folder / "model")
        state_file.unlink(missing_ok=True)
        return [written]

    digest = hashlib.sha256(json.dumps(documents).encode()).hexdigest()
    built = run_stage(folder, "text", {"text": digest}, hold_out, force=force)
    print(f"held-out text: {folder / 'held_out.jsonl'} {'written' if built else 'already there'}", flush=True)
    built = run_stage(folder, "model", {"text": digest, "seed": seed, **asdict(settings)}, teach, force=force)
    print(f"model: {folder / 'model'} {'written' if built else 'already there'}", flush=True)


class _Reporter(Progress):
    """A bar with the loss; lines where standard error is no terminal."""

    def __init__(self, num_steps: int) -> None:
        super().__init__(transient=True, disable=not sys.stderr.isatty())
        self.num_steps = num_steps
        self.task = self.add_task("pretraining", total=num_steps)
        self.started = time.monotonic()

    def __call__(self, step: int, loss: float) -> None:
        self.update(self.task, completed=step, description=f"pretraining, loss {loss:.3f}")
        if self.disable and (step % max(1, self.num_steps // NUM_LOG_LINES) == 0 or step == self.num_steps):
            seconds = time.monotonic() - self.started
            print(f"step {step}/{self.num_steps} loss {loss:.3f} {seconds:.0f} s", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="qurl prepare perplexity", description=__doc__.splitlines()[0])
    parser.add_argument("--text", nargs="+", default=SOURCES, metavar="SOURCE", help="files or hub datasets (NAME:CONFIGURATION)")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/perplexity"))
    parser.add_argument("--num-tokens", type=int, default=Settings.num_tokens, help="to train on, epochs counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="also redo what is already there")
    args = parser.parse_args(argv)
    prepare(args.output_dir, args.text, args.seed, args.force, Settings(num_tokens=args.num_tokens))


if __name__ == "__main__":
    main()
