"""Likely mistakes on the command line: one line with the remedy, exit 2, before anything heavy starts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from qurl.cli.main import main

MISTAKES = [
    ("train recipe=quickstrat", "recipe=quickstrat is not an option; use one of"),
    ("train recipe=quickstart quantization=int9", "quantization=int9 is not an option; use one of axbxp"),
    ("train recipe=quickstart quantization.format=int9", "int9 is unknown; use quantization= with one of axbxp"),
    ("train recipe=quickstart quantization.format=int8", "use quantization=int8"),
    ("train recipe=quickstart quantization.format=myfmt.py:Sf4", "myfmt.py:Sf4 is unknown; use quantization= with one of axbxp"),
    ("train recipe=quickstart learner.lr=1e-5", "unknown key 'learner.lr'"),
    ("train recipe=quickstart learner.learning_rate=fast", "learner.learning_rate=fast"),
    ("train recipe=quickstart rollout.num_prompts_per_step=0", "rollout.num_prompts_per_step=0 cannot run; use a number >= 1"),
    ("train recipe=quickstart rollout.num_samples_per_prompt=1 algorithm.advantage=grpo", "algorithm.advantage"),
    ("train recipe=quickstart rollout.num_samples_per_prompt=1", "at least 2"),
    ("train recipe=quickstart algorithm.clip_hihg=0.28", "did you mean algorithm.policy_loss.clip_high"),
    ("train recipe=quickstart num_steps=-1", "num_steps=-1 cannot run; use a number >= 1"),
    ("train recipe=quickstart cluster.gpus=2", "unknown key 'cluster.gpus'"),
    ("train recipe=quickstart wandb.enabled=true", "did you mean logging.wandb"),
    ("train recipe=quickstart logging.sinks=[tensorbord]", "unknown key 'logging.sinks'"),
    ("train recipe=quickstart data.train.path=nowhere.jsonl", "data.train.path=nowhere.jsonl does not exist"),
    ("train recipe=quickstart data.train.path=3", "data.train.path=3 cannot run; use a .jsonl"),
    ("train recipe=quickstart data.train.path=[]", "data.train.path='' cannot run"),
    ("train recipe=quickstart ~data.eval.no_such_set", "~data.eval.no_such_set"),
    ("train recipe=quickstart rollout.engine_args.no_such_argument=1", "no_such_argument is no argument of vLLM's engine"),
    ("train /no/such.yaml", "write recipe=/no/such.yaml"),
    ("train recipe=/no/such.yaml", "recipe=/no/such.yaml cannot be read"),
    ("eval runs/none --benchmarks gsm8k --format int9", "--format int9 is unknown; use one of"),
    ("eval MODEL --benchmarks mine --data mine=test.parquet", "'mine' is unknown; use aime24"),
    ("eval MODEL --benchmarks gsm8k --control-tokens drop", "--control-tokens drop is unknown; use text or keep"),
    ("report runs/none", "runs/none"),
]


@pytest.mark.parametrize(("command", "words"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_one_line_with_its_remedy(command: str, words: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        code = main(shlex.split(command))
    except SystemExit as ended:  # argparse
        code = ended.code
    (line,) = capsys.readouterr().err.splitlines()
    assert (code, line[:7]) == (2, "error: ")
    assert words in line
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, data and rewards that a new user might have."""
    from qurl.warmstart.model import make_tiny_model

    root = tmp_path_factory.mktemp("own")
    make_tiny_model(root / "model")
    rows = [{"question": f"{i}+1", "answer": str(i + 1)} for i in range(3)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "one.py").write_text("def reward(text):\n    return 1.0\n")
    (root / "zero.py").write_text("def reward(response, ground_truth):\n    return 1 / 0\n")
    return root


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train.answer_key=solution"], "no such column; found question, answer"),
        (["data.train.prompt_key=question", "data.prompt_template='{problme}='"], "data.prompt_template"),
        (["data.chat_template=true"], "the tokenizer has no chat template; set it to false"),
        (["reward.function=one.py:reward"], "signature"),
        (["reward.function=zero.py:reward"], "ZeroDivisionError"),
        (["reward.function=zero.py:no_such_name"], "no attribute 'no_such_name'"),
        (["data.train.path=model"], "is a folder"),
        (["reward.function=gsm8k", "data.train.answer_key=question"], "reward.function='gsm8k' fails"),
        ([], ""),
    ],
)
def test_plan_refuses_what_training_would_after_opening_it(
    overrides: list[str], words: str, folder: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(folder)
    command = [
        "plan", "model.path=model", "data.train.path=train.jsonl", "data.train.prompt_key=question", "cluster=cpu",
        "data.max_prompt_tokens=64", "rollout.max_response_tokens=64", "reward.function=exact", *overrides,
    ]
    assert main(command) == (2 if words else 0)
    captured = capsys.readouterr()
    if words:
        (line,) = captured.err.splitlines()
        assert words in line
    else:
        assert "3 training prompts" in " ".join(captured.out.split())
