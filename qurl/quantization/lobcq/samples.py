"""What codebooks are calibrated on: weights and activations as transformers have them, made on the spot.

Weights are Gaussian with a spread over rows and over columns; activations have Student's t with six degrees of freedom, a spread
over channels and a few channels that are far larger than the rest. The paper calibrates on text through a small GPT instead.
Random bits go through the inverse of the normal distribution in float64, so the samples are the same on every processor."""

from __future__ import annotations

import torch
from torch import Tensor

from qurl.quantization.lobcq.layout import Layout
from qurl.quantization.two_level import e4m3_scales, global_scale_of

WIDTH = 2048
ROW_SPREAD = 0.3  # standard deviation of the logarithm
COLUMN_SPREAD = 0.3
CHANNEL_SPREAD = 0.5
NUM_OUTLIERS = 8  # channels
OUTLIER_FACTOR = 12.0
DEGREES_OF_FREEDOM = 6
_RESOLUTION = 1 << 24


def sample_weights(num_rows: int, generator: torch.Generator) -> Tensor:
    """float32 [num_rows, WIDTH]."""
    rows = (ROW_SPREAD * _normal((num_rows, 1), generator)).exp()
    columns = (COLUMN_SPREAD * _normal((1, WIDTH), generator)).exp()
    return (0.02 * rows * columns * _normal((num_rows, WIDTH), generator)).float()


def sample_activations(num_tokens: int, generator: torch.Generator) -> Tensor:
    """float32 [num_tokens, WIDTH]."""
    channels = (CHANNEL_SPREAD * _normal((1, WIDTH), generator)).exp()
    channels[:, torch.randperm(WIDTH, generator=generator)[:NUM_OUTLIERS]] *= OUTLIER_FACTOR
    chi_square = torch.zeros((num_tokens, WIDTH), dtype=torch.float64)
    for _ in range(DEGREES_OF_FREEDOM):
        chi_square += _normal((num_tokens, WIDTH), generator).square()
    return (channels * _normal((num_tokens, WIDTH), generator) / (chi_square / DEGREES_OF_FREEDOM).sqrt()).float()


def calibration_blocks(layout: Layout, num_rows: int, seed: int) -> Tensor:
    """As many rows of weights as of activations, in blocks [n, L_b] divided by their array's scale, as the format does."""
    generator = torch.Generator().manual_seed(seed)
    weights, activations = sample_weights(num_rows, generator), sample_activations(num_rows, generator)
    blocks = []
    for rows, amax in ((weights, weights.abs().amax().view(1)), (activations, activations.abs().amax(dim=1, keepdim=True))):
        blocks.append(blocks_of(rows, amax, layout))
    return torch.cat(blocks)


def blocks_of(rows: Tensor, amax: Tensor, layout: Layout) -> Tensor:
    """float32 [n, L_b]: rows [R, I] in codewords, as the format scales them; without arrays whose scale is 0.

    amax: of what shares the float32 scale, [1] for a weight and [R, 1] for tokens."""
    groups = rows.unflatten(-1, (-1, layout.array))
    global_scale = global_scale_of(amax, layout.largest)
    scale = e4m3_scales(groups.abs().amax(dim=-1), global_scale, layout.largest, 0.0).float()
    return (groups * (global_scale / scale)[..., None])[scale > 0].reshape(-1, layout.block)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """float64."""
    uniform = torch.randint(_RESOLUTION, shape, generator=generator).double()
    return torch.special.ndtri((uniform + 0.5) / _RESOLUTION)
