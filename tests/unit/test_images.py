"""What the images install fits the locks."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_an_image_has_the_python_that_its_lock_is_resolved_for(device):
    header = (ROOT / "requirements" / f"{device}.lock").read_text().splitlines()[0]
    locked = re.search(r"for Python (3\.\d+);", header)[1]
    image = (ROOT / "docker" / f"{device}.Dockerfile").read_text()
    commands = "\n".join(line for line in image.splitlines() if not line.startswith("#"))
    assert set(re.findall(r"python:?(3\.\d+)", commands)) == {locked}
    assert f"python{locked}" in (ROOT / "scripts" / "lock.sh").read_text()


def test_the_gpu_image_has_what_nccl_needs_for_infiniband():
    image = (ROOT / "docker" / "gpu.Dockerfile").read_text()
    assert {"libibverbs1", "ibverbs-providers", "librdmacm1"} <= set(image.split())
