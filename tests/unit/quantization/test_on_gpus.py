"""What can be seen of a GPU without one: the operators on tensors of another device (meta), and rules by compute capability."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from qurl.quantization import FORMATS
from qurl.quantization.devices import lacks
from qurl.quantization.grouped import GroupedFormat
from qurl.quantization.lobcq import LoBcq

DECODED = [name for name, format in FORMATS.items() if isinstance(format, GroupedFormat) and not isinstance(format, LoBcq)]


COPIES = {"new_tensor", "tensor", "as_tensor", "item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"}
"""Calls that carry numbers between host and device and wait for it, which a captured CUDA graph must not."""


class TouchesOfTheHost(TorchFunctionMode):
    """Calls of COPIES, and any with a tensor that lies on the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [value for value in (*args, out) if isinstance(value, torch.Tensor)]
        if func.__name__ in COPIES or any(tensor.device.type == "cpu" for tensor in tensors):
            self.found.append(func.__name__)
        return out


@pytest.mark.parametrize("name", DECODED)
def test_a_decoded_product_on_a_gpu_never_touches_the_host(name):
    x = torch.empty(4, 128, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(64, 128, device="meta")
    with TouchesOfTheHost() as touches:
        assert FORMATS[name].linear_decoded(x, weight).device.type == "meta"
    assert touches.found == []


@pytest.mark.parametrize("touch", [
    lambda x: x.new_tensor(2.0), lambda x: x * torch.tensor(2.0), lambda x: torch.ones(3).to(x.device),
])  # fmt: skip
def test_the_probe_of_host_touches_finds_them(touch):
    with TouchesOfTheHost() as touches:
        touch(torch.empty(3, device="meta"))
    assert touches.found


@pytest.mark.parametrize(("capability", "refused"), [
    ((8, 0), {"fp8", "fp8_block"}),
    ((8, 9), set()),
    ((9, 0), set()),
    ((10, 0), {"int8", "axbxp", "axbxp_k2l2", "axbxp_k1l3"}),
    ((12, 0), {"int8", "axbxp", "axbxp_k2l2", "axbxp_k1l3"}),
])  # fmt: skip
def test_formats_without_arithmetic_on_a_gpu_are_known(capability, refused):
    found = {name: lacks(format, capability) for name, format in FORMATS.items()}
    assert {name for name, why in found.items() if why} == refused
    assert all("; use quantization=" in found[name] for name in refused)
