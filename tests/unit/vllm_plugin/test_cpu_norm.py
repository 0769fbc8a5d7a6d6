"""The fused norm against its formula in float64."""

import pytest
import torch

pytest.importorskip("vllm")

from qurl.vllm_plugin import compat


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 16), (5, 96), (3, 4, 224)])
def test_the_fused_norm_is_rms_norm(shape, dtype):
    x, residual = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.linspace(0.5, 1.5, shape[-1]).to(dtype)
    if not compat.fused_norm_usable(x, weight):
        pytest.skip("on this CPU vLLM's norm cuts bfloat16 off, and is not used")

    def exact(values):
        return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()

    tolerance = 2.5 * torch.finfo(dtype).eps  # roundings of the sum, of the factors and of the result
    torch.testing.assert_close(compat.rms_norm(x, weight, 1e-6).double(), exact(x.double()), rtol=tolerance, atol=1e-6)
    expected = exact(x.double() + residual.double())
    total = x + residual
    out, new_residual = compat.fused_add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=1e-3 * tolerance)
    assert torch.equal(new_residual, total)


def test_what_the_fused_norm_cannot_take_is_left_to_torch():
    weight = torch.ones(32)
    assert compat.fused_norm_usable(torch.zeros(2, 32), weight)
    assert not compat.fused_norm_usable(torch.zeros(2, 64)[:, ::2], weight)
    assert not compat.fused_norm_usable(torch.zeros(2, 32, dtype=torch.bfloat16), weight)
    assert not compat.fused_norm_usable(torch.zeros(2, 24), torch.ones(24))
