"""qurl: reinforcement learning with verifiable rewards on quantized rollouts."""

import logging

__version__ = "0.1.0"


def _quiet(record: logging.LogRecord) -> bool:
    """Drop what vLLM says on every import on a CPU, before its own log level counts: nobody can do anything about it."""
    return "doesn't include CPU backend" not in record.getMessage()


logging.getLogger("vllm.triton_utils.importing").addFilter(_quiet)
