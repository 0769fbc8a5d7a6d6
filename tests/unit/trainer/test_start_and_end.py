"""What a run says when a part of it does not start, and with which code it ends."""

import logging
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from qurl.config import TrainConfig
from qurl.errors import ConfigError, GuardStop
from qurl.trainer.checkpoint import Checkpoints
from qurl.trainer.prepare import check_vocabulary
from qurl.trainer.run import EXIT_FAILED, EXIT_GUARD, end
from qurl.trainer.start import naming, ray_session


@pytest.mark.parametrize(
    ("raised", "kind", "told"),
    [
        (ValueError("model.path=x:\n broken"), ValueError, "the learner did not start: model.path=x: broken; the whole output"),
        (KeyError("boom"), RuntimeError, "the learner did not start: KeyError: 'boom'; the whole output is in /logs"),
    ],
)
def test_a_failed_start_is_one_line_that_names_the_part_and_its_output(raised, kind, told):
    with pytest.raises(kind) as caught, naming("the learner did not start", Path("/logs")):
        raise raised
    assert type(caught.value) is kind and str(caught.value).startswith(told)


def test_the_user_s_errors_pass_and_all_others_become_an_exit_code(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    with pytest.raises(ConfigError):
        end(ConfigError("a=1"), checkpoints)
    assert end(GuardStop("loss"), checkpoints) == EXIT_GUARD
    with caplog.at_level(logging.ERROR):
        assert end(OSError(28, "No space left on device"), checkpoints) == EXIT_FAILED
    assert caplog.messages[-1] == "OSError: [Errno 28] No space left on device"


def test_the_hint_to_go_on_needs_a_checkpoint(tmp_path, caplog):
    folder = tmp_path / "checkpoints" / "step_000001"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder.parent / "latest").write_text(folder.name)
    end(RuntimeError("a learner rank died"), Checkpoints(tmp_path, keep_last=1))
    assert caplog.messages[-1] == "a learner rank died; the same command goes on from the last checkpoint"


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    from transformers import Qwen2Config

    Qwen2Config(vocab_size=50).save_pretrained(tmp_path)
    config = TrainConfig()
    config.model.path = str(tmp_path)
    check_vocabulary(config, [[0, 49], [3]])
    with pytest.raises(ConfigError, match="it makes token 50, the vocabulary of .* has 50"):
        check_vocabulary(config, [[0, 49], [50]])


@pytest.mark.parametrize("num_failures", [0, 1, 2])
def test_a_local_ray_has_no_niceness_and_is_tried_once_more(monkeypatch, num_failures):
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    starts = []

    def init(**options):
        starts.append((options["address"], os.environ["RAY_worker_niceness"]))
        if len(starts) <= num_failures:
            raise Exception("The current node timed out during startup.")  # as Ray does
        return SimpleNamespace(address_info={"session_dir": "/session"})

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    if num_failures == 2:
        with pytest.raises(RuntimeError, match=r"timed out during startup\.; this machine has a load of \d+ on \d+ cores"):
            ray_session(TrainConfig()).__enter__()
    else:
        with ray_session(TrainConfig()) as logs:
            assert logs == Path("/session/logs")
    assert starts == [("local", "0")] * min(2, num_failures + 1)


def test_a_cluster_that_does_not_answer_is_an_input_error_at_once():
    with socket.socket() as reserved:  # bound, but nobody listens
        reserved.bind(("127.0.0.1", 0))
        config = TrainConfig()
        config.cluster.address = f"127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"cluster\.address=127\.0\.0\.1:\d+: no Ray cluster answers"), ray_session(config):
            pass
