"""Somebody else's code by name."""

import pytest

from qurl.plug import resolve


@pytest.mark.parametrize("source", ["1 / 0", "def f(:", "import no_such_module", "raise SystemExit"])
def test_a_file_that_cannot_be_imported_is_an_input_error_each_time_it_is_asked_for(tmp_path, source):
    file = tmp_path / "mine.py"
    file.write_text(source + "\nf = 1\n")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"reward\.function='.*mine\.py:f': cannot import"):
            resolve({}, f"{file}:f", "reward.function")
    file.write_text("f = 1\n")
    assert resolve({}, f"{file}:f", "reward.function") == 1
