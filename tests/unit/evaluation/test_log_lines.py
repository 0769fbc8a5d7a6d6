"""Progress where there is no terminal."""

from qurl.cli.eval import LogLines


def test_steps_are_said_once_and_a_long_problem_once_a_minute():
    log = LogLines()
    assert log.is_due(0, 40, 0.0) and not log.is_due(0, 40, 30.0)
    assert log.is_due(0, 40, 61.0) and not log.is_due(0, 40, 62.0)  # a minute without a problem
    assert not log.is_due(1, 40, 63.0) and log.is_due(2, 40, 64.0) and not log.is_due(2, 40, 65.0)
    assert sum(log.is_due(done, 40, 66.0) for done in range(3, 41)) == 19  # every other one
