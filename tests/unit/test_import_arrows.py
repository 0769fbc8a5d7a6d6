"""Imports point left: the layers of DESIGN.md, and which part may import which heavy package."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "qurl"

RANKS = {
    "types": 0, "errors": 0, "actors": 0, "hardware": 0, "plug": 0, "processes": 0,
    "config": 1, "kept_tokens": 1, "locks": 1, "shared_files": 1, "observability": 1,
    "algorithms": 2, "rewards": 2, "data": 2,
    "quantization": 3, "warmstart": 3,
    "vllm_plugin": 4, "sync": 4,
    "rollout": 5, "learner": 5, "ptq": 5,
    "plan": 6, "trainer": 7, "bench": 8, "doctor": 8, "evaluation": 8, "ablation": 8, "cli": 9,
}  # fmt: skip
"""A module imports its own part and parts of a lower rank, and of its own rank only where PEERS says so."""

PEERS = {("observability", "config"), ("vllm_plugin", "sync")}

ALLOWED = {
    "vllm": {"vllm_plugin", "rollout", "bench"},
    "deepspeed": {"learner"},
    "hydra": {"config", "cli"},
    "omegaconf": {"config", "cli"},
    "wandb": {"observability"},
}
"""Heavy package -> parts that may import it."""


def imports(source: str, package: str) -> Iterator[str]:
    """Absolute names of all modules that a source file of `package` imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names if module == "qurl")


def wrong_arrows(part: str, source: str, package: str) -> list[str]:
    """What a file of `part` imports and must not."""
    found = []
    for name in imports(source, package):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "qurl" and target in RANKS and target != part:
            if RANKS[target] >= RANKS[part] and (part, target) not in PEERS:
                found.append(f"qurl.{part} imports {name}")
        elif top in ALLOWED and part not in ALLOWED[top]:
            found.append(f"qurl.{part} imports {name}")
    return found


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_points_right(path: Path) -> None:
    part = part_of(path)
    assert part in RANKS, f"qurl/{part} has no rank; add it to RANKS"
    package = ".".join(["qurl", *path.relative_to(PACKAGE).parts[:-1]])
    assert wrong_arrows(part, path.read_text(), package) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("algorithms", "from qurl.trainer.run import run"),
        ("learner", "import qurl.rollout.pool"),
        ("rollout", "def f():\n    from qurl import learner"),
        ("sync", "from ..learner import group"),
        ("quantization", "import vllm.config"),
        ("trainer", "from deepspeed import zero"),
        ("cli", "import wandb"),
    ],
)
def test_a_wrong_arrow_is_found(part: str, source: str) -> None:
    assert wrong_arrows(part, source, f"qurl.{part}")


def test_a_mistyped_command_answers_without_torch_ray_or_vllm() -> None:
    code = (
        "import sys; from qurl.cli.main import main; code = main(['plan', 'rollout.temprature=1']);"
        "heavy = {'torch', 'ray', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules); assert code == 2 and not heavy, heavy"
    )
    ended = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
