"""Optional packages: an error with the command that installs what is missing, instead of a traceback."""

import importlib.util

# The extra of pyproject.toml that installs a package, unless a command names another one.
EXTRAS = {
    "dns": "discovery",
    "gguf": "cpu",
    "kubernetes": "discovery",
    "matplotlib": "simulate",
    "nixl": "cpu",
    "numba": "simulate",
    "opentelemetry": "otel",
    "psutil": "bench",
    "ray": "ray",
    "safetensors": "predictor",
    "scipy": "simulate",
    "torch": "predictor",
    "transformers": "predictor",
    "vllm": "cpu",
}


class MissingPackageError(RuntimeError):
    """An optional package is not installed; the message says how to install it."""


def require(*packages: str, install: str | None = None) -> None:
    """Check that optional packages are installed, without importing them.

    Parameters
    ----------
    packages
        Names to import, from `EXTRAS`.
    install
        The command that installs them all; by default that of the extra of the first one that is missing.

    Raises
    ------
    MissingPackageError
        One is missing.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingPackageError(_sentence(missing, install))


def explain(error: ModuleNotFoundError) -> MissingPackageError:
    """Turn a failed import of an optional package into an error that names its extra; raise any other again."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        raise error
    return MissingPackageError(_sentence([package], None))


def command(extra: str) -> str:
    """Return the command that installs an extra."""
    gpus = " (on GPUs: pip install '.[vllm]')" if extra == "cpu" else ""
    return f"in a checkout of ARES, pip install '.[{extra}]'{gpus}"


def _sentence(missing: list[str], install: str | None) -> str:
    names, be = " and ".join(missing), "are" if len(missing) > 1 else "is"
    return f"{names} {be} missing: {install or command(EXTRAS[missing[0]])}"
