"""What survives a killed evaluation, and which command may go on with it."""

from __future__ import annotations

import json

import pytest

from qurl.evaluation.journal import Journal
from qurl.evaluation.record import ProblemRecord

CONFIG = {"model": "m", "benchmarks": ["amc23"], "temperature": 0.6, "problems": {"amc23": "ab"}}


def record(problem, rewards=(1.0, None)):
    n = len(rewards)
    return ProblemRecord(
        benchmark="amc23", problem=problem, ground_truth="2", rewards=list(rewards), num_tokens=[3] * n, truncated=[False] * n,
        errors=[None if r is not None else "timeout after 1 s" for r in rewards], votes=["2"] * n, responses=["\u2028 \ud800"] * n,
    )  # fmt: skip


def test_what_was_appended_is_there_for_the_next_process(tmp_path):
    with Journal(tmp_path / "e", CONFIG) as journal:
        assert journal.done == {}
        for name in ("a", "b"):
            journal.append(record(name))
    with Journal(tmp_path / "e", CONFIG) as journal:
        assert journal.done == {("amc23", name): record(name) for name in ("a", "b")}


@pytest.mark.parametrize("kept", [1, 30, -1])
def test_half_a_line_at_the_end_is_cut_off_and_its_problem_done_again(tmp_path, kept):
    with Journal(tmp_path, CONFIG) as journal:
        journal.append(record("a"))
        whole = (tmp_path / "problems.jsonl").read_bytes()
        journal.append(record("b"))
    path = tmp_path / "problems.jsonl"
    path.write_bytes(whole + path.read_bytes()[len(whole) :][:kept])
    with Journal(tmp_path, CONFIG) as journal:
        assert list(journal.done) == [("amc23", "a")]
        journal.append(record("b"))
    assert len(path.read_bytes().splitlines()) == 2
    with Journal(tmp_path, CONFIG) as journal:
        assert len(journal.done) == 2


def test_a_damaged_line_in_the_middle_is_refused_by_number(tmp_path):
    with Journal(tmp_path, CONFIG) as journal:
        journal.append(record("a"))
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(ValueError, match="line 1 is damaged"), Journal(tmp_path, CONFIG):
        pass


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"temperature": 1.0}, "temperature=1.0: .* was started with 0.6"), ({"problems": {"amc23": "cd"}}, "amc23 asks other")],
)
def test_another_configuration_in_the_same_folder_is_refused_with_the_key(tmp_path, changed, told):
    with Journal(tmp_path, CONFIG) as journal:
        journal.append(record("a"))
    with pytest.raises(ValueError, match=told), Journal(tmp_path, CONFIG | changed):
        pass
    with Journal(tmp_path, CONFIG):
        pass


def test_an_evaluation_that_does_not_start_leaves_nothing_and_refuses_no_other_command(tmp_path):
    with pytest.raises(RuntimeError), Journal(tmp_path / "e", CONFIG):
        raise RuntimeError("the rollout engine did not start")
    assert not (tmp_path / "e").exists()
    with Journal(tmp_path / "e", CONFIG | {"temperature": 1.0}) as journal:
        journal.append(record("a"))
    assert json.loads((tmp_path / "e" / "config.json").read_text())["temperature"] == 1.0


def test_two_processes_cannot_share_a_folder(tmp_path):
    with Journal(tmp_path, CONFIG), pytest.raises(ValueError, match="another process"), Journal(tmp_path, CONFIG):
        pass


def test_a_damaged_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"), Journal(tmp_path, CONFIG):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    with pytest.raises(ValueError, match="is no folder of an evaluation"), Journal(tmp_path, CONFIG):
        pass


def test_results_replace_earlier_ones_whole(tmp_path):
    with Journal(tmp_path, CONFIG) as journal:
        journal.write_results({"a": 1})
        assert json.loads(journal.write_results({"b": 2}).read_text()) == {"b": 2}


def test_the_model_of_a_run_is_looked_for_where_the_run_was_started(tmp_path, monkeypatch):
    from qurl.evaluation.problems import _model_of_run

    (tmp_path / "there" / "m").mkdir(parents=True)
    run = tmp_path / "there" / "runs" / "x"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("model: {path: m}\noutput_dir: runs\nrun_name: x\n")
    monkeypatch.chdir(tmp_path)
    assert _model_of_run(run).path == str(tmp_path / "there" / "m")
