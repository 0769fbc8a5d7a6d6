"""Checkpoints survive what ends a process half-way."""

import asyncio
import errno

import pytest

from qurl.trainer import checkpoint
from qurl.trainer.checkpoint import Checkpoints


def save(checkpoints, step, content="weights", fail=None, written=None, **state):
    async def save_learner(folder):
        (folder / "weights").write_text(content)
        if fail:
            raise fail
        return written or {"a": {"weights": len(content)}}

    return asyncio.run(checkpoints.save(step, {"step": step, **state}, save_learner))


def test_latest_is_the_newest_complete_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.latest() is None
    for step in (1, 2, 3):
        save(checkpoints, step)
    assert checkpoints.latest().name == "step_000003"
    assert checkpoints.state(checkpoints.latest()) == {"step": 3}
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*")) == ["step_000002", "step_000003"]


def test_a_full_disk_leaves_the_previous_checkpoint_and_says_so(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, 1)
    full = {"No space left": OSError(errno.ENOSPC, "No space left on device"), "unexpected pos": RuntimeError("unexpected pos 64")}
    for told, error in full.items():  # torch's own word for it is the second
        with pytest.raises(RuntimeError, match=rf"step 2 was not written \(\d+ MiB .*{told}.*previous one is still the latest"):
            save(checkpoints, 2, fail=error)
        assert checkpoints.latest().name == "step_000001"
        assert list((tmp_path / "checkpoints").glob(".partial*")) == []


def test_a_process_killed_while_writing_leaves_the_previous_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, 1)
    partial = tmp_path / "checkpoints" / ".partial_step_000002"
    partial.mkdir()
    (partial / "weights").write_text("half")
    assert checkpoints.latest().name == "step_000001"
    save(checkpoints, 3, content="whole")
    assert not partial.exists()
    assert (checkpoints.latest() / "weights").read_text() == "whole"


def test_the_newest_step_is_written_again_in_its_state_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 4, evaluated=2)
    asyncio.run(checkpoints.save(4, {"step": 4, "evaluated": 4}, None))  # no learner is asked
    assert checkpoints.state(checkpoints.latest()) == {"step": 4, "evaluated": 4}


def test_a_step_that_an_overtaken_process_left_is_replaced_and_keeps_no_other_away(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 2)
    save(checkpoints, 4, content="overtaken")
    (tmp_path / "checkpoints" / "step_000002").mkdir()
    (tmp_path / "checkpoints" / "step_000002" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoints" / "latest").write_text("step_000002")
    save(checkpoints, 3)
    assert checkpoints.latest().name == "step_000003" and checkpoints.state(checkpoints.latest()) == {"step": 3}
    save(checkpoints, 4, content="now")
    assert (checkpoints.latest() / "weights").read_text() == "now"
    assert [p.name for p in (tmp_path / "checkpoints").glob("step_*")] == ["step_000004"]


def test_a_pointer_to_an_incomplete_folder_is_refused_by_name(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1)
    (checkpoints.latest() / "trainer_state.json").unlink()
    told = "names step_000001, which is incomplete; no other is there: remove .*checkpoints to begin anew"
    with pytest.raises(ValueError, match=told):
        checkpoints.latest()


@pytest.mark.parametrize("content", ["", "step_0000", "../..", "\x00"])
def test_a_pointer_that_is_cut_short_is_refused_with_the_names_that_work(tmp_path, content):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, 1)
    save(checkpoints, 2)
    (tmp_path / "checkpoints" / "latest").write_text(content)
    with pytest.raises(ValueError, match="latest is damaged: .*; write step_000002 or step_000001 into "):
        checkpoints.latest()


def test_a_damaged_state_is_refused_by_name(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    folder = save(checkpoints, 1)
    for content in ('{"step": ', '{"step": 1}'):
        (folder / "trainer_state.json").write_text(content)
        with pytest.raises(ValueError, match=r"step_000001 is damaged: trainer_state\.json is not readable"):
            checkpoints.state(folder)


def test_a_learner_file_that_is_cut_short_or_gone_is_refused_by_name(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1)
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    folder = save(checkpoints, 2)
    (folder / "weights").write_text("wei")
    with pytest.raises(ValueError, match="weights has 3 of 7 bytes; write step_000001 into .*latest"):
        checkpoints.state(folder)
    (folder / "weights").unlink()
    with pytest.raises(ValueError, match="step_000002 is damaged: weights is gone; write step_000001 into"):
        checkpoints.state(folder)


def test_a_checkpoint_of_which_a_shard_is_not_seen_here_is_not_the_latest(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SEEN_WITHIN_S", 0.0)
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1)
    for written, told in (
        ({"a": {"weights": 7}, "node b": {"random_rank1.pt": 9}}, "random_rank1.pt of node b is not seen on"),
        ({"node b": {"weights": 8, "more": 1}}, r"weights of node b \(and 1 more\) is not seen on"),
    ):
        with pytest.raises(RuntimeError, match=f"step 2 was not written .*{told}.*; the previous one is still the latest"):
            save(checkpoints, 2, written=written)
        assert checkpoints.latest().name == "step_000001"


def test_a_shard_that_is_seen_later_is_waited_for(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep_last=1)

    async def late(seconds):
        (tmp_path / "checkpoints" / ".partial_step_000001" / "late").write_text("1")

    monkeypatch.setattr(checkpoint.asyncio, "sleep", late)
    save(checkpoints, 1, written={"node b": {"weights": 7, "late": 1}})
    assert checkpoints.state(checkpoints.latest()) == {"step": 1}
