"""qurl: reinforcement learning with verifiable rewards on quantized rollouts."""

__version__ = "0.1.0"
