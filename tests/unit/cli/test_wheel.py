"""The built wheel is complete: it composes presets and finds recipes from any folder, without the checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qurl.quantization.kernels.cpu.library import SOURCES

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    builder = pytest.importorskip("hatchling.builders.wheel", reason="hatchling builds the wheel; it is in requirements/cpu.lock")
    out = tmp_path_factory.mktemp("dist")
    return Path(next(builder.WheelBuilder(str(ROOT)).build(directory=str(out), versions=["standard"])))


def test_the_wheel_holds_every_preset_recipe_codebook_and_kernel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"qurl/quantization/kernels/cpu/{name}" for name in SOURCES} <= names
    codebooks = {f"qurl/quantization/lobcq/data/{path.name}" for path in (ROOT / "qurl/quantization/lobcq/data").iterdir()}
    assert codebooks and codebooks <= names
    for folder, packed in (("configs", "qurl/_configs"), ("recipes", "qurl/_recipes")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".yaml", ".py", ".md"}:
                assert f"{packed}/{path.relative_to(ROOT / folder).as_posix()}" in names


def test_an_installed_wheel_composes_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import qurl.config.compose as c;"
        "assert c.assets_dir('configs').name == '_configs', c.__file__;"
        "print(c.compose(['model.path=m', 'data=gsm8k', 'quantization=fp8_block']).quantization.format)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout == "fp8_block\n"
