"""Small models that start from nothing: their own tokenizer, random weights and a short supervised warm start."""

from qurl.warmstart.model import make_tiny_model, model_config, new_model, save_model
from qurl.warmstart.tokenizer import train_tokenizer

__all__ = ["make_tiny_model", "model_config", "new_model", "save_model", "train_tokenizer"]
