"""Exit codes and one-line errors of the command line, through main(argv)."""

import sys
from pathlib import Path

import pytest

from qurl.cli.main import COMMANDS, main
from qurl.errors import GuardStop


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1, captured
    assert captured.startswith("error: ")
    return captured


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help_with_examples_or_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert "Examples:" in told or "Exit code" in told


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["plan", "rollout.temprature=1"], "did you mean rollout.temperature?"),
        (["plan"], "model.path is not set"),
        (["train", "model.path=m", "data=gsm8k", "rollout.temperature=0"], "rollout.temperature=0.0"),
        (["plan", "model.path=./nowhere", "data=gsm8k"], "model.path=./nowhere does not exist"),
        (["plan", "model.path=m", "data.train.path=nowhere.jsonl"], "data.train.path=nowhere.jsonl does not exist"),
        (["prepare", "nothing"], "no recipe 'nothing'"),
        (["report", "/nowhere"], "/nowhere"),
        (["export", "/nowhere", "/nowhere2"], "/nowhere"),
        (["export", ".", "x", "--format", "int9"], "use one of none, int8"),
        (["eval", "m", "--benchmarks", "aime26"], "benchmark 'aime26' is unknown; use aime24"),
        (["eval", "m", "--benchmarks", "amc23", "--samples", "2", "--temperature", "1", "--k", "4"], "--k 4: pass@4"),
        (["eval", "m", "--benchmarks", "amc23", "--data", "amc23"], "write --data NAME=FILE"),
        (["eval", "m", "--benchmarks", "amc23", "--format", "int9"], "--format int9 is unknown"),
    ],
)
def test_user_errors_exit_with_2_and_one_line(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert told in one_line(capsys)


@pytest.mark.parametrize("argv", [[], ["trian"], ["report"], ["plan", "--gpu"]])
def test_mistyped_command_lines_exit_with_2_and_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    one_line(capsys)


@pytest.mark.parametrize(
    ("raised", "code", "told"), [(GuardStop("loss is nan"), 3, "loss is nan"), (KeyboardInterrupt(), 130, "interrupted")]
)
def test_guard_stops_and_interrupts_have_their_own_codes(
    raised: BaseException, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import qurl.cli.report

    def fail(args: object) -> int:
        raise raised

    monkeypatch.setattr(qurl.cli.report, "main", fail)
    assert main(["report", "x"]) == code
    assert told in capsys.readouterr().err


def test_a_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QURL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown key"):
        main(["plan", "typo=1"])


@pytest.mark.parametrize("recipe", ["gsm8k", "gsm8k_calc", "quickstart"])
def test_an_unknown_option_of_a_recipe_is_one_line(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prepare", recipe, "--sed", "1", "--forse"])
    assert ended.value.code == 2
    assert f"see qurl prepare {recipe} --help" in one_line(capsys)


def test_prepare_hands_its_arguments_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "toy"
    recipe.mkdir()
    (recipe / "prepare.py").write_text("import pathlib\ndef main(argv):\n    pathlib.Path(argv[1]).write_text(argv[0])\n")
    monkeypatch.setattr("qurl.config.compose.assets_dir", lambda name: tmp_path)
    assert main(["prepare", "toy", "--seed", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_text() == "--seed"


def test_doctor_finds_this_environment_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "FAIL" not in told
    assert "vLLM plugin" in told
    assert "wandb" not in sys.modules
