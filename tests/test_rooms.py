"""The rules of the house (docs/modules.md): who may import whom, and what none may do."""

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import ares

ROOT = Path(ares.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# What each room may know of ours; its own modules always, and wire, which knows nobody.
MAY_KNOW = {
    "policy": set(),
    "plugins": {"policy"},
    "predictor": {"model"},
    "traces": set(),
    "wire": set(),
    "engine": {"wire", "predictor", "model", "keys"},
    "engine/simulated": {"wire", "engine", "simulator"},
    "gateway": {"wire", "policy", "plugins", "config", "model", "keys"},
    "simulator": {"policy", "plugins", "traces"},
    "config": {"policy", "plugins", "keys", "variables"},
    "variables": set(),
    "model": {"gguf_model"},
    "gguf_model": set(),
    "keys": set(),
}
# What every room may know: small helpers that know nobody.
SHARED = {
    "addresses",
    "extras",
    "http_client",
    "names",
    "objectives",
    "options",
    "outputs",
    "progress",
    "tables",
    "text_files",
}
# A room within a room, with walls of its own.
INNER = {"engine/simulated"}
HEAVY = {"vllm": {"engine"}, "nixl": {"engine"}, "torch": {"engine", "predictor", "gguf_model", "bench"}}
UNSAFE = {"pickle", "_pickle", "marshal", "shelve", "cloudpickle", "dill", "joblib", "jsonpickle"}
RUNS = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
# Arguments that let a reader run what it reads: numpy's, and those of transformers.
TRUSTING = {"allow_pickle", "trust_remote_code"}


def room(file: Path) -> str:
    parts = file.relative_to(ROOT).parts
    inner = "/".join(parts[:2])
    return inner if inner in INNER else parts[0].removesuffix(".py")


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
    """The rooms that a file knows."""
    names = {parts[1] for parts in (name.split(".") for name in imports(file)) if parts[0] == "ares" and len(parts) > 1}
    return {name for name in names if (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()}


def test_rooms_know_only_whom_they_may() -> None:
    wrong = [
        f"{file.relative_to(ROOT)} knows {other}"
        for file in FILES
        if room(file) in MAY_KNOW
        for other in ours(file) - MAY_KNOW[room(file)] - SHARED - {room(file).partition("/")[0]}
    ]
    assert wrong == []


def test_the_walls_that_design_names() -> None:
    knows: dict[str, set[str]] = {}
    for file in FILES:
        knows.setdefault(room(file), set()).update(ours(file) - {room(file)})
    assert knows["policy"] == set()
    assert "engine" not in knows["gateway"]
    assert "gateway" not in knows["engine"] | knows["engine/simulated"]
    assert not {"gateway", "engine"} & knows.get("simulator", set())


def test_heavy_packages_stay_in_their_rooms() -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file, (package, rooms) in itertools.product(FILES, HEAVY.items())
        for name in imports(file)
        if name.split(".")[0] == package and room(file) not in rooms
    ]
    assert wrong == []


def test_policy_is_pure() -> None:
    allowed = {"ares", "numpy", "collections", "dataclasses", "typing"}
    policy = [file for file in FILES if room(file) == "policy"]
    packages = {(file.stem, name.split(".")[0]) for file in policy for name in imports(file)}
    # A compiler, where there is one, and where it keeps what it has compiled; without it the same decisions.
    packages -= {("compiling", name) for name in ("numba", "hashlib", "importlib", "os", "pathlib")}
    assert {name for _, name in packages} <= allowed | {"math", "enum", "itertools", "functools", "bisect", "zlib"}


def test_private_vllm_names_stand_in_one_file() -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in FILES
        if room(file) == "engine" and file.name != "vllm_names.py"
        for name in imports(file)
        if name.startswith("vllm.")
    ]
    assert wrong == []


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
