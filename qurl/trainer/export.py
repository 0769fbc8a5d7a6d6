"""A run's weights as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from qurl.errors import ConfigError
from qurl.trainer.checkpoint import Checkpoints


def latest_checkpoint(run_dir: Path) -> Path:
    """Folder of the run's newest checkpoint. Raises ConfigError where there is none."""
    checkpoint = Checkpoints(run_dir, keep_last=1).latest()
    if checkpoint is None:
        raise ConfigError(f"{run_dir} has no checkpoint yet; train until checkpoint.every_steps, or stop the run once with Ctrl-C")
    return checkpoint


async def export_run(run_dir: Path, out: Path) -> None:
    """Load the run's latest checkpoint with as many ranks as wrote it, and write its weights. Raises ConfigError without one."""
    from qurl.config.compose import load_config
    from qurl.config.paths import with_absolute_paths
    from qurl.config.placement import place, with_engine_dtype
    from qurl.learner.group import LearnerGroup
    from qurl.trainer.start import naming, ray_session

    config = with_engine_dtype(with_absolute_paths(load_config(run_dir / "config.yaml")))
    run_dir, out = run_dir.resolve(), out.resolve()
    checkpoint = latest_checkpoint(run_dir)
    placement = place(config)
    with ray_session(config) as ray_logs:
        learner = LearnerGroup(
            config.model, config.learner, config.critic, config.algorithm, config.quantization, config.sync,
            device=placement.device, threads=placement.learner_threads, seed=config.seed,
            temperature=config.rollout.temperature, engine_dtype=config.rollout.dtype,
        )  # fmt: skip
        try:
            with naming("the learner did not start", ray_logs):
                await learner.start()
            with naming(f"checkpoint {checkpoint} was not loaded", ray_logs):
                await learner.load_checkpoint(checkpoint)
            await learner.export_hf(out)
        finally:
            learner.close()
    if not (out / "config.json").is_file():
        raise ConfigError(f"{out} is not seen by the node that wrote it; export to a folder that all nodes share")
