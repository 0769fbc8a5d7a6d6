"""What a run is made from is known by content: other names of it are fine, other content under its name is not."""

import os

import pytest
from safetensors.torch import save_file
from torch import zeros

from qurl.config import TrainConfig
from qurl.config.paths import with_absolute_paths
from qurl.errors import ConfigError
from qurl.trainer import inputs
from qurl.trainer.inputs import fingerprints, refuse_other_inputs
from qurl.types import Prompt


def prompts(count=200, **changes):
    return [
        Prompt(prompt_id=f"r{i:06d}", token_ids=[i, i + 1], text=f"problem {i}", ground_truth=str(i), data_source="mine")
        if i != 130 or not changes
        else Prompt(**{"prompt_id": f"r{i:06d}", "token_ids": [i, i + 1], "text": f"problem {i}", "ground_truth": str(i),
                       "data_source": "mine", **changes})
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A model, a reward and a policy loss in files, and a function that fingerprints what is there now."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({"w": zeros(8)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "reward.py").write_text("def score(response):\n    return 1.0\n")

    def now(train=None, evaluation=None, **changes):
        config = TrainConfig()
        config.model.path, config.reward.function = "model", "reward.py:score"
        for name, value in changes.items():
            section, _, key = name.partition("__")
            setattr(getattr(config, section), key, value)
        return fingerprints(with_absolute_paths(config), train or prompts(), evaluation or {})

    return now


def refusal(before, now):
    with pytest.raises(ConfigError) as caught:
        refuse_other_inputs(before, now, {"data.train.path": "d.jsonl", "model.path": "m", "reward.function": "f"})
    return str(caught.value)


def test_the_same_content_is_the_same_under_every_name(world, tmp_path):
    before = world()
    os.symlink(tmp_path / "model", tmp_path / "link")
    (tmp_path / "copy.py").write_text("# paid in full\ndef score(response):\n\n    return 1.0\n")
    (tmp_path / "model" / "README.md").write_text("notes")
    for path in ("./model/", f"{tmp_path}/model", "link"):
        now = world(model__path=path, reward__function="copy.py:score")
        assert refuse_other_inputs(before, now, {}) is None  # raises ConfigError for other content


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"text": "other", "token_ids": [7]}, "differ in text and tokens from those that this run began with"),
        ({"token_ids": [7]}, "differ in tokens from"),
        ({"ground_truth": "7"}, "differ in ground truth, source or other columns from"),
        ({"extra": {"level": 3}}, "differ in ground truth, source or other columns from"),
    ],
)
def test_other_data_of_the_same_length_are_refused_with_their_place(world, changes, told):
    found = refusal(world(), world(train=prompts(**changes)))
    assert found.startswith(f"data.train.path=d.jsonl: prompts from r000128 to r000131 {told}") and found.endswith(inputs.REMEDY)


def test_data_of_another_length_are_refused_with_both(world):
    assert "it makes 199 prompts, and made 200 when this run began" in refusal(world(), world(train=prompts(199)))


def test_a_model_and_a_reward_that_have_changed_are_refused_by_name(world, tmp_path):
    before = world()
    (tmp_path / "reward.py").write_text("def score(response):\n    return 2.0\n")
    assert "reward.function=f: the code in the file is not what it was" in refusal(before, world())
    (tmp_path / "reward.py").write_text("def score(response):\n    return 1.0\n")
    save_file({"w": zeros(8) + 1}, tmp_path / "model" / "model.safetensors")
    assert "model.path=m: model.safetensors is not what it was when this run began" in refusal(before, world())


def test_large_files_are_sampled_from_end_to_end(world, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "WHOLE_BYTES", 64)
    monkeypatch.setattr(inputs, "SAMPLE_BYTES", 64)
    save_file({"w": zeros(4096)}, tmp_path / "model" / "model.safetensors")
    before = world()
    for start in (0, 2000, 4000):  # more than what lies between two samples
        weights = zeros(4096)
        weights[start : start + 96] = 1
        save_file({"w": weights}, tmp_path / "model" / "model.safetensors")
        assert "model.safetensors" in refusal(before, world())


def test_an_evaluation_set_may_come_and_go_but_not_change(world):
    before = world(evaluation={"a": prompts(20)})
    for evaluation in ({}, {"b": prompts(9)}, {"a": prompts(20), "b": prompts(9)}):
        refuse_other_inputs(before, world(evaluation=evaluation), {})
    assert "it makes 9 prompts" in refusal(before, world(evaluation={"a": prompts(9)}))


def test_a_name_of_the_hub_is_no_folder(world):
    assert "this run began with Qwen/x" in refusal(world(model__path="Qwen/x"), world())
