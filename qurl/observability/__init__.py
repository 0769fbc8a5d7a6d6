"""Metric types and sinks: console, metrics.jsonl, wandb; rollout recorder; timeline; report."""
