"""`qurl export`: a Hugging Face folder from a run or a model, in full or low precision."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from qurl.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, target, format."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a run folder (its latest checkpoint) or a Hugging Face folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    parser.add_argument("--format", default="none", help="none, int8, fp8 or fp8_block; vLLM serves the result as it is")
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="modules to keep as they are; repeatable")
    parser.epilog = "Examples:\n  qurl export runs/quickstart out --format int8\n  qurl export models/qwen out --format fp8"


def main(args: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError for a source that cannot be exported or an output that exists."""
    from qurl.quantization import FORMATS, export_checkpoint

    if args.format not in FORMATS:
        raise ConfigError(f"--format {args.format} is unknown; use one of {', '.join(FORMATS)}")
    if args.out.exists():
        raise ConfigError(f"{args.out} exists; export to a new folder")
    if not (args.source / "config.yaml").is_file():
        export_checkpoint(args.source, args.out, FORMATS[args.format], args.ignore)
    elif args.format == "none":
        asyncio.run(_export_run(args.source, args.out))
    else:
        with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
            asyncio.run(_export_run(args.source, Path(folder) / "model"))
            export_checkpoint(Path(folder) / "model", args.out, FORMATS[args.format], args.ignore)
    print(args.out)
    return 0


async def _export_run(run_dir: Path, out: Path) -> None:
    """Load the run's latest checkpoint with as many ranks as wrote it, and write its weights."""
    from qurl.config.compose import load_config
    from qurl.config.placement import place
    from qurl.learner.group import LearnerGroup
    from qurl.trainer.checkpoint import Checkpoints
    from qurl.trainer.start import naming, ray_session

    config = load_config(run_dir / "config.yaml")
    checkpoint = Checkpoints(run_dir, config.checkpoint.keep_last).latest()
    if checkpoint is None:
        raise ConfigError(f"{run_dir} has no checkpoint yet; train until checkpoint.every_steps, or stop the run once with Ctrl-C")
    placement = place(config)
    with ray_session(config) as ray_logs:
        learner = LearnerGroup(
            config.model, config.learner, config.algorithm, config.quantization, config.sync,
            device=placement.device, threads=placement.learner_threads, seed=config.seed,
            temperature=config.rollout.temperature, engine_dtype=config.rollout.dtype,
            ray_options={"num_gpus": placement.gpus_per_rank},
        )  # fmt: skip
        try:
            with naming("the learner did not start", ray_logs):
                await learner.start()
            with naming(f"checkpoint {checkpoint} was not loaded", ray_logs):
                await learner.load_checkpoint(checkpoint.resolve())
            await learner.export_hf(out.resolve())
        finally:
            learner.close()
