"""The paper recipes from their own YAML, through every stage: only the model, sizes and paths are others.

The model is trained here, in seconds, to guess in the form that each recipe's prompt asks for, or to ramble: so groups have right
and wrong answers, and responses that are cut."""

import json

import pytest

from qurl.config import DatasetConfig
from qurl.config.compose import compose
from qurl.data import build_prompts, load_rows
from qurl.warmstart import Demonstration, model_config, new_model, save_model, train_tokenizer, warm_start

pytestmark = pytest.mark.e2e

RAMBLING = "again and " * 40
FORMS = {"dapo": "Answer: {}", "deepscaler": "so</think>\\boxed{{{}}}"}


@pytest.fixture(scope="module")
def model(workspace):
    """`guesser/`, and files of sums in the columns of the recipes' data sets."""
    sums = [(f"What is {a} plus {b}?", str(a + b)) for a in range(2) for b in range(1, 3 - a)] * 4
    columns = {"additions": ("problem", "answer"), "questions": ("question", "answer"), "olympiad": ("question", "final_answer")}
    for name, keys in columns.items():
        lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in (sums if name == "additions" else sums[:2])]
        (workspace / f"{name}.jsonl").write_text("\n".join(lines))
    data = {recipe: compose([f"recipe={recipe}"]).data for recipe in FORMS}
    texts = [text for recipe in FORMS for text in (data[recipe].prompt_template, FORMS[recipe].format(12))]
    tokenizer = train_tokenizer([*texts, RAMBLING, *(problem for problem, _ in sums)], 512, chat=True)
    rows = load_rows(DatasetConfig(path=str(workspace / "additions.jsonl"), unique=True), "data.train")
    demonstrations = [
        Demonstration(prompt=prompt.text, response=response)
        for recipe, form in FORMS.items()
        for prompt in build_prompts(rows, tokenizer, data[recipe], "data.train").prompts
        for response in (form.format(1), form.format(2), RAMBLING, RAMBLING)
    ]
    model = new_model(model_config(tokenizer, hidden_size=64, num_layers=2), seed=0)
    warm_start(model, tokenizer, demonstrations * 20, num_epochs=2, batch_size=24, learning_rate=5e-3)
    save_model(model, tokenizer, workspace / "guesser")


def test_dapo(command_line, model):
    code, output = command_line.run(
        "train", "recipe=dapo", "model.path=guesser", "data.train.path=additions.jsonl", "data.eval.aime24.path=additions.jsonl",
        "algorithm.dynamic_sampling.num_prompts_per_generation=32", "algorithm.overlong.penalty_tokens=8",
        "rollout.num_prompts_per_step=16", "rollout.num_samples_per_prompt=4", "rollout.max_response_tokens=24",
        "evaluation.num_samples_per_prompt=2", "num_steps=2",
    )  # fmt: skip
    assert code == 0, output
    rows = command_line.metrics("dapo")
    for row in rows:
        assert (row["rollout/num_trained_groups"], row["policy/num_optimizer_steps"]) == (16, 16)
        assert 0 < row["rollout/discarded_fraction"] < 1
        assert -1 < row["reward/overlong_penalty_mean"] < 0 < row["accuracy/train"] < 1
        assert row["policy/grad_norm"] > 0
    assert 0 <= rows[-1]["eval/aime24/avg_at_k"] <= 1


def test_deepscaler_goes_through_its_three_stages_and_resumes_inside_the_second(command_line, model):
    stages = "stages=[{from_step:1,max_response_tokens:20,num_samples_per_prompt:4},{from_step:3,max_response_tokens:24}]"
    tests = {
        "aime24": "additions", "amc23": "questions", "math500": "additions", "minerva": "questions", "olympiadbench": "olympiad",
    }  # fmt: skip
    arguments = (
        "train", "recipe=deepscaler", "model.path=guesser", "data.train.path=additions.jsonl", stages,
        *(f"data.eval.{name}.path={file}.jsonl" for name, file in tests.items()),
        "rollout.num_prompts_per_step=8", "rollout.num_samples_per_prompt=2", "rollout.max_response_tokens=16",
    )  # fmt: skip
    for num_steps in (2, 4):
        code, output = command_line.run(*arguments, f"num_steps={num_steps}")
        assert code == 0, output
    rows = command_line.metrics("deepscaler")
    assert [row["rollout/stage"] for row in rows] == [0, 1, 1, 2]
    assert [row["rollout/response_length_max"] for row in rows] == [16, 20, 20, 24]  # somebody rambles
    samples = [row["rollout/num_tokens"] / row["rollout/response_length_mean"] for row in rows]
    assert samples == pytest.approx([16, 32, 32, 32])
    assert [row["sync/weight_version"] for row in rows] == [1, 2, 3, 4]
    assert all(row["policy/num_optimizer_steps"] == 2 and row["policy/grad_norm"] > 0 for row in rows)
    assert all(0 < row["policy/kl_loss"] < 1e-3 for row in rows)  # four steps of 1e-6 from the reference, which is loaded twice
    assert all(rows[-1][f"eval/{name}/avg_at_k"] >= 0 for name in tests)
