"""The rules of the layout (docs/modules.md): who may import whom, and what none may do."""

import ast
import graphlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import ares
from ares_dev import module_tables

ROOT = Path(ares.__file__).parent
TESTS = Path(__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# What each package may import of ours besides itself; `protocol` and `policy` import nothing.
MAY_IMPORT: dict[str, set[str]] = {
    "protocol": set(),
    "policy": set(),
    "plugins": {"policy"},
    "several_models": set(),
    "instance_sources": set(),
    "predicted_load": {"policy", "protocol"},
    "traces": set(),
    "predictor": {"models"},
    "engine": {"protocol", "predicted_load", "predictor", "models"},
    "learner": {"protocol", "predictor", "gateway", "variables"},
    "mock_engine": {"protocol", "simulator", "engine"},
    "gateway": {"protocol", "policy", "plugins", "predicted_load", "config", "instance_sources", "models"},
    "parsers": {"gateway", "config"},
    "simulator": {"policy", "plugins", "terminal", "traces"},
    "config": {"policy", "plugins", "protocol", "instance_sources", "several_models", "variables"},
    "variables": {"protocol"},
    "models": {"terminal"},
    "terminal": set(),
    "local_cluster": {"protocol", "engine", "terminal"},
    "ray": {"protocol", "engine", "gateway", "parsers", "config", "instance_sources", "models"},
    "check": {"protocol", "policy", "engine", "gateway", "bench"},
    "bench": {
        "protocol",
        "policy",
        "predictor",
        "engine",
        "mock_engine",
        "simulator",
        "traces",
        "config",
        "models",
        "local_cluster",
        "terminal",
    },
}
# Small helpers that import none of ours: everybody may use them.
SHARED = {
    "addresses",
    "extras",
    "free_ports",
    "logs",
    "names",
    "objectives",
    "otlp",
    "published_address",
    "resolved_settings",
    "text_files",
    "yaml_text",
}
HEAVY = {
    "vllm": {"engine", "parsers"},
    "nixl": {"engine"},
    "ray": {"ray", "gateway"},
    "torch": {"engine", "predictor", "models", "bench", "learner"},
}
UNSAFE = {"pickle", "_pickle", "marshal", "shelve", "cloudpickle", "dill", "joblib", "jsonpickle"}
RUNS = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
# Arguments that let a reader run what it reads: numpy's, and those of transformers.
TRUSTING = {"allow_pickle", "trust_remote_code"}


def package(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions and for type checkers."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports of ours are written in full"
            yield node.module or ""
            yield from (f"{node.module}.{name.name}" for name in node.names)


def ours(file: Path) -> set[str]:
    """The packages and modules of ours that a file imports."""
    names = {parts[1] for parts in (name.split(".") for name in imports(file)) if parts[0] == "ares" and len(parts) > 1}
    return {name for name in names if (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()}


def test_packages_know_only_whom_they_may() -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {other}"
        for file in FILES
        if package(file) in MAY_IMPORT
        for other in ours(file) - MAY_IMPORT[package(file)] - SHARED - {package(file)}
    ]
    assert wrong == []


def test_who_never_imports_whom() -> None:
    imported: dict[str, set[str]] = {}
    for file in FILES:
        imported.setdefault(package(file), set()).update(ours(file) - {package(file)})
    assert imported["policy"] == set()
    assert "engine" not in imported["gateway"]
    assert "gateway" not in imported["engine"] | imported["mock_engine"]
    assert not {"gateway", "engine"} & imported.get("simulator", set())


def test_heavy_packages_stay_in_their_packages() -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file, (heavy, homes) in itertools.product(FILES, HEAVY.items())
        for name in imports(file)
        if name.split(".")[0] == heavy and package(file) not in homes
    ]
    assert wrong == []


def test_policy_is_pure() -> None:
    allowed = {"ares", "numpy", "collections", "dataclasses", "typing"}
    policy = [file for file in FILES if package(file) == "policy"]
    packages = {(file.stem, name.split(".")[0]) for file in policy for name in imports(file)}
    # A compiler, where there is one, and where it keeps what it has compiled; without it the same decisions.
    packages -= {("compiling", name) for name in ("numba", "hashlib", "importlib", "os", "pathlib")}
    assert {name for _, name in packages} <= allowed | {"math", "enum", "itertools", "functools", "bisect", "zlib"}


def test_private_vllm_names_stand_in_one_file() -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in FILES
        if package(file) in {"engine", "parsers"} and file.name != "vllm_api.py"
        for name in imports(file)
        if name.startswith("vllm.")
    ]
    assert wrong == []


def private_names(file: Path) -> Iterator[str]:
    """The private names of other modules and objects that a file uses, imports or replaces."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                continue
            case ast.Attribute(attr=name):
                names = [name]
            case ast.ImportFrom():
                names = [part for alias in node.names for part in alias.name.split(".")]
            case ast.Call(func=ast.Attribute(attr="setattr" | "delattr")) | ast.Call(func=ast.Name(id="getattr")):
                texts = [argument.value for argument in node.args[:2] if isinstance(argument, ast.Constant)]
                names = [part for text in texts for part in str(text).split(".")]
        for name in names:
            if name.startswith("_") and not name.startswith("__"):
                yield f"{file.relative_to(TESTS)}:{node.lineno} {name}"


def test_tests_use_public_names_only() -> None:
    """Also of other packages: a test of behaviour does not break when the inside of a module changes."""
    files = sorted(TESTS.rglob("*.py"))
    assert len(files) > 100
    public = {"_replace", "_asdict", "_fields", "_make"}  # of named tuples
    found = [use for file in files for use in private_names(file) if use.split()[-1] not in public]
    assert found == []


def test_nothing_that_is_read_becomes_code() -> None:
    """What pickle and its like read, they run; docs/security.md says that no wire or file of ours carries code."""
    wrong = []
    for file in FILES:
        wrong += [f"{file.relative_to(ROOT)} imports {name}" for name in imports(file) if name.split(".")[0] in UNSAFE]
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            trusting = any(keyword.arg in TRUSTING and not _says(keyword.value, False) for keyword in node.keywords)
            # A torch file is a pickle, and `weights_only` what makes it data.
            torch = called == "torch.load" and not any(
                keyword.arg == "weights_only" and _says(keyword.value, True) for keyword in node.keywords
            )
            if called.removeprefix("builtins.") in RUNS or trusting or torch:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} calls {called}")
    assert wrong == []


def _says(node: ast.expr, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _module(file: Path, root: Path) -> str:
    parts = (root.name, *file.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions count too: a cycle hidden there is a cycle."""
    modules = {_module(file, ROOT): file for file in FILES}
    graph = {name: {other for other in imports(file) if other in modules} - {name} for name, file in modules.items()}
    for name in graph:  # a package's own file makes its modules known; it depends on them, they not on it
        graph[name] -= {name.rpartition(".")[0], *(parent for parent in _parents(name))}
    assert _cycles(graph) == []


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    sorter = graphlib.TopologicalSorter(graph)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        return [error.args[1]]
    return []


def test_the_page_of_modules_is_up_to_date() -> None:
    page = (ROOT.parents[1] / "docs" / "modules.md").read_text()
    assert module_tables.filled(page) == page, "run python -m ares_dev modules"


def test_the_ways_through_the_code_name_modules_that_exist() -> None:
    page = (ROOT.parents[1] / "docs" / "modules.md").read_text()
    ways = page.partition("## Three ways")[2].partition("## Every module")[0]
    named = re.findall(r"`([a-z_]+(?:/[a-z_]+)+\.py)`", ways)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_folder_of_modules_says_what_it_is() -> None:
    folders = {file.parent for file in FILES}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
