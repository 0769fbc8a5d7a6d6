"""What the recipes generate is right, and what they hold out is held out."""

import ast
import json
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from types import ModuleType

import pytest

from qurl.config.compose import assets_dir, compose
from qurl.plug import resolve


def recipe(name: str) -> ModuleType:
    path = assets_dir("recipes") / name / "prepare.py"
    main = resolve({}, f"{path}:main", "recipe")
    return sys.modules[main.__module__]


@pytest.fixture(scope="module")
def quickstart():
    return recipe("quickstart")


@pytest.fixture(scope="module")
def calc():
    return recipe("gsm8k_calc")


def problems(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["quickstart", "gsm8k", "gsm8k_calc", "ablation"])
def test_a_recipe_composes_and_prepares_the_paths_it_reads(name, capsys):
    config = compose([f"recipe={name}"])
    assert config.run_name == name and config.quantization.format == "int8"
    with pytest.raises(SystemExit):
        recipe(name).main(["--help"])
    assert f"qurl prepare {name}" in capsys.readouterr().out


def test_chains_and_each_step_of_their_demonstrations_are_right(quickstart):
    rng = random.Random(0)
    settings = quickstart.Settings()
    for _ in range(300):
        chain = quickstart.random_chain(rng, 2, settings)
        assert eval(chain.problem) == int(chain.answer)
        assert all(0 <= total <= 99 for total in chain.totals)
        assert chain.demonstration(direct=True).response == f"#### {chain.answer}"
        work, _, answer = chain.demonstration(direct=False).response.partition("\n#### ")
        assert answer == chain.answer and work.split("=")[-1] == answer
        sides = work.split("=")
        assert [eval(side) for side in sides[:-1]] == [int(re.match(r"\d+", side)[0]) for side in sides[1:]]


def test_chains_of_the_ablation_have_partial_results_of_one_digit(quickstart):
    settings = quickstart.Settings(**recipe("ablation").SETTINGS)
    rng = random.Random(0)
    chains = [quickstart.random_chain(rng, 2, settings) for _ in range(300)]
    assert {total for chain in chains for total in chain.totals} == set(range(10))
    assert all(eval(chain.problem) == int(chain.answer) for chain in chains)


def test_quickstart_writes_disjoint_problems_and_a_model_and_does_not_repeat_itself(quickstart, tmp_path, capsys):
    settings = replace(quickstart.Settings(), num_train=50, num_held_out=20, num_demonstrations=64, hidden_size=64, num_layers=1)
    quickstart.prepare(tmp_path, 3, False, settings)
    train, held_out = problems(tmp_path / "train.jsonl"), problems(tmp_path / "held_out.jsonl")
    assert (len(train), len(held_out)) == (50, 20)
    assert len({row["problem"] for row in train + held_out}) == 70
    assert all(eval(row["problem"]) == int(row["answer"]) for row in train + held_out)
    weights = tmp_path / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    capsys.readouterr()
    quickstart.prepare(tmp_path, 3, False, settings)
    assert weights.stat().st_mtime_ns == written
    assert capsys.readouterr().out.count("already there") == 2


def test_quickstart_demonstrates_no_problem_and_answers_only_long_chains_in_one_go(quickstart):
    settings = replace(quickstart.Settings(), num_demonstrations=2000)
    taken = {chain.problem for chain in quickstart.problems(0, settings)}
    shown = quickstart.demonstrations(0, taken, settings)
    assert not taken & {demonstration.prompt.removesuffix("=") for demonstration in shown}
    direct = [len(re.findall(r"\d", d.prompt)) for d in shown if d.response.startswith("####")]
    worked = [len(re.findall(r"\d", d.prompt)) for d in shown if not d.response.startswith("####")]
    assert (min(direct), max(direct), min(worked), max(worked)) == (6, 8, 2, 8)
    num_long = len(direct) + sum(numbers >= 6 for numbers in worked)
    assert len(direct) / num_long == pytest.approx(0.65, abs=0.05)  # three standard deviations of 850 draws


@pytest.mark.parametrize(
    ("annotation", "outcome"),
    [
        ("48/2=24", ("48/2", "24")),
        ("0.2*50=10", ("0.2*50", "10")),
        (".5*3=1.50", (".5*3", "1.5")),
        ("$1,200 + 300=$1,500", ("1200+300", "1500")),
        ("50*10%=5", ("50*10%", "5")),
        ("5/20=25%", ("5/20", "0.25")),
        ("2*(3+4)-1=13", ("2*(3+4)-1", "13")),
        ("3-5=-2", ("3-5", "-2")),
        ("-4+10=6", ("-4+10", "6")),
        ("3/4=3/4", ("3/4", "0.75")),
        ("1/3=1/3", "rounded or wrong"),
        ("10/3=3.33", "rounded or wrong"),
        ("2+2=5", "rounded or wrong"),
        ("7=7", "without an operation"),
        ("-7=-7", "without an operation"),
        ("1/0=0", "malformed"),
        ("2**9999=1", "malformed"),
        ("7//2=3", "malformed"),
        ("x+1=2", "malformed"),
        ("(1+2=3", "malformed"),
        ("1+2", "malformed"),
        ("=3", "malformed"),
        ("True+1=2", "malformed"),
        ("05+1=6", "malformed"),
        ("1+2=3=3", "malformed"),
        ("", "malformed"),
    ],
)
def test_annotations_become_problems_only_where_they_are_right(calc, annotation, outcome):
    counts = Counter()
    found = list(calc.annotated_problems([f"So it is <<{annotation}>>."], counts))
    if isinstance(outcome, tuple):
        assert found == [outcome] and counts == {"kept": 1}
    else:
        assert found == [] and counts == {outcome: 1}


def test_every_printed_step_of_a_worked_expression_is_an_equality(calc):
    expressions = ["48*24", "405*1203", "2.5*12", "7*4+9*5-3", "(12/4)*35", "100-50-30-15", "3*10*12"]
    for expression in expressions:
        lines, answer = calc.worked(calc.parse(expression), 10**7)
        assert Fraction(answer) == calc.evaluate(calc.parse(expression))
        for line in lines:
            assert len({calc.evaluate(calc.parse(side)) for side in line.split("=")}) == 1, line
    assert calc.worked(calc.parse("24*13"), 1000)[0] == ["24*13=24*10+24*3=240+72=312"]


def test_calculator_test_problems_and_demonstrations_share_nothing_with_the_rest(calc, tmp_path, capsys):
    rows = {"train": ["<<2+3=5>> <<4*5=20>> <<24/3=8>>", "<<2+3=5>>"], "test": ["<<4*5=20>> <<6+7=13>>"]}
    for split, answers in rows.items():
        lines = [json.dumps({"question": "How many?", "answer": answer}) for answer in answers]
        (tmp_path / f"{split}_source.jsonl").write_text("\n".join(lines))
    settings = replace(calc.Settings(), num_demonstrations=64, hidden_size=64, num_layers=1)
    calc.prepare(tmp_path, str(tmp_path / "train_source.jsonl"), str(tmp_path / "test_source.jsonl"), 0, False, settings)
    assert problems(tmp_path / "test.jsonl") == [{"problem": "6+7", "answer": "13"}]
    assert len(problems(tmp_path / "train.jsonl")) == 3
    assert "1 removed that occur in training, 1 left" in capsys.readouterr().out
    taken = {"2+3", "4*5", "24/3", "6+7"}
    shown = calc.demonstrations(0, ["2+3", "4*5", "24/3"], taken, settings)
    assert not taken & {demonstration.prompt.removesuffix("=") for demonstration in shown}
    for demonstration in shown:
        answer = demonstration.response.rpartition("#### ")[2]
        assert Fraction(answer) == calc.evaluate(ast.parse(demonstration.prompt.removesuffix("="), mode="eval").body)


def test_gsm8k_teaches_the_prompt_that_the_run_renders(tmp_path):
    module = recipe("gsm8k")
    source = tmp_path / "train.jsonl"
    row = {"question": "A hen lays 2 eggs a day. How many in 3 days?", "answer": "2*3=<<2*3=6>>6 eggs\n#### 6"}
    source.write_text(json.dumps(row) + "\n")
    settings = replace(module.Settings(), num_epochs=1, vocab_size=320, hidden_size=64, num_layers=1)
    module.prepare(tmp_path, str(source), 0, False, settings)

    from transformers import AutoTokenizer

    from qurl.data import build_prompts, load_rows

    config = compose(["recipe=gsm8k", f"data.train.path={source}"]).data
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    prompt = build_prompts(load_rows(config.train, "data.train"), tokenizer, config, "data.train").prompts[0]
    taught = module._render(tokenizer, config.prompt_template.format(**row))
    assert prompt.text == taught
    assert prompt.token_ids == tokenizer.encode(taught)
