"""What a process does not see is named with host, folder and remedy, before anything heavy begins."""

from pathlib import Path

import pytest

from qurl.errors import ConfigError
from qurl.shared_files import host_name, look, shared_files


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    return folder


def test_who_sees_everything_leaves_word_of_it_and_nothing_stays(tmp_path, model):
    run_dir = tmp_path / "runs" / "r"
    code = tmp_path / "loss.py"
    code.write_text("")
    with shared_files(run_dir, {"model.path": str(model), "algorithm.policy_loss.name": str(code)}) as files:
        files.refuse_blindness("learner rank 0", look(files, "learner rank 0", writes=True))
        look(files, "engine 0", writes=False)
    assert list(run_dir.iterdir()) == []


@pytest.mark.parametrize("writes", [True, False])
def test_a_model_that_another_node_does_not_have_is_refused(tmp_path, model, writes):
    with shared_files(tmp_path / "runs" / "r", {"model.path": str(model)}) as files:
        (model / "model.safetensors").write_text("cut")
        told = rf"model\.path={model}: model\.safetensors has 3 bytes on .*, where engine 1 runs, and 7 for the driver; put it on"
        with pytest.raises(ConfigError, match=told):
            look(files, "engine 1", writes=writes)
        (model / "model.safetensors").unlink()
        with pytest.raises(ConfigError, match=r"has no model\.safetensors on"):
            look(files, "engine 1", writes=writes)
        model.rename(tmp_path / "elsewhere")
        with pytest.raises(ConfigError, match=rf"model\.path={model} does not exist on .*, where engine 1 runs; put it on"):
            look(files, "engine 1", writes=writes)


def test_a_rank_that_does_not_see_the_run_folder_names_host_folder_and_remedy(tmp_path):
    run_dir = tmp_path / "runs" / "r"
    with shared_files(run_dir, {}) as files:
        run_dir.rename(tmp_path / "elsewhere")
        with pytest.raises(ConfigError) as caught:
            look(files, "learner rank 1", writes=True)
        assert str(caught.value) == (
            f"output_dir={tmp_path}/runs: {host_name()}, where learner rank 1 runs, does not see the run folder {run_dir}; use a "
            "folder that all nodes share, under the same path on each"
        )
        look(files, "engine 0", writes=False)  # which writes nothing there


def test_what_a_rank_wrote_and_the_driver_does_not_see_is_refused(tmp_path):
    with shared_files(tmp_path / "runs" / "r", {}) as files:
        with pytest.raises(ConfigError, match="what learner rank 1 wrote to .* on node b is not seen on"):
            files.refuse_blindness("learner rank 1", "node b")


def test_a_folder_in_which_nothing_can_be_made_is_an_input_error(tmp_path):
    with pytest.raises(ConfigError, match="output_dir=/proc/x: .* cannot be written"), shared_files(Path("/proc/x/r"), {}):
        pass
