"""`qurl prepare NAME`: run a recipe's prepare.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from qurl.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's name; what follows goes to its own parser."""
    parser.add_argument("recipe", metavar="NAME", help=f"one of {', '.join(_recipes())}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the recipe; NAME --help lists them")
    parser.epilog = "Examples:\n  qurl prepare quickstart\n  qurl prepare quickstart --help"


def main(args: argparse.Namespace) -> int:
    """Returns 0. Raises ConfigError for an unknown recipe; what the recipe raises passes through."""
    from qurl.config.compose import assets_dir
    from qurl.plug import resolve

    if args.recipe not in _recipes():
        raise ConfigError(f"no recipe {args.recipe!r} can be prepared; use one of {', '.join(_recipes())}")
    prepare: Callable[[list[str]], int | None] = resolve({}, f"{assets_dir('recipes') / args.recipe / 'prepare.py'}:main", "recipe")
    return prepare(args.arguments) or 0


def _recipes() -> list[str]:
    from qurl.config.compose import assets_dir

    return sorted(path.parent.name for path in assets_dir("recipes").glob("*/prepare.py"))
