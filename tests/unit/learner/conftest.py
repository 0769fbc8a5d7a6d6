"""Fixtures: tiny models on disk."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
from learner_cases import build_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A saved qwen2 with tied embeddings."""
    folder = tmp_path_factory.mktemp("qwen2")
    build_model(tie_word_embeddings=True).save_pretrained(folder)
    return folder
