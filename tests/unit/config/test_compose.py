"""Composition: presets, overrides, and errors in one line."""

import json
from pathlib import Path

import pytest
import yaml

from qurl.config import TrainConfig
from qurl.config.compose import assets_dir, compose, group_options, load_config
from qurl.config.validate import validate
from qurl.errors import ConfigError
from qurl.quantization import FORMATS

NEEDED = ["model.path=some/model", "data.train.path=some/data"]
GROUP_FILES = sorted(assets_dir("configs").glob("*/*.yaml"))
RECIPE_FILES = [p for p in sorted(assets_dir("recipes").rglob("*.yaml")) if isinstance(yaml.safe_load(p.read_text()), dict)]
COMPANIONS = {  # what an option needs beside it to be a run
    "rollout/long": ["learner.max_tokens_per_micro_batch=16384"],
    "data/dapo_math": ["model.path=m"],
}


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_option_of_every_group_composes_and_validates(path: Path) -> None:
    group, option = path.parent.name, path.stem
    needed = [] if group == "recipe" else [o for o in NEEDED if not o.startswith(group)]
    config = compose([f"{group}={option}", *needed, *COMPANIONS.get(f"{group}/{option}", [])])
    assert validate(config) is None  # raises ConfigError for what cannot run


@pytest.mark.parametrize("path", RECIPE_FILES, ids=str)
def test_every_yaml_of_a_recipe_composes_and_validates(path: Path) -> None:
    assert validate(compose([f"recipe={path}"])) is None  # raises ConfigError for what cannot run


def test_options_of_quantization_are_the_formats() -> None:
    assert set(group_options("quantization")) == FORMATS.keys()
    for name in FORMATS:
        assert compose([*NEEDED, f"quantization={name}"]).quantization.format == name


def test_keys_below_dictionaries_need_no_plus_and_merge() -> None:
    config = compose(
        [*NEEDED, "data.eval.a.path=x.jsonl", "data.eval.a.split=test", "data.eval.b.path=y", "rollout.engine_args.max_num_seqs=64"]
    )
    assert config.data.eval["a"].path == "x.jsonl"
    assert config.data.eval["a"].split == "test"
    assert sorted(config.data.eval) == ["a", "b"]
    assert config.rollout.engine_args == {"max_num_seqs": 64}


def test_a_precision_is_a_word_or_a_mapping_of_patterns(tmp_path: Path) -> None:
    by_layer = {"layers.1.down_proj": "k4-w1-a2", "re:model.layers.0.*": "k2-w4-a4"}
    recipe = tmp_path / "by_layer.yaml"
    recipe.write_text(f"defaults: [override /quantization: axbxp]\nquantization: {{precision: {json.dumps(by_layer)}}}\n")
    assert compose([*NEEDED, "quantization=axbxp", "quantization.precision=k4-w1-a2"]).quantization.precision == "k4-w1-a2"
    assert compose([*NEEDED, f"recipe={recipe}"]).quantization.precision == by_layer
    short = compose([*NEEDED, "quantization=axbxp", "quantization.precision={down_proj:k4-w1-a2}"])
    assert short.quantization.precision == {"down_proj": "k4-w1-a2"}


def test_composition_does_not_depend_on_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose([*NEEDED, "algorithm=dapo"]).algorithm.policy_loss.clip_high == 0.28


def test_a_recipe_may_be_a_file_that_chooses_options(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults: [override /quantization: fp8_block]\nmodel: {path: m}\nrollout: {temperature: 0.5}\n")
    config = compose([f"recipe={recipe}", "seed=3"])
    assert config.quantization.format == "fp8_block"
    assert (config.model.path, config.rollout.temperature, config.seed) == ("m", 0.5, 3)


def test_the_saved_configuration_of_a_run_composes_to_itself(tmp_path: Path) -> None:
    from qurl.config.plain import resolved

    stages = "stages=[{from_step:3,max_response_tokens:9},{from_step:4,num_samples_per_prompt:2}]"
    config = compose(
        [*NEEDED, stages, "data=gsm8k", "algorithm=dapo", "quantization=none", "learner.dtype=bfloat16", "data.eval.b.path=y"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(resolved(config)))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rollout.temprature=1", "did you mean rollout.temperature?"),
        ("+typo=1", "unknown key 'typo'"),
        ("++rollout.xyz=1", "rollout has rollout.dtype, rollout.engine_args"),
        ("temperature=1", "evaluation.temperature or rollout.temperature"),
        ("quantization=int9", "use one of axbxp, axbxp_k1l3, axbxp_k2l2, fp8, fp8_block, int4, int8, lobcq, "
         "lobcq_int8, lobcq_w4a16, mxfp4, nf4, none, nvfp4"),
        ("quantization=null", "use one of axbxp"),
        ("quantisation=int8", "did you mean quantization"),
        ("+model=gpt", "is not an option"),
        ("learner.dtype=bf16", "expected one of [float32, bfloat16]"),
        ("rollout.temperature=warm", "could not be converted to Float"),
        ("seed=null", "field 'seed' is not Optional"),
        ("seed=1,2", "Ambiguous value"),
        ("rollout", "write key=value"),
        ("rollout=3", "is not an option"),
        ("model.path=a=b", "needs quotes"),
        ("rollout.stop_token_ids=[1", "write key=value"),
        ("~seed", "cannot be deleted"),
        ("=x", "unknown key ''"),
        ("data.eval.a.pth=x", "unknown key 'data.eval.a.pth'"),
        ("rollout.temperature=${nothing}", "Interpolation key 'nothing' not found"),
        ("recipe=absent", "the path of a YAML"),
        ("recipe=absent.yaml", "No such file"),
        ("hydra.run.dir=x", "unknown key"),
        ("stages=[{from_step:1,max_tokens:2}]", "of an entry of stages, which may have from_step, num_prompts_per_step"),
        ("stages=[{from_step:x}]", "could not be converted to Integer"),
    ],
)
def test_a_bad_override_is_refused_in_one_line_that_names_it(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([*NEEDED, override])
    message = str(caught.value)
    assert told in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rollout: {temprature: 3}", "unknown key 'rollout.temprature'; did you mean rollout.temperature?"),
        ("nonsense: 1", "unknown key 'nonsense'"),
        ("rollout: {temperature: warm}", "could not be converted to Float"),
        ("defaults: [override /quantization: int9]", "quantization=int9 is not an option"),
        ("a: [1", "cannot be read"),
        ("- 1\n- 2", "not a mapping"),
    ],
)
def test_a_bad_recipe_file_is_refused_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        compose([*NEEDED, f"recipe={recipe}"])
    assert told in str(caught.value)


def test_an_override_wins_over_the_format_of_a_saved_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {path: m}\nquantization: {format: int8, ignore: [down_proj]}\n")
    chosen = compose([f"recipe={path}", "quantization=fp8_block"]).quantization
    assert (chosen.format, chosen.ignore) == ("fp8_block", ["down_proj"])


def test_a_format_that_contradicts_its_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="use quantization=fp8$"):
        compose([*NEEDED, "quantization.format=fp8"])


def test_a_missing_model_is_told_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^model.path is not set"):
        compose([])


def test_composition_returns_plain_dataclasses() -> None:
    config = compose(NEEDED)
    assert type(config) is TrainConfig
    assert type(config.rollout.engine_args) is dict
    assert type(config.learner.adam_betas) is list


def test_a_leading_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    model = compose(["model.path='~/model'", "model.tokenizer='~/tokenizer'"]).model
    assert (model.path, model.tokenizer) == ("/home/someone/model", "/home/someone/tokenizer")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.eval={}"], []),
        (["~data.eval"], []),
        (["data.eval=null"], []),
        (["~data.eval.held_out"], []),
        (["data.eval.held_out=null"], []),
        (["data.eval={}", "data.eval.mine.path=mine.jsonl"], ["mine"]),
        (["data.eval.mine.path=mine.jsonl", "~data.eval.held_out"], ["mine"]),
        (["data.eval.mine={path:mine.jsonl}", "data.eval.mine=null"], ["held_out"]),
        (["data.eval={mine:{path:mine.jsonl}}"], ["held_out", "mine"]),
    ],
)
def test_an_evaluation_set_of_a_recipe_can_be_taken_away(overrides, expected):
    config = compose(["recipe=quickstart", *overrides])
    assert sorted(config.data.eval) == expected
    validate(config)


def test_an_argument_of_vllm_can_be_taken_away_or_be_null():
    lines = ["recipe=quickstart", "rollout.engine_args.max_num_seqs=3", "rollout.engine_args.block_size=null"]
    assert {"max_num_seqs", "block_size"} <= compose(lines).rollout.engine_args.keys()
    assert "max_num_seqs" not in compose([*lines, "~rollout.engine_args.max_num_seqs"]).rollout.engine_args
    assert compose([*lines, "rollout.engine_args={}"]).rollout.engine_args == {}


def test_what_is_not_there_cannot_be_taken_away():
    with pytest.raises(ConfigError, match=r"~data\.eval\.heldout: data\.eval has held_out"):
        compose(["recipe=quickstart", "~data.eval.heldout"])
    with pytest.raises(ConfigError, match="~seed: keys cannot be deleted"):
        compose(["recipe=quickstart", "~seed"])
