"""Actors have a working folder of their own, so no path that they are told is relative."""

from qurl.config import TrainConfig
from qurl.config.data import DatasetConfig
from qurl.config.paths import shared_paths, with_absolute_paths


def test_every_path_that_exists_becomes_absolute_and_every_name_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("model", "tokenizer", "critic"):
        (tmp_path / name).mkdir()
    for name in ("train.jsonl", "test.parquet", "reward.py", "loss.py"):
        (tmp_path / name).write_text("")
    config = TrainConfig(output_dir="runs")
    config.model.path, config.model.tokenizer, config.critic.path = "./model/", "~/tokenizer", "critic"
    config.data.train.path = "train.jsonl"
    config.data.eval = {"own": DatasetConfig(path="./test.parquet"), "hub": DatasetConfig(path="openai/gsm8k")}
    config.reward.function = "reward.py:score"
    config.algorithm.policy_loss.name = "loss.py:loss"
    found = with_absolute_paths(config)
    assert found.output_dir == f"{tmp_path}/runs"
    assert (found.model.path, found.model.tokenizer, found.critic.path) == tuple(
        f"{tmp_path}/{name}" for name in ("model", "tokenizer", "critic")
    )
    assert found.data.train.path == f"{tmp_path}/train.jsonl"
    assert [dataset.path for dataset in found.data.eval.values()] == [f"{tmp_path}/test.parquet", "openai/gsm8k"]
    assert (found.reward.function, found.algorithm.correction.name) == (f"{tmp_path}/reward.py:score", "acr")
    assert shared_paths(found) == {
        "model.path": f"{tmp_path}/model", "critic.path": f"{tmp_path}/critic",
        "algorithm.policy_loss.name": f"{tmp_path}/loss.py",
    }  # fmt: skip
    assert config.model.path == "./model/" and config.output_dir == "runs"  # what the user wrote stays for config.yaml


def test_names_of_the_hub_are_shared_by_themselves():
    config = TrainConfig()
    config.model.path = "Qwen/Qwen2.5-0.5B-Instruct"
    assert shared_paths(with_absolute_paths(config)) == {}
