"""The wheel: the package with its data and nothing else, and small."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ares

ROOT = Path(__file__).parents[1]
# Files that the package reads and that are no modules.
DATA = (
    "gateway/http/static/dashboard.js",
    "gateway/openai/tokenizer_classes.json",
    "simulator/profiles/llama-8b-rtx4090.json",
    "py.typed",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"ares"}
    assert not [name for name in names if "ares_dev" in name or "/tests/" in name]
    packed = {name for name in names if name.endswith(".py")}
    assert packed == {f"ares/{file.relative_to(ROOT / 'src/ares')}" for file in (ROOT / "src/ares").rglob("*.py")}


def test_the_wheel_holds_the_data_that_the_package_reads(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"ares/{name}" for name in DATA} <= names
    checkpoints = {
        f"ares/{file.relative_to(ROOT / 'src/ares')}" for file in ROOT.glob("src/ares/predictor/checkpoints/*")
    }
    assert checkpoints
    assert checkpoints <= names


def test_the_name_is_free_on_pypi(wheel: Path) -> None:
    """`ares` is another project there; a build backend that falls back to the package's name would take it."""
    assert wheel.name == f"ares_serve-{ares.__version__}-py3-none-any.whl"


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 4 << 20
