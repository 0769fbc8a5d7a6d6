"""The paper recipes on their full topologies: `qurl plan` accepts them and prints the memory that their READMEs show."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from qurl.cli.main import main
from qurl.config.compose import assets_dir, compose
from qurl.hardware import UNLIMITED, Gpu, detect
from qurl.plan import make_plan

QWEN2_SHAPES = {  # hidden, layers, heads, key-value heads, intermediate, vocabulary, positions; as published in config.json
    "Qwen/Qwen2.5-Math-7B": (3584, 28, 28, 4, 18944, 152064, 4096),
    "Qwen/Qwen2.5-32B": (5120, 64, 40, 8, 27648, 152064, 131072),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1536, 28, 12, 2, 8960, 151936, 131072),
}


def shown_plans() -> list[tuple[str, list[str]]]:
    """(`qurl plan` command, the lines below it) of every block in the recipes' READMEs."""
    found = []
    for readme in sorted(assets_dir("recipes").glob("*/README.md")):
        for block in re.findall(r"```\n(.*?)```", readme.read_text(), re.DOTALL):
            for command, lines in re.findall(r"^\$ qurl plan (.*)\n((?:(?!\$).*\n)*)", block, re.MULTILINE):
                found.append((command, lines.splitlines()))
    return found


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hub name -> a folder with its config.json."""
    from transformers import Qwen2Config

    folders = {}
    for name, (hidden, layers, heads, kv_heads, intermediate, vocabulary, positions) in QWEN2_SHAPES.items():
        folders[name] = tmp_path_factory.mktemp("model")
        Qwen2Config(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            intermediate_size=intermediate, vocab_size=vocabulary, max_position_embeddings=positions, tie_word_embeddings=False,
        ).save_pretrained(folders[name])  # fmt: skip
    return folders


def test_each_paper_recipe_shows_a_plan_for_one_node_and_for_four() -> None:
    commands = [command for command, _ in shown_plans()]
    for recipe in ("dapo", "dapo_32b", "deepscaler"):
        gpus = {shlex.split(command)[-1] for command in commands if f"recipe={recipe} " in command}
        assert ({"8x80"} if recipe == "dapo_32b" else {"8x80", "4x8x80"}) <= gpus
        assert recipe == "dapo_32b" or "1x80" in gpus


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("recipe=deepscaler topology=gpu8 --gpus 8x80", ["auto (cuda_ipc)", "learner.num_ranks=8", "sync.transport=object_store"]),
        ("recipe=deepscaler topology=gpu32 --gpus 4x8x80", ["auto (cuda_ipc)", "learner.num_ranks=32"]),
        ("recipe=dapo_32b topology=gpu8_apart --gpus 8x80", ["auto (nccl)", "tensor_parallel_size=2", "transport=shared_memory"]),
        ("recipe=dapo_32b topology=gpu32_apart --gpus 4x8x80", ["auto (nccl)", "tensor_parallel_size=2", "one node"]),
        ("recipe=dapo_32b topology=gpu32_apart sync.transport=shared_memory --gpus 4x8x80", ["there are 4", "one node"]),
        ("recipe=dapo_32b topology=gpu8_apart sync.transport=object_store --gpus 8x80", ["Ray's object store", "shared_memory"]),
    ],
)
def test_a_layout_whose_transport_does_not_reach_every_worker_is_refused(arguments, words, model_folders, capsys) -> None:
    model = compose([argument for argument in arguments.split() if "=" in argument]).model.path
    assert main(["plan", f"model.path={model_folders[model]}", *arguments.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in ("cannot deliver weights", *words):
        assert word in line


GIB = 1 << 30


@pytest.mark.parametrize(("recipe", "learner", "sequences"), [
    (["recipe=deepscaler", "topology=gpu8", "sync.transport=object_store"], (16 + 2, 17 + 3), (45, 47)),
    (["recipe=dapo_32b", "topology=gpu32_apart", "sync.transport=shared_memory"], (66, 69), (18, 19)),
])  # fmt: skip
def test_memory_agrees_with_an_estimate_that_was_made_without_this_code(recipe, learner, sequences, model_folders) -> None:
    """A reviewer counted tensors of forward and backward by hand, GiB. 1.5B, 25,600 tokens, 8 ranks: 16 to 17, and 2 to 3 for
    CUDA contexts and NCCL. 32B, 22,528 tokens, 16 ranks, NCCL included: 66 to 69. And full samples in an engine's cache, 46 and 19.
    The hand's terms are rounded to tenths, hence 3 %."""
    config = compose(recipe)
    config.model.path = str(model_folders[config.model.path])
    gpu = Gpu(name="80 GiB", memory_bytes=int(79.2 * GIB), capability=(9, 0))
    machine = dataclasses.replace(detect(), gpus=(gpu,) * 32, num_nodes=1, memory_bytes=UNLIMITED, hidden_gpus="")
    plan = make_plan(config, machine)
    assert 0.97 * learner[0] <= plan.learner.on_device / GIB <= 1.03 * learner[1]
    longest = plan.stages[-1].engine if plan.stages else plan.engine
    assert sequences[0] <= (plan.engine_share - longest.weights - longest.workspace) // longest.kv_per_sequence <= sequences[1]


@pytest.mark.parametrize(("command", "lines"), shown_plans(), ids=[command for command, _ in shown_plans()])
def test_a_plan_in_a_readme_is_what_the_command_prints(
    command: str,
    lines: list[str],
    model_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arguments = shlex.split(command)
    model = compose([argument for argument in arguments if "=" in argument]).model.path
    assert main(["plan", f"model.path={model_folders[model]}", *arguments]) == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    start = printed.index("Memory") + 2
    assert printed[start : start + 3] == [" ".join(line.split()) for line in lines]
