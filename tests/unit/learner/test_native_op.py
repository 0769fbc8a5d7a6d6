"""A process that was killed while it compiled must not keep later ones waiting."""

import subprocess
import sys

from qurl.learner.native_op import build, build_folder, exclusive_build

HOLD = """
import sys, time
from pathlib import Path
from qurl.learner.native_op import exclusive_build
folder = Path(sys.argv[1])
with exclusive_build(folder):
    (folder / "op").mkdir()
    (folder / "op" / "lock").touch()
    print("compiling", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_build_left_locked_is_unlocked(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "compiling\n"
        process.kill()
    seen = []
    build(lambda: seen.append((tmp_path / "op" / "lock").exists()))
    assert seen == [False]


def test_environments_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = build_folder()
    monkeypatch.setattr(sys, "prefix", "/another")
    assert first.is_dir() and first != build_folder()
    with exclusive_build(first):
        assert (first / ".qurl-build").exists()
