"""An interrupted preparation goes on where it stopped."""

import json

import pytest

from qurl.warmstart import run_stage, write_problems


@pytest.fixture
def build(tmp_path):
    """A stage that writes one file, and counts its runs in `build.runs`."""

    def build():
        build.runs += 1
        (tmp_path / "out").write_text(str(build.runs))
        return [tmp_path / "out"]

    build.runs = 0
    return build


def test_a_finished_stage_is_skipped_until_forced_or_set_differently(tmp_path, build):
    assert run_stage(tmp_path, "a", {"seed": 0, "sizes": (1, 2)}, build)
    assert not run_stage(tmp_path, "a", {"seed": 0, "sizes": (1, 2)}, build)
    assert run_stage(tmp_path, "a", {"seed": 1, "sizes": (1, 2)}, build)
    assert run_stage(tmp_path, "a", {"seed": 1, "sizes": (1, 2)}, build, force=True)
    assert run_stage(tmp_path, "b", {"seed": 1, "sizes": (1, 2)}, build)
    assert build.runs == 4


def test_a_stage_runs_again_when_what_it_wrote_is_gone(tmp_path, build):
    run_stage(tmp_path, "a", {}, build)
    (tmp_path / "out").unlink()
    assert run_stage(tmp_path, "a", {}, build)


def test_a_stage_that_failed_leaves_no_stamp_even_where_it_once_finished(tmp_path, build):
    run_stage(tmp_path, "a", {}, build)

    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run_stage(tmp_path, "a", {}, fail, force=True)
    assert run_stage(tmp_path, "a", {}, build)


def test_problems_are_json_lines(tmp_path):
    path = write_problems(tmp_path / "p.jsonl", [("1+2", "3"), ('"quoted"\n', "x")])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"problem": "1+2", "answer": "3"},
        {"problem": '"quoted"\n', "answer": "x"},
    ]
