"""What people read when something fails."""

from qurl.errors import MAX_MESSAGE_CHARACTERS, ConfigError, one_line, remote_cause


def test_an_error_of_any_kind_is_one_bounded_line():
    assert one_line(ConfigError("a=1:\n  use 2")) == "a=1: use 2"
    assert one_line(KeyError("boom")) == "KeyError: 'boom'"
    assert one_line(RuntimeError()) == "RuntimeError"
    assert len(one_line(RuntimeError("x" * 10**5))) == MAX_MESSAGE_CHARACTERS


def test_the_cause_of_a_remote_error_is_the_exception_of_the_actor():
    from ray.exceptions import RayTaskError

    cause = ConfigError("a=1")
    assert remote_cause(RayTaskError("f", "Traceback ...", cause).as_instanceof_cause()) is cause
    assert remote_cause(cause) is cause
