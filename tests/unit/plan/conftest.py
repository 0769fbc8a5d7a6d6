"""A model, a data set and the overrides that make a run of them."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json of a small Qwen2; plan needs nothing else."""
    from transformers import Qwen2Config

    folder = tmp_path_factory.mktemp("model")
    Qwen2Config(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def needed(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run that plan accepts."""
    data = tmp_path_factory.mktemp("data") / "problems.jsonl"
    data.write_text(json.dumps({"problem": "1+1", "answer": "2"}) + "\n")
    return [
        f"model.path={model_dir}", f"data.train.path={data}", "data.max_prompt_tokens=64", "rollout.max_response_tokens=64",
        "learner.max_tokens_per_micro_batch=256", "cluster=cpu",
    ]  # fmt: skip
