"""Flags of vLLM that set its KV connector: they are refused, since ARES sets it to its own, and says what to do."""

from collections.abc import Iterable
from typing import Any

_OWN = "ares worker sets --kv-transfer-config itself, and other connectors cannot be combined with moves"
_OFFLOADING = (
    "KV offloading cannot be combined with moves: vLLM's OffloadingConnector stores the blocks of a finished request a "
    "step after they were freed, and inside of its MultiConnector it does not learn which of them NIXL has been given "
    "to write to meanwhile, so that it could cache the KV of another request (v1/offloading/scheduler.py, 0.32; 0.33 "
    "has that repaired, but the two have not been run together there); leave --kv-offloading-size out"
)
# What argparse takes for each: any beginning that no other flag has.
_FLAGS = {"--kv-t": f"{_OWN}: leave it out ({_OFFLOADING})", "--kv-o": _OFFLOADING}


class TransferFlagError(ValueError):
    """A flag sets another KV connector; the message says why it cannot be, and what to do."""


def check(flags: Iterable[str]) -> None:
    """Check flags of vLLM, before it is imported; TransferFlagError where one sets a KV connector."""
    for flag in flags:
        for beginning, why in _FLAGS.items():
            if flag.replace("_", "-").startswith(beginning):
                raise TransferFlagError(f"{flag.split('=')[0]}: {why}")


def check_parsed(args: Any) -> None:
    """Check what vLLM read from its flags and from the file of `--config`; TransferFlagError likewise."""
    if args.kv_transfer_config is not None:
        raise TransferFlagError(f"kv-transfer-config: {_FLAGS['--kv-t']}")
    if args.kv_offloading_size is not None:
        raise TransferFlagError(f"kv-offloading-size: {_FLAGS['--kv-o']}")
