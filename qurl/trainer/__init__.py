"""The driver: loop, buffer, weights, evaluation, checkpoint, resume."""
