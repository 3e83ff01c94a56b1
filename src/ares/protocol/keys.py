"""Shared keys, from files or variables and never from a command line, and the protection of the control channel."""

import hashlib
import secrets
from collections.abc import Iterable
from pathlib import Path

import zmq
import zmq.asyncio
from zmq.utils import z85

# 32 random bytes in hexadecimal have 64 characters; a key that can be guessed protects nothing.
MINIMUM_CHARACTERS = 32


class KeyFileError(ValueError):
    """A key cannot be used; the message never shows any of it."""


def clean(key: str) -> str:
    """Return a key without the white space around it, and without the byte order mark that Windows editors write.

    Neither can be part of a key in an HTTP header; the newline of a Kubernetes Secret that was made with `echo` is one.
    """
    return key.strip().removeprefix("\ufeff").strip()


def read_keys(file: Path) -> list[str]:
    """Return the keys of a file, one a line; empty lines and those that begin with ``#`` do not count.

    Raises
    ------
    KeyFileError
        There is no such file, or no key in it.
    """
    try:
        lines = [clean(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise KeyFileError(f"{file}: {reason}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise KeyFileError(f"{file}: no key in it; make one: openssl rand -hex 32 > {file}")
    return keys


def read_key(file: Path) -> str:
    """Return the only key of a file; KeyFileError where there is none, or several."""
    keys = read_keys(file)
    if len(keys) > 1:
        raise KeyFileError(f"{file}: {len(keys)} keys where one is wanted")
    return keys[0]


def refuse_key_flag(flags: Iterable[str]) -> None:
    """Refuse flags of vLLM that hold the instances' key: the command line of a process is public.

    Raises
    ------
    KeyFileError
        One of them does.
    """
    # argparse takes abbreviations; no other flag of vLLM begins like this.
    if any(flag.replace("_", "-").startswith("--api-k") for flag in flags):
        raise KeyFileError(
            "--api-key would show the key to every user of this host (ps): set VLLM_API_KEY for the instances, and for "
            "the gateway ARES_WORKER_API_KEY or --worker-api-key-file (docs/security.md)"
        )


class ControlKey:
    """The key that all gateways and instances of a cluster share, as CURVE key pair (RFC 26/CurveZMQ).

    Both ends hold the same pair: each authenticates the other (`zmq.auth` asks `callback` at the instance), and their
    messages are encrypted and cannot be replayed.

    Attributes
    ----------
    public
        The public key of the pair, which a client shows.

    Raises
    ------
    KeyFileError
        The key is too short.
    """

    def __init__(self, key: str) -> None:
        key = clean(key)
        if len(key) < MINIMUM_CHARACTERS:
            raise KeyFileError(
                f"the control key is shorter than {MINIMUM_CHARACTERS} characters; make one: openssl rand -hex 32"
            )
        self._secret = z85.encode(hashlib.blake2b(key.encode(), digest_size=32, person=b"ares-control").digest())
        self.public = zmq.curve_public(self._secret)

    def serve(self, socket: "zmq.Socket[bytes]") -> None:
        """Accept only connections with the key; the socket's context needs an authenticator with our `callback`."""
        socket.curve_secretkey = self._secret
        socket.curve_publickey = self.public
        socket.curve_server = True

    def connect(self, socket: "zmq.Socket[bytes] | zmq.asyncio.Socket") -> None:
        """Authenticate with the key, and accept only an instance that holds it too."""
        socket.curve_secretkey = self._secret
        socket.curve_publickey = socket.curve_serverkey = self.public

    def callback(self, _domain: str, client: bytes) -> bool:
        """Whether a client holds the key (called by `zmq.auth`)."""
        return secrets.compare_digest(client, self.public)
