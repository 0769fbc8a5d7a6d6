"""Make a file of codebooks: python -m qurl.quantization.lobcq.calibrate --codeword-bits 6 [--out FOLDER]

The files of this package were made so, with the defaults for all else."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from qurl.quantization.lobcq.calibration import Calibration, calibrate
from qurl.quantization.lobcq.codebooks import FOLDER, save_codebooks
from qurl.quantization.lobcq.layout import Layout
from qurl.quantization.lobcq.samples import calibration_blocks

NUM_ROWS = 64
SEED = 0


def make(layout: Layout, num_rows: int = NUM_ROWS, seed: int = SEED) -> Calibration:
    """Calibrated on num_rows rows of weights and as many of activations, of 2048 numbers each."""
    return calibrate(calibration_blocks(layout, num_rows, seed), layout, seed)


def main(arguments: list[str]) -> Path:
    """Write the file; returns its path."""
    parser = argparse.ArgumentParser(prog="python -m qurl.quantization.lobcq.calibrate", description="Make LO-BCQ codebooks.")
    for name, default in asdict(Layout()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--rows", type=int, default=NUM_ROWS, help=f"of weights and of activations; default {NUM_ROWS}")
    parser.add_argument("--seed", type=int, default=SEED, help=f"default {SEED}")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder; default: that of the package")
    given = parser.parse_args(arguments)
    layout = Layout(**{name: getattr(given, name) for name in asdict(Layout())})
    options = {**asdict(layout), "rows": given.rows, "seed": given.seed}
    command = " ".join([parser.prog, *(f"--{name.replace('_', '-')} {value}" for name, value in options.items())])
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / layout.file_name
    save_codebooks(make(layout, given.rows, given.seed).codebooks, path, command)
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
