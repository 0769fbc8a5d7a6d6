"""Makes the ablation's problems and its warm-started model: those of the quickstart, smaller.

Partial results stay within 0..9 and the tokenizer knows digits alone, so that a network of half a million parameters works most
chains out and learns within a minute or two."""

from __future__ import annotations

from pathlib import Path

from qurl.cli.main import Parser
from qurl.config.compose import assets_dir
from qurl.plug import resolve

SETTINGS = {
    "min_numbers": 5, "max_numbers": 7, "largest_total": 9, "num_train": 4000, "num_held_out": 500, "num_demonstrations": 16000,
    "direct_fraction": 0.6, "vocab_size": 270, "hidden_size": 128, "num_layers": 2, "learning_rate": 2e-3,
}  # fmt: skip
"""Of the quickstart's prepare.py; what is not named is as there."""


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="qurl prepare ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/ablation"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="also redo what is already there")
    args = parser.parse_args(argv)
    quickstart = assets_dir("recipes") / "quickstart" / "prepare.py"
    prepare, settings = (resolve({}, f"{quickstart}:{name}", "recipe") for name in ("prepare", "Settings"))
    prepare(args.output_dir, args.seed, args.force, settings(**SETTINGS))


if __name__ == "__main__":
    main()
