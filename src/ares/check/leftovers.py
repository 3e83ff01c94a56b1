"""What the transfers have left behind: failed transfers, expired leases, requests, KV."""

from ares.bench.nixl_counters import FAULTS
from ares.check.instances import Cluster
from ares.check.rows import Outcome, Row, listed
from ares.check.transfers import settled

GROUP = "afterwards"
_SETTLE_S = 10.0


def faults(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> Row:
    """Return whether NIXL counts failures, by the counters of each instance before and after."""
    risen = {
        f"{name} on {instance}": int(after[instance][name] - before[instance][name])
        for instance in before
        for name in FAULTS
        if after[instance][name] > before[instance][name]
    }
    check = "failed transfers, expired leases"
    if not risen:
        return Row(GROUP, check, Outcome.PASS, "none")
    value = listed(f"{count} x {name}" for name, count in risen.items())
    return Row(GROUP, check, Outcome.FAIL, value, "see the logs of these instances for NIXL's errors", {"risen": risen})


async def requests(cluster: Cluster) -> Row:
    """Return whether an instance still has a request of these checks."""
    busy = await settled(cluster, _SETTLE_S)
    check = "requests of this check"
    if not busy:
        return Row(GROUP, check, Outcome.PASS, "all ended")
    return Row(
        GROUP, check, Outcome.FAIL, f"still on {listed(busy)} after {_SETTLE_S:g} s", "report it with the --json file"
    )
