"""The perplexity recipe holds out problems, not rows."""

import json
import sys

import pytest

from qurl.config.compose import assets_dir
from qurl.plug import resolve


@pytest.fixture(scope="module")
def recipe():
    main = resolve({}, f"{assets_dir('recipes') / 'perplexity' / 'prepare.py'}:main", "recipe")
    return sys.modules[main.__module__]


def test_a_problem_is_on_one_side_whatever_its_solution(recipe):
    documents = [f"What is {i}?\n{answer}" for i in range(2000) for answer in ("a", "b")] + ["  What is  7?  \nc"]
    train, held_out = recipe.split(documents)
    assert sorted(train + held_out) == sorted(documents)
    sides = [{" ".join(document.partition("\n")[0].split()) for document in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert 0.03 < len(held_out) / len(documents) < 0.07  # one in twenty


def test_it_makes_a_model_that_loads_and_does_not_repeat_itself(recipe, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tmp_path / "sums.jsonl"
    rows = [{"question": f"{a}+{b}=", "answer": f"{a + b}"} for a in range(30) for b in range(30)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = recipe.Settings(num_tokens=2048, vocab_size=300, hidden_size=32, num_layers=1)
    for told in ("written", "already there"):
        recipe.prepare(tmp_path / "out", [str(source)], 0, False, settings)
        assert f"model: {tmp_path / 'out' / 'model'} {told}" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert tokenizer.decode(tokenizer.encode("3+4=\n7")) == "3+4=\n7"
    held_out = [json.loads(line)["text"] for line in (tmp_path / "out" / "held_out.jsonl").read_text().splitlines()]
    assert 0 < len(held_out) < 100 and not (tmp_path / "out" / "pretrain.pt").exists()
