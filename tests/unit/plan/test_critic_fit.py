"""A critic that cannot read what the policy writes is refused before anything starts."""

import json
import shutil
from pathlib import Path

import pytest

from qurl.cli.main import main
from qurl.config.compose import compose
from qurl.hardware import Hardware
from qurl.plan import make_plan
from qurl.warmstart.model import make_tiny_model

MACHINE = Hardware(cpu_name="cpu", cpu_flags=frozenset(), num_cores=8, memory_bytes=64 << 30, shm_bytes=32 << 30, gpus=())


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("policy"), vocab_size=320)


@pytest.fixture
def critic(policy: Path, tmp_path: Path) -> Path:
    """Its config.json and tokenizer, to be changed."""
    return Path(shutil.copytree(policy, tmp_path / "critic", ignore=shutil.ignore_patterns("*.safetensors")))


def change(critic: Path, file: str, **values: object) -> None:
    path = critic / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def overrides(needed: list[str], policy: Path, critic: Path) -> list[str]:
    return [*needed, f"model.path={policy}", f"critic.path={critic}", "algorithm=ppo"]


def refused(needed: list[str], policy: Path, critic: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command ends with."""
    assert main(["plan", *overrides(needed, policy, critic)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"critic.path={critic}" in line
    return line


def test_a_critic_with_the_policy_s_tokens_fits_and_may_know_more(needed: list[str], policy: Path, critic: Path) -> None:
    change(critic, "config.json", vocab_size=400)  # padded, as Qwen2.5 does in its larger models
    assert make_plan(compose(overrides(needed, policy, critic)), MACHINE).learner.critic > 0


def test_a_token_that_means_something_else_is_named(needed: list[str], policy: Path, critic: Path, capsys) -> None:
    file = critic / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]
    file.write_text(json.dumps(tokenizer))
    line = refused(needed, policy, critic, capsys)
    assert f"token '7' is {vocabulary['8']} to the policy and {vocabulary['7']} to it; use a critic with the policy's" in line


def test_a_vocabulary_that_ends_before_the_tokenizer_s_is_refused(needed: list[str], policy: Path, critic: Path, capsys) -> None:
    change(critic, "config.json", vocab_size=300)
    assert "its vocabulary has 300 tokens, the policy's tokenizer makes token 319" in refused(needed, policy, critic, capsys)


def test_a_critic_without_a_tokenizer_is_judged_by_its_size(needed: list[str], policy: Path, critic: Path, capsys) -> None:
    for file in critic.glob("tokenizer*"):
        file.unlink()
    assert make_plan(compose(overrides(needed, policy, critic)), MACHINE).learner.critic > 0
    change(critic, "config.json", vocab_size=400)
    assert "its vocabulary has 400 tokens, that of model.path=" in refused(needed, policy, critic, capsys)


def test_a_critic_for_shorter_texts_and_a_folder_that_is_none_are_refused(
    needed: list[str], policy: Path, critic: Path, capsys
) -> None:
    change(critic, "config.json", max_position_embeddings=100)
    assert "has 100 positions, prompt and response up to 128" in refused(needed, policy, critic, capsys)
    (critic / "config.json").unlink()
    assert "is a folder without config.json" in refused(needed, policy, critic, capsys)
