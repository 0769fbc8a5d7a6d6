"""The tensor math imports where only torch is installed."""

import subprocess
import sys

SCRIPT = """
import importlib.abc, sys
import torch  # brings its own requirements; everything imported from here on is ours
present = {name.partition(".")[0] for name in sys.modules}

class OnlyTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        top = name.partition(".")[0]
        if top != "qurl" and top not in present and top not in sys.stdlib_module_names:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, OnlyTorch())
import qurl.algorithms, qurl.quantization
qurl.quantization.FORMATS["fp8_block"].encode(torch.ones(3, 4))
qurl.quantization.FORMATS["lobcq"].encode(torch.ones(3, 64))
"""


def test_algorithms_and_quantization_need_only_torch():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
