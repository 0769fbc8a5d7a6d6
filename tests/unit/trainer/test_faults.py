"""Ctrl-C, SIGTERM and kill -9 at every point of a run: the same command goes on, and its files equal an unbroken run's."""

import json
import random
import shutil
import signal

from faulty_run import Points, hit, in_child, run, run_and_kill, small_run

TIMES = ("time/", "timestamp", "rollout/tokens_per_s")
STAGES = {
    "rollout", "reward", "probe", "update", "after the update", "sync", "evaluation begins", "evaluation goes on",
    "open metrics.jsonl", "os.rename metrics.tmp", "open evaluations.jsonl", "open step_000001.jsonl", "checkpoint",
    "os.mkdir .partial_step_000002", "open weights", "open trainer_state.json", "os.rename .partial_step_000002",
    "open .latest", "os.rename .latest",
}  # fmt: skip


def history(folder):
    """What the run logged, times aside."""

    def rows(name):
        lines = (folder / name).read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMES)} for line in lines]

    return rows("metrics.jsonl"), rows("evaluations.jsonl")


def unbroken(folder, points):
    """(history, names of all points) of a run that nothing disturbs."""
    assert run(folder, small_run(), points) == 0
    found = history(folder), points.passed
    shutil.rmtree(folder)
    return found


def finish(folder, points):
    """The same command once more, and once again: the run is done."""
    assert run(folder, small_run(), points) == 0
    assert run(folder, small_run(), points) == 0 and not points.passed


def test_the_unbroken_run_has_every_iteration_and_every_due_evaluation_once(tmp_path):
    def scenario():
        (metrics, evaluations), points = unbroken(tmp_path / "run", Points(tmp_path / "run"))
        assert [row["step"] for row in metrics] == [0, 1, 2]
        assert [row["step"] for row in evaluations] == [0, 1, 2, 3]
        for row in metrics:
            assert row["eval/held_out/avg_at_k"] == evaluations[row["step"] + 1]["eval/held_out/avg_at_k"] == row["policy/loss"]
        assert set(points) >= STAGES, STAGES - set(points)

    in_child(scenario)


def test_a_signal_at_any_point_costs_no_line_no_evaluation_and_changes_no_number(tmp_path):
    """SIGINT and SIGTERM, which the loop hears in the same way, in turns."""

    def scenario():
        folder = tmp_path / "run"
        points = Points(folder)
        expected, names = unbroken(folder, points)
        for index, name in enumerate(names, start=1):
            assert run(folder, small_run(), points, hit(index, (signal.SIGINT, signal.SIGTERM)[index % 2])) in (0, 130), name
            finish(folder, points)
            assert history(folder) == expected, (index, name)
            shutil.rmtree(folder)

    in_child(scenario)


def test_kill_9_at_any_point_costs_no_line_no_evaluation_and_changes_no_number(tmp_path):
    """What a kill leaves is what is on the disk at that moment: one run is copied at each of its points."""

    def scenario():
        folder = tmp_path / "run"
        points = Points(folder)
        expected, names = unbroken(folder, points)
        copies = [tmp_path / f"{index}" for index in range(len(names) + 1)]
        run(folder, small_run(), points, lambda index: shutil.copytree(folder, copies[index]) if folder.exists() else None)
        for index in range(2, len(names) + 1):
            shutil.rmtree(folder)
            copies[index].rename(folder)
            finish(folder, points)
            assert history(folder) == expected, (index, names[index - 1])

    in_child(scenario)


def test_a_run_that_is_hit_again_and_again_has_the_same_history(tmp_path):
    def scenario():
        folder = tmp_path / "run"
        points = Points(folder)
        expected, names = unbroken(folder, points)
        for seed in range(10):
            draw = random.Random(seed)
            for _ in range(4):
                index = draw.randrange(4, len(names) // 2)
                if draw.random() < 0.5:
                    run(folder, small_run(), points, hit(index, signal.SIGTERM))
                else:
                    run_and_kill(folder, small_run(), points, index)
            finish(folder, points)
            assert history(folder) == expected, seed
            shutil.rmtree(folder)

    in_child(scenario)


def test_with_overlap_too_every_iteration_and_every_due_evaluation_is_there_once(tmp_path):
    def scenario():
        folder = tmp_path / "run"
        points, config = Points(folder), small_run(max_staleness=2)
        assert run(folder, config, points) == 0
        for index in range(4, len(points.passed), 6):
            shutil.rmtree(folder)
            run(folder, config, points, hit(index, signal.SIGTERM))
            assert run(folder, config, points) == 0
            metrics, evaluations = history(folder)
            assert [row["step"] for row in metrics] == [0, 1, 2] and [row["step"] for row in evaluations] == [0, 1, 2, 3]
            for row in metrics:  # of the weights that this iteration made, whatever was sampled meanwhile
                assert row["eval/held_out/avg_at_k"] == row["policy/loss"]

    in_child(scenario)


def test_a_real_kill_9_leaves_what_the_copies_have(tmp_path):
    def scenario():
        folder = tmp_path / "run"
        points = Points(folder)
        expected, names = unbroken(folder, points)
        for name in ("evaluation goes on", "os.rename metrics.tmp", "os.rename .latest"):
            last = len(names) - names[::-1].index(name)
            assert run_and_kill(folder, small_run(), points, last) == -signal.SIGKILL
            finish(folder, points)
            assert history(folder) == expected, name
            shutil.rmtree(folder)

    in_child(scenario)
