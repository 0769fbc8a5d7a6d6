"""Small models that start from nothing: their own tokenizer, random weights and a short supervised warm start."""

from qurl.warmstart.model import make_tiny_model, model_config, new_model, save_model
from qurl.warmstart.sft import Demonstration, warm_start
from qurl.warmstart.stages import run_stage, write_problems
from qurl.warmstart.tokenizer import train_tokenizer

__all__ = [
    "Demonstration", "make_tiny_model", "model_config", "new_model", "run_stage", "save_model", "train_tokenizer", "warm_start",
    "write_problems",
]
