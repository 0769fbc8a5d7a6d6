"""One process per run folder, one configuration per run."""

import pytest
import yaml

from qurl.config import QuantizationConfig, StageConfig, TrainConfig
from qurl.errors import ConfigError
from qurl.trainer.run_folder import RunFolder


def config(tmp_path, **changes):
    made = TrainConfig(run_name="r", output_dir=str(tmp_path), quantization=QuantizationConfig(format="int8"))
    made.model.path = "m"
    for key, value in changes.items():
        setattr(made, key, value)
    return made


def checkpoint(tmp_path):
    (tmp_path / "r" / "checkpoints").mkdir()
    (tmp_path / "r" / "checkpoints" / "latest").write_text("step_000001")


def test_the_resolved_configuration_is_saved_as_plain_yaml(tmp_path):
    with RunFolder(config(tmp_path)):
        saved = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert saved["quantization"]["format"] == "int8"
    assert saved["algorithm"]["kl"]["estimator"] == "k3"


def test_a_second_process_is_refused(tmp_path):
    with RunFolder(config(tmp_path)), pytest.raises(ConfigError, match="another process trains in"):
        RunFolder(config(tmp_path)).__enter__()
    with RunFolder(config(tmp_path)):
        pass


def test_resuming_with_another_setting_names_the_key_and_both_values(tmp_path):
    with RunFolder(config(tmp_path)):
        checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"seed=5: the run in .* was started with 0; resume with the same arguments"):
        RunFolder(config(tmp_path, seed=5)).__enter__()
    with RunFolder(config(tmp_path)):  # the refused attempt left no lock
        pass


def test_a_longer_run_is_the_same_run(tmp_path):
    with RunFolder(config(tmp_path)):
        checkpoint(tmp_path)
    with RunFolder(config(tmp_path, num_steps=999)):
        pass


def test_a_damaged_configuration_of_the_run_is_an_input_error_and_leaves_no_lock(tmp_path):
    with RunFolder(config(tmp_path)):
        checkpoint(tmp_path)
    for content in ("", "[1", "- 1"):
        (tmp_path / "r" / "config.yaml").write_text(content)
        with pytest.raises(ConfigError, match=r"config\.yaml is damaged; remove it"):
            RunFolder(config(tmp_path)).__enter__()
    (tmp_path / "r" / "config.yaml").unlink()
    with RunFolder(config(tmp_path)):
        pass


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir="):
        RunFolder(config(tmp_path / "file")).__enter__()


def test_resuming_with_other_stages_names_the_one_that_differs(tmp_path):
    stages = [StageConfig(from_step=4, max_response_tokens=16), StageConfig(from_step=8, max_response_tokens=32)]
    with RunFolder(config(tmp_path, stages=stages)):
        checkpoint(tmp_path)
    with RunFolder(config(tmp_path, stages=stages)):
        pass
    with pytest.raises(ConfigError, match=r"stages\[1\]\.from_step=9: the run in .* was started with 8"):
        RunFolder(config(tmp_path, stages=[stages[0], StageConfig(from_step=9, max_response_tokens=32)])).__enter__()
