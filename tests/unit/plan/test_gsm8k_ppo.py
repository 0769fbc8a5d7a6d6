"""The topologies in the README of gsm8k_ppo: each is accepted, and needs the memory that is printed there."""

import dataclasses
import re
from pathlib import Path

import pytest

from qurl.config.compose import assets_dir, compose
from qurl.config.validate import validate
from qurl.hardware import Gpu, Hardware
from qurl.plan import make_plan

GIB = 1 << 30
ROW = re.compile(r"\| (\d+) \| `(.*?)` \| ([\d.]+) of ([\d.]+) GiB \| ([\d.]+) GiB, cache for (\d+) \|")
TOPOLOGIES = ROW.findall((assets_dir("recipes") / "gsm8k_ppo" / "README.md").read_text())
NODE = Hardware(cpu_name="cpu", cpu_flags=frozenset(), num_cores=64, memory_bytes=512 * GIB, shm_bytes=256 * GIB, gpus=())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json of Qwen2.5-0.5B-Instruct, in its published shape."""
    from transformers import Qwen2Config

    folder = tmp_path_factory.mktemp("model")
    Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_the_readme_has_topologies_for_one_gpu_and_for_eight() -> None:
    assert [row[0] for row in TOPOLOGIES] == ["1", "4", "8"]


@pytest.mark.parametrize(("gpus", "overrides", "needs", "has", "weights", "sequences"), TOPOLOGIES)
def test_a_topology_fits_as_the_readme_says(model, gpus, overrides, needs, has, weights, sequences) -> None:
    config = compose(["recipe=gsm8k_ppo", f"model.path={model}", *overrides.split()])
    validate(config)
    gpu = Gpu(name="80 GiB", memory_bytes=80 * GIB, capability=(9, 0))
    plan = make_plan(config, dataclasses.replace(NODE, gpus=(gpu,) * int(gpus)))
    assert plan.model.num_parameters == 494_032_768  # as published
    engine_share = 80 * config.rollout.engine_args["gpu_memory_utilization"]
    assert (f"{plan.learner.on_device / GIB:.1f}", f"{80 - engine_share:.0f}") == (needs, has)
    assert f"{plan.engine.weights / GIB:.2f}" == weights
    room = (engine_share * GIB - plan.engine.weights) // plan.engine.kv_per_sequence
    assert min(plan.engine.num_sequences, room) == int(sequences)
