"""One writer at a time: another process is refused at once, and what a killed one leaves holds nobody up."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qurl.cli.main import main
from qurl.errors import ConfigError
from qurl.locks import only_process, only_writer

WRITER = """
import sys
from pathlib import Path
from qurl.locks import only_writer

with only_writer(Path(sys.argv[1])):
    print("holds", flush=True)
    sys.stdin.read()
"""


def other_writer(out):
    """A process that holds the lock of `out` until its input ends."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"holds\n"
    return process


@pytest.mark.parametrize("argv", [
    ["quantize", "model", "out", "--format", "int8"],
    ["search", "model", "out", "--text", "text.jsonl"],
    ["bench", "perplexity", "model", "--formats", "int8", "--text", "text.jsonl", "--out", "out"],
    ["calibrate", "model", "out", "--operands", "weights"],
])  # fmt: skip
def test_a_second_command_with_the_same_output_is_refused_with_one_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with other_writer("out") as process:
        assert main(argv) == 2
        told = f"error: another process writes {tmp_path / 'out'}; wait for its end, or name another\n"
        assert capsys.readouterr().err.endswith(told) and not (tmp_path / "out").exists()
        process.stdin.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_killed_writer_holds_nobody_up(tmp_path):
    out = tmp_path / "new" / "out"
    with other_writer(out) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / "new" / ".out.lock").exists()
    with only_writer(out), pytest.raises(ConfigError, match="another process writes"), only_writer(out):
        pass
    assert not list((tmp_path / "new").iterdir())


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    opened, is_removed = Path.open, []

    def open_and_remove_once(self, *args):
        file = opened(self, *args)
        if not is_removed:
            is_removed.append(True)
            self.unlink()
        return file

    monkeypatch.setattr(Path, "open", open_and_remove_once)
    with only_process(path, "held"), pytest.raises(ConfigError, match="held"), only_process(path, "held"):
        pass


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/out cannot be written"), only_writer(tmp_path / "file" / "out"):
        pass
