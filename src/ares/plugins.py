"""Plug-ins of users: files and installed packages that register policies, and files of presets.

A policy is code, and loading its file runs it: it is loaded only if it is named when the process is started, or if a
package is installed that has entry points in the group `ares.policies`. A preset is data.
"""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from ares.policy import PRESETS, REGISTRIES, Preset
from ares.policy import preset as shipped_preset
from ares.policy.preset_files import make_preset, with_defaults, with_settings
from ares.policy.presets import policies
from ares.text_files import TextFileError, read_text
from ares.yaml_text import MALFORMED, parse

GROUP = "ares.policies"
_SUFFIXES = (".yaml", ".yml")
_MODULES = "ares_policy_"
_loaded: set[Path] = set()


def load(files: Iterable[Path | str]) -> None:
    """Load policies: those of installed packages, and those of files; ValueError says what is wrong with which."""
    _load_installed()
    for file in files:
        path = Path(file).resolve()
        if path not in _loaded:
            if not path.is_file():
                raise ValueError(f"--policy {file}: no such file")
            _load(f"--policy {file}", lambda path=path: _run(path))  # type: ignore[misc]
            _loaded.add(path)


def from_file(presets: Iterable[Preset]) -> bool:
    """Return whether any of these presets uses a policy that a file has registered."""
    return any(policy.__module__.startswith(_MODULES) for policy in policies(presets))


@lru_cache(maxsize=1)
def _load_installed() -> None:
    for entry in importlib.metadata.entry_points(group=GROUP):
        _load(f"policy {entry.name} ({entry.value}) of an installed package", entry.load)


def _load(name: str, run: Callable[[], object]) -> None:
    """Run code that registers policies; where it fails, remove what it has registered."""
    before = {part: set(registry) for part, registry in REGISTRIES.items()}
    try:
        run()
    except (Exception, SystemExit) as error:
        for part, registry in REGISTRIES.items():
            registry.forget(set(registry) - before[part])
        text = " ".join(str(error).split())
        raise ValueError(f"{name}: cannot be loaded: {type(error).__name__}: {text}") from error
    if all(set(registry) == before[part] for part, registry in REGISTRIES.items()):
        raise ValueError(f'{name}: registers no policy: decorate a class with @register("name")')


def _run(path: Path) -> None:
    """Import a file as a module under a unique name."""
    name = f"{_MODULES}{path.stem}_{len(_loaded)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def preset(name: str, given: Iterable[str] = (), defaults: Mapping[str, object] | None = None) -> Preset:
    """Return a preset.

    Parameters
    ----------
    name
        Its name, or its YAML file (policy/preset_files.py).
    given
        Settings that replace its own, such as `rebalance.theta=0.2`.
    defaults
        Settings of a policy that neither the file nor `given` sets.

    Raises
    ------
    ValueError
        It is not known, or wrong; the message names the file or the setting.
    """
    if name in PRESETS or not name.endswith(_SUFFIXES):
        return with_settings(with_defaults(shipped_preset(name), defaults or {}), given)
    try:
        data = parse(read_text(Path(name)))
        made = make_preset(data, defaults or {})
    except TextFileError as error:
        raise ValueError(str(error)) from None
    except MALFORMED as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from None
    return with_settings(made, given)
