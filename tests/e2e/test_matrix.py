"""Every architecture of the README's table trains two iterations, unquantized and in INT8 by `make matrix`."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "matrix"))
from architectures import TRAINED, save_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.matrix]


def as_bin(model, folder):
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


FORMS = {
    "shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="50KB"),
    "float16": lambda model, folder: model.half().save_pretrained(folder),
    "bin": as_bin,
}


def divergences(command_line, folder: str, quantization: str) -> list[float]:
    name = f"{folder}_{quantization}"
    code, output = command_line.run(
        *command_line.train(name, f"model.path={folder}", f"quantization={quantization}", "num_steps=2"),
        "rollout.dtype=float32", "learner.dtype=float32",
    )  # fmt: skip
    assert code == 0, output
    found = [row["mismatch/kl_rollout_old"] for row in command_line.metrics(name)]
    print(f"{name}: KL rollout-old {found}")
    shutil.rmtree(command_line.folder / "runs" / name)
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_an_architecture_trains_and_engine_and_learner_compute_the_same(command_line, name):
    save_tiny(name, command_line.folder / name)
    assert max(divergences(command_line, name, "none")) < 1e-9  # the order of sums in float32: 1e-12
    assert 0 < max(divergences(command_line, name, "int8")) < 0.05


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_every_form_are_those_of_one_file(command_line, form):
    save_tiny("llama", command_line.folder / form, FORMS[form])
    assert max(divergences(command_line, form, "none")) < 1e-9
