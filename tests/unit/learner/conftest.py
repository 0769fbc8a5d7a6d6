"""Fixtures: tiny models on disk."""

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401
import pytest
from learner_cases import build_model


@pytest.fixture(scope="session", autouse=True)
def cheap_garbage_collection():
    """DeepSpeed collects garbage several times per engine, which takes long over all that the imports brought."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A saved qwen2 with tied embeddings."""
    folder = tmp_path_factory.mktemp("qwen2")
    build_model(tie_word_embeddings=True).save_pretrained(folder)
    return folder
