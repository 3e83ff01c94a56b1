"""Flags for the instances of a cluster that a command starts: those without an effect, or with a wrong one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from ares.terminal.errors import exit_with_error

if TYPE_CHECKING:
    from ares.local_cluster.cluster import ClusterSettings

_HIDDEN_STATE_FLAGS = {
    "--record-hidden-states",
    "--record-fraction",
    "--learn",
    "--learn-folder",
    "--record-at-once",
    "--record-token-ids",
}


def check(prefill: int, prefill_flags: Sequence[str], flags: Sequence[str]) -> None:
    """Exit with an error where flags of vLLM cannot be for instances that are started here.

    Parameters
    ----------
    prefill
        Prefill instances.
    prefill_flags
        Flags for them alone.
    flags
        All flags.
    """
    from ares.engine import given_flags

    if prefill_flags and not prefill:
        exit_with_error("--prefill-args has no effect with --prefill 0: give --decode-args")
    given = given_flags.names(flags)
    if "device-ids" in given:
        exit_with_error("--device-ids would put all instances on the same GPUs: set CUDA_VISIBLE_DEVICES")
    if "advertise-host" in given:
        exit_with_error(
            "--advertise-host is of `ares worker`: the instances of `ares up` and `ares check` are on loopback; on "
            "several hosts start each instance with `ares worker`, and `ares gateway` before them"
        )


def refuse_for_mock(context: typer.Context) -> None:
    """Exit with an error where `ares worker --simulate` was given options about hidden states: it has no model."""
    from ares.cli.given_options import given_flags  # which imports the policies

    given = given_flags(context) & _HIDDEN_STATE_FLAGS
    if context.params["learn"] is False:  # --no-learn: a mock engine does not
        given -= {"--learn"}
    if given:
        exit_with_error(
            f"{', '.join(sorted(given))} changes nothing with --simulate: a mock engine has no hidden states"
        )


def check_mock(cluster: "ClusterSettings") -> None:
    """Exit with an error where the flags or the profile cannot be used for mock engines."""
    from ares.mock_engine import settings
    from ares.simulator.profile import ProfileError

    try:
        for role in ("prefill", "decode"):
            settings.parse(str(cluster.simulate), cluster.model, list(cluster.flags(role)))
    except (ProfileError, settings.FlagError) as error:
        exit_with_error(str(error))
