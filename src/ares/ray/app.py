"""The application of Ray Serve: `serve run ares.ray.app:build model=Qwen/Qwen3-8B decode=4` (docs/ray.md)."""

from typing import Any

from ares import extras
from ares.ray.capacity import Need, Node, check
from ares.ray.settings import Settings

extras.require("ray")

import ray  # noqa: E402 - first the error that says how to install it
from ray import serve  # noqa: E402

from ares.ray.directory import Directory  # noqa: E402
from ares.ray.ingress import Ingress  # noqa: E402
from ares.ray.instance import END_S, Instance  # noqa: E402

# The gateway has limits of its own, and says by which one it refuses a request.
_MANY = 1_000_000
# An instance whose process has ended is replaced after three checks that fail.
_HEALTH_CHECK_S = 1.0


def build(settings: Settings) -> Any:
    """Return the application: the gateway as its ingress, before deployments of instances.

    Raises
    ------
    CapacityError
        The nodes of the cluster do not suffice.
    """
    if ray.is_initialized() and not settings.wait_for_nodes:
        check(_needs(settings), _nodes())
    directory = serve.deployment(
        Directory,
        name="Directory",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MANY,
        logging_config={"enable_access_log": False},  # each instance announces itself once a second
    ).bind()
    instances = [_instances(settings, *kind, directory) for kind in settings.roles()]
    return serve.deployment(
        serve.ingress()(Ingress),
        name="Gateway",
        num_replicas=settings.gateways,
        max_ongoing_requests=_MANY,
        graceful_shutdown_timeout_s=settings.drain_s + END_S,
    ).bind(settings.gateway_settings(), directory, *instances)


def _instances(settings: Settings, name: str, role: Any, count: int, directory: Any) -> Any:
    """Return the deployment of the instances of a role, each in a placement group of its own."""
    resources = {"num_cpus": settings.cpus, "num_gpus": settings.instance_gpus(role)}
    placement: dict[str, Any] = {"max_replicas_per_node": settings.per_node}
    if settings.per_node is None:
        bundle = {"CPU": settings.cpus, "GPU": settings.instance_gpus(role)}
        placement = {"placement_group_bundles": [{name: amount for name, amount in bundle.items() if amount}]}
    return serve.deployment(
        Instance,
        name=name,
        num_replicas=count,
        ray_actor_options=resources,
        health_check_period_s=_HEALTH_CHECK_S,
        graceful_shutdown_timeout_s=settings.drain_s + 2 * END_S,
        **placement,
    ).bind(role, settings.worker_arguments(role), settings.start_timeout_s, settings.drain_s, directory)


def _needs(settings: Settings) -> list[Need]:
    found = [
        Need(
            "prefill instances" if role == "prefill" else "decode instances",
            count,
            settings.cpus,
            settings.instance_gpus(role),
            settings.per_node,
        )
        for _, role, count in settings.roles()
    ]
    return [*found, Need("gateways", settings.gateways, 1, 0, None)]


def _nodes() -> list[Node]:
    found = [node for node in ray.nodes() if node["Alive"]]
    return [
        Node(node["NodeManagerAddress"], node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
        for node in found
    ]
