"""One process per run folder, one configuration per run."""

import os

import pytest
import yaml

from qurl.config import QuantizationConfig, StageConfig, TrainConfig
from qurl.config.data import DatasetConfig
from qurl.errors import ConfigError
from qurl.trainer.run_folder import RunFolder


def config(tmp_path, **changes):
    made = TrainConfig(run_name="r", output_dir=str(tmp_path), quantization=QuantizationConfig(format="int8"))
    made.model.path = "m"
    for key, value in changes.items():
        setattr(made, key, value)
    return made


def begun(made):
    """A run that has started with this configuration and has a checkpoint."""
    with RunFolder(made) as folder:
        folder.write_config()
        (folder.path / "checkpoints").mkdir()
        (folder.path / "checkpoints" / "latest").write_text("step_000001")


def test_the_resolved_configuration_is_saved_as_plain_yaml(tmp_path):
    with RunFolder(config(tmp_path)) as folder:
        assert not (tmp_path / "r" / "config.yaml").exists()  # nothing has started yet
        folder.write_config()
        saved = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert saved["quantization"]["format"] == "int8"
    assert saved["algorithm"]["kl"]["estimator"] == "k3"


def test_a_second_process_is_refused(tmp_path):
    with RunFolder(config(tmp_path)), pytest.raises(ConfigError, match="another process trains in"):
        RunFolder(config(tmp_path)).__enter__()
    with RunFolder(config(tmp_path)):
        pass


def test_resuming_with_another_setting_names_the_key_and_both_values(tmp_path):
    begun(config(tmp_path))
    with pytest.raises(ConfigError, match=r"seed=5: the run in .* was started with 0; resume with the same arguments"):
        RunFolder(config(tmp_path, seed=5)).__enter__()
    with RunFolder(config(tmp_path)):  # the refused attempt left no lock
        pass


def test_a_longer_run_is_the_same_run(tmp_path):
    begun(config(tmp_path))
    with RunFolder(config(tmp_path, num_steps=999)) as folder:
        assert folder.path == tmp_path / "r"


def test_a_damaged_configuration_of_the_run_is_an_input_error_and_leaves_no_lock(tmp_path):
    begun(config(tmp_path))
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
    begun(config(tmp_path, stages=stages))
    with RunFolder(config(tmp_path, stages=stages)):
        pass
    with pytest.raises(ConfigError, match=r"stages\[1\]\.from_step=9: the run in .* was started with 8"):
        RunFolder(config(tmp_path, stages=[stages[0], StageConfig(from_step=9, max_response_tokens=32)])).__enter__()


def test_a_refused_command_leaves_nothing_and_one_that_has_trained_everything(tmp_path):
    made = config(tmp_path / "new" / "runs")
    with pytest.raises(ValueError, match="no such column"), RunFolder(made) as folder:
        (folder.path / "log.txt").write_text("so far")
        raise ValueError("no such column")
    assert not (tmp_path / "new").exists()
    with RunFolder(made):
        pass  # "is trained already", or Ctrl-C before anything was written
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="late"), RunFolder(made) as folder:
        (folder.path / "metrics.jsonl").write_text("{}")
        raise ValueError("late")
    assert (folder.path / "metrics.jsonl").exists()
    with pytest.raises(RuntimeError), RunFolder(config(tmp_path, run_name="world")) as folder:
        (folder.path / "log.txt").write_text("what the world did")
        raise RuntimeError
    assert (folder.path / "log.txt").exists() and not (folder.path / ".lock").exists()


def test_a_refused_resume_leaves_the_configuration_of_the_run(tmp_path):
    begun(config(tmp_path))
    before = (tmp_path / "r" / "config.yaml").read_text()
    with pytest.raises(ValueError), RunFolder(config(tmp_path, num_steps=7)):
        raise ValueError
    assert (tmp_path / "r" / "config.yaml").read_text() == before
    with RunFolder(config(tmp_path, num_steps=7)) as folder:
        folder.write_config()
    assert "num_steps: 7" in (tmp_path / "r" / "config.yaml").read_text()


def test_another_spelling_of_a_path_is_the_same_path_also_for_a_checkpoint_without_fingerprints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    os.symlink(tmp_path / "m", tmp_path / "link")
    begun(config(tmp_path))
    for spelling in ("m", "./m/", f"{tmp_path}/m", "link", "../" + tmp_path.name + "/m"):
        made = config(tmp_path)
        made.model.path = spelling
        with RunFolder(made) as folder:
            folder.refuse_other_inputs({}, {})
    made.model.path = "n"
    with RunFolder(made) as folder, pytest.raises(ConfigError, match=r"model\.path=n: the run in .* was started with m; resume"):
        folder.refuse_other_inputs({}, {})
    with RunFolder(made) as folder:  # where there are fingerprints, they decide
        folder.refuse_other_inputs({"inputs": {"model.path": 1}}, {"model.path": 1})
        with pytest.raises(ConfigError, match=r"model\.path=n: .*; restore it, or begin another run"):
            folder.refuse_other_inputs({"inputs": {"model.path": {"files": {"a": 1}}}}, {"model.path": {"files": {"a": 2}}})


def test_an_evaluation_set_may_be_new_or_gone_on_resume_but_no_other(tmp_path):
    def with_sets(**paths):
        made = config(tmp_path)
        made.data.eval = {name: DatasetConfig(path=path, **more) for name, (path, more) in paths.items()}
        return made

    begun(with_sets(a=("a.jsonl", {}), b=("b.jsonl", {})))
    for sets in ({}, {"a": ("a.jsonl", {})}, {"a": ("a.jsonl", {}), "c": ("c.jsonl", {})}):
        with RunFolder(with_sets(**sets)) as folder:
            folder.refuse_other_inputs({}, {})
    with pytest.raises(ConfigError, match=r"data\.eval\.a\.max_rows=3: the run in .* was started with None"):
        RunFolder(with_sets(a=("a.jsonl", {"max_rows": 3}))).__enter__()


@pytest.mark.parametrize("output_dir", ["/proc/x", "/proc/1", "/dev/null"])
def test_a_folder_in_which_nothing_can_be_made_is_an_input_error(output_dir):
    with pytest.raises(ConfigError, match=f"output_dir={output_dir}: .* cannot be written .*; name a folder that can be"):
        RunFolder(TrainConfig(run_name="r", output_dir=output_dir)).__enter__()


def test_a_file_where_the_run_folder_should_be_is_an_input_error_and_stays(tmp_path):
    (tmp_path / "r").write_text("mine")
    with pytest.raises(ConfigError, match="output_dir=.*/r cannot be written"):
        RunFolder(config(tmp_path)).__enter__()
    assert (tmp_path / "r").read_text() == "mine"
