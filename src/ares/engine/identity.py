"""The identity and settings of an instance, which the launcher hands to vLLM's processes in the environment."""

import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from ares import addresses, published_address
from ares.models.resolve import shape
from ares.protocol import messages
from ares.protocol.fields import CONTROL_KEY_VARIABLE, INSTANCE_VARIABLE
from ares.protocol.keys import ControlKey
from ares.protocol.messages import Role


class InstanceSettings(msgspec.Struct, frozen=True):
    """What the launcher decided for one instance.

    Attributes
    ----------
    boot
        Differs after every restart.
    control_address
        Of the control channel, as it is published.
    listen_host
        What the control channel and NIXL's side channel listen on; empty: the host of `control_address`.
    cores
        On a CPU build with one process: the cores that the model runs on; empty where vLLM binds its threads itself.
    model
        Its name, as in recorded data and checkpoints.
    predictor
        File of the predictor's checkpoint; empty: none.
    predictor_version
        The SHA-256 of that file.
    predict_every
        Steps between two predictions of a request, and tokens between two recorded states.
    resumes_output
        Whether its workers resume the output of migrated requests (engine/connector/resume_output.py).
    record_folder, record_fraction
        Where to record hidden states (empty: nowhere), and for which share of the requests.
    learn_folder
        Folder in which it records for a learner and takes checkpoints (engine/learning/folder.py); empty: it does not.
    record_at_once, record_token_ids
        How many requests it then records at the same time, and whether with their token ids.
    drain_deadline_s
        How long an instance drains after a SIGTERM; 0: not at all.
    roles
        The roles that it can have while it runs.
    """

    name: str
    role: Role
    boot: str
    control_address: str
    listen_host: str = ""
    cores: tuple[int, ...] = ()
    model: str = ""
    predictor: str = ""
    predictor_version: str = ""
    predict_every: int = 20
    resumes_output: bool = False
    record_folder: str = ""
    record_fraction: float = 0.0
    learn_folder: str = ""
    record_at_once: int = 16
    record_token_ids: bool = False
    drain_deadline_s: float = 0.0
    roles: tuple[Role, ...] = ()

    @property
    def on_loopback(self) -> bool:
        """Whether no other host can reach it, so that all its peers are on this one."""
        return addresses.on_loopback(self.published_host)

    @property
    def published_host(self) -> str:
        """Name or address by which other instances and gateways reach it."""
        return urlsplit(self.control_address).hostname or ""

    @property
    def control_endpoint(self) -> str:
        """What the control channel binds."""
        return self._with_control_port(self.listen_host or self.published_host)

    @property
    def own_control_address(self) -> str:
        """By which a process on its own machine reaches the control channel, also where none outside is routed back."""
        return self._with_control_port(published_address.here(self.listen_host or self.published_host))

    def _with_control_port(self, host: str) -> str:
        return control_address(host, urlsplit(self.control_address).port or 0)


def export(settings: InstanceSettings) -> None:
    """Make the settings known to this process and its children."""
    os.environ[INSTANCE_VARIABLE] = msgspec.json.encode(settings).decode()


def control_key() -> ControlKey | None:
    """Return the key of the control channel; None where it has none."""
    key = os.environ.get(CONTROL_KEY_VARIABLE)
    return ControlKey(key) if key else None


def control_address(host: str, port: int) -> str:
    """Return ZeroMQ's form of an address; that of an IPv6 address has brackets."""
    return f"tcp://{addresses.with_port(host, port)}"


def current() -> InstanceSettings:
    """Return the settings; RuntimeError outside of a process that `ares worker` started."""
    text = os.environ.get(INSTANCE_VARIABLE)
    if text is None:
        raise RuntimeError("the ARES connector runs inside `ares worker`; start the instance with that command")
    return msgspec.json.decode(text, type=InstanceSettings)


def served_names(names: Iterable[str], given: str) -> list[str]:
    """Return the names that a model is served under, for gateways to compare.

    Parameters
    ----------
    names
        As clients spell them.
    given
        What the instance was given as ``--model``. Where it is a folder and also the name, the name becomes the
        folder's absolute path, so that a gateway does not compare it with names on another host.
    """
    folder = Path(given).expanduser()
    return [str(folder.resolve()) if name == given and folder.is_dir() else name for name in names]


def describe(
    settings: InstanceSettings, names: list[str], folder: Path | None, adapters: Iterable[str] = ()
) -> messages.Description:
    """Return an instance's description for its HTTP route.

    Parameters
    ----------
    settings
        What the launcher decided.
    names
        Those of its model (`served_names`).
    folder
        Where the model's configuration is, if it has one.
    adapters
        Names of its LoRA adapters.
    """
    numbers = shape(folder) if folder is not None else {}
    return messages.Description(
        settings.name, settings.role, settings.boot, settings.control_address, names, numbers, list(adapters)
    )
