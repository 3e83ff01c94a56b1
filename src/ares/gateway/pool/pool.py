"""All the instances of a gateway."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from urllib.parse import urlsplit

import aiohttp

from ares.gateway.pool import compatibility, published
from ares.gateway.pool.changes import Changes
from ares.gateway.pool.compatibility import Decides
from ares.gateway.pool.discovery import Served, Unusable
from ares.gateway.pool.health import Status
from ares.gateway.pool.instance import Instance, Work
from ares.gateway.tuning import DEFAULT, Tuning
from ares.instance_sources import canonical
from ares.protocol import messages
from ares.protocol.keys import ControlKey

logger = logging.getLogger(__name__)

# What the pool would lose without the last instance that does this work.
_LOST: dict[Work, str] = {
    "decode": "the last open instance that decodes: new requests would wait, and fail in the end",
    "prefill": "the last open instance that prefills: decode instances would prefill, between the tokens of others",
}
# More than so many instances are not named one by one.
_MAXIMUM_INSTANCES_NAMED = 5


class Pool:
    """All instances of a gateway.

    They come and go by their URLs (`add`, `remove`). One that is removed takes nothing new, and is forgotten when no
    request needs it any more (control/drain.py).

    Parameters
    ----------
    urls
        Where the first ones answer; one that is given twice counts once.
    http
        Sends the key of the instances.
    interval_s
        Seconds between two reports of an instance.
    control_key
        The key of their control channels.
    gateway
        Name of the gateway, with which its keys begin.
    served
        The gateway's model; None uses instances of any.
    tuning
        The gateway's times and limits.

    Attributes
    ----------
    changes
        The newest changes of their states.
    sources
        Returns what may name further instances, for operators; empty where nothing does.
    all_instances
        Returns all instances whose names are to differ: by default those of the pool.
    """

    def __init__(
        self,
        urls: list[str],
        http: aiohttp.ClientSession,
        interval_s: float,
        control_key: ControlKey | None = None,
        gateway: str = "",
        served: Served | None = None,
        tuning: Tuning = DEFAULT,
    ) -> None:
        self._make = partial(
            Instance,
            http=http,
            interval_s=interval_s,
            control_key=control_key,
            gateway=gateway,
            served=served,
            tuning=tuning,
            replay_turn=asyncio.Lock(),
        )
        self._tuning = tuning
        self._served = served
        self.changes = Changes(tuning.kept_changes)
        self.sources: Callable[[], str] = lambda: ""
        self.all_instances: Callable[[], list[Instance]] = lambda: self.instances
        # By the canonical form of their URLs.
        self._by_url: dict[str, Instance] = {}
        # Those that are no duplicates; None where that has changed.
        self._used: list[Instance] | None = None
        # By boot id: the URL that is used, where several lead to the same instance.
        self._by_boot: dict[str, Instance] = {}
        self._described: dict[Instance, messages.Description] = {}
        self._differing: dict[str, str] = {}
        self._tasks: dict[Instance, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._running = self._wants_kv_events = False
        self._started_at = time.monotonic()
        self._changed = asyncio.Event()
        for url in _distinct(urls):
            self._watch(url)

    @property
    def instances(self) -> list[Instance]:
        """All instances, each once; not to be changed."""
        if self._used is None:  # asked for many times at every arrival
            self._used = [i for i in self._by_url.values() if not i.duplicate]
        return self._used

    @property
    def leaving(self) -> list[Instance]:
        """Those that are to be forgotten, further URLs of instances included."""
        return [i for i in self._by_url.values() if i.leaving]

    def start(self) -> None:
        """Begin to watch every instance."""
        self._started_at = time.monotonic()
        self._running = True
        for instance in self._by_url.values():
            self._begin(instance)

    async def stop(self) -> None:
        """Stop watching."""
        self._running = False
        tasks = [*self._tasks.values(), *self._ending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for instance in self._by_url.values():
            instance.health.close()
            instance.engine.close()

    def follow_kv_events(self) -> None:
        """Follow the KV events of all instances that publish them, from now on."""
        self._wants_kv_events = True
        for instance in self._by_url.values():
            instance.wants_kv_events = True

    # --- which there are ---

    def at(self, url: str) -> Instance | None:
        """Return what is watched at a URL, however that is spelled."""
        return self._by_url.get(canonical(url))

    def watches(self, instance: Instance) -> bool:
        """Whether an instance is one of this pool's, further URLs of instances included."""
        return self.at(instance.url) is instance

    def add(self, url: str, why: str) -> Instance:
        """Watch an instance from now on, or keep one that was about to leave.

        Parameters
        ----------
        url
            Its base URL, which `instance_sources.check_url` takes.
        why
            What names it, for the log.
        """
        instance = self.at(url)
        if instance is None:
            instance = self._watch(url)
            self._record(instance, "joined", why)
            if self._running:
                self._begin(instance)
        instance.named = True
        self._update_leaving(why)
        return instance

    def remove(self, url: str, why: str, deadline_s: float) -> None:
        """Let an instance go: it takes nothing new, its requests have `deadline_s` to end or to move.

        One that another of its URLs still names is kept.
        """
        instance = self.at(url)
        if instance is not None:
            instance.named = False
            self._update_leaving(why, deadline_s)

    def forget(self, instance: Instance) -> None:
        """Stop watching an instance that leaves."""
        self.drop(instance)
        self._record(instance, "gone", instance.why_leaving)

    def drop(self, instance: Instance) -> None:
        """Stop watching an instance at once, and say nothing of it: another pool has taken it over."""
        del self._by_url[canonical(instance.url)]
        self._used = None
        instance.health.close()
        instance.engine.close()
        if (task := self._tasks.pop(instance, None)) is not None:
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
        self._described.pop(instance, None)
        self._by_boot = {boot: i for boot, i in self._by_boot.items() if i is not instance}
        self._make_names_distinct()
        self._notify()

    def _watch(self, url: str) -> Instance:
        instance = self._by_url[canonical(url)] = self._make(url)
        self._used = None
        instance.wants_kv_events = self._wants_kv_events
        instance.health.on_change = partial(self._on_status, instance)
        instance.on_role = partial(self._on_role, instance)
        return instance

    def _begin(self, instance: Instance) -> None:
        watching = instance.watch(self.connect_peers, self._claim)
        self._tasks[instance] = asyncio.create_task(watching, name=f"watch {instance.url}")

    def _update_leaving(self, why: str, deadline_s: float | None = None) -> None:
        """Let go what no URL of an instance names any more, and keep what one names again."""
        also_named = {
            self._described[i].boot for i in self._by_url.values() if i.named and i.duplicate and i in self._described
        }
        for instance in self._by_url.values():
            described = self._described.get(instance)
            if instance.named or (described is not None and not instance.duplicate and described.boot in also_named):
                instance.stay()
            elif not instance.leaving:
                instance.leave(why, self._tuning.leave_s if deadline_s is None else deadline_s)

    def _on_status(self, instance: Instance) -> None:
        status = instance.health.status
        self._used = None
        if status.value.level:
            self.changes.add(instance.name, instance.url, status.name.lower(), instance.health.why)
        if status is Status.DUPLICATE or instance.leaving != (not instance.named):
            self._update_leaving(instance.health.why)
        self._notify()

    def _on_role(self, instance: Instance, role: messages.Role, next_role: messages.Role | None) -> None:
        """Note a change of role, from what it was before."""
        if instance.next_role is not None:
            state, why = "changing", f"from {instance.role} to {instance.next_role}"
        elif instance.role != role:
            state, why = instance.role, f"it was {role}"
        else:
            state, why = instance.role, f"it remains {role}, and does not become {next_role}"
        logger.info("%s has the role %s: %s", instance.name, state, why, extra={"instance": instance.name})
        self.changes.add(instance.name, instance.url, f"role {state}", why)
        self._notify()

    def _record(self, instance: Instance, state: str, why: str) -> None:
        name = f"{instance.name} ({instance.url})" if instance.name != instance.url else instance.url
        does = {"joined": "joins", "gone": "is gone"}[state]
        logger.info("%s %s: %s", name, does, why, extra={"instance": name, "state": state, "why": why})
        self.changes.add(instance.name, instance.url, state, why)

    # --- what they are ---

    @property
    def prefill_instances(self) -> list[Instance]:
        """The instances that prefill."""
        return [i for i in self.instances if i.role != "decode"]

    @property
    def decode_instances(self) -> list[Instance]:
        """The instances that decode."""
        return [i for i in self.instances if i.role != "prefill"]

    def find(self, name: str) -> Instance | None:
        """Return the instance called `name`."""
        return next((i for i in self.instances if i.name == name), None)

    @property
    def ready(self) -> bool:
        """Whether there is at least one instance to decode on."""
        return any(i.takes("decode") for i in self.instances)

    def lost_without(self, instance: Instance, works: Collection[Work] = ("decode", "prefill")) -> str | None:
        """Return what the pool would lose without this work of an open instance; None where others do the same."""
        others = [i for i in self.instances if i is not instance]
        lost = (kind for kind in works if instance.takes(kind) and not any(i.takes(kind) for i in others))
        return _LOST[kind] if (kind := next(lost, None)) is not None else None

    def may_become_ready(self, exclude: Collection[str] = ()) -> bool:
        """Whether an instance to decode on, not named in `exclude`, may become ready by itself."""
        now, first_s = time.monotonic(), self._tuning.first_report_s
        if not self.instances:  # a source may be about to name the first one
            return bool(self.sources()) and now - self._started_at < first_s
        return any(
            (i.health.may_return or now - max(i.watched_since, self._started_at) < first_s)
            and not i.leaving
            and i.name not in exclude
            for i in self.decode_instances
        )

    @property
    def why_not_ready(self) -> str:
        """Why the instances that could decode do not, or what is to name the first one."""
        if not self.decode_instances:
            kind = "that decodes " if self.instances else ""
            return f"no instance {kind}is known; waiting for one from {self.sources() or '--worker'}"
        reasons = [f"{i.name} {reason}" for i in self.decode_instances if (reason := why_closed(i)) is not None]
        more = (
            [f"and {len(reasons) - _MAXIMUM_INSTANCES_NAMED} more"] if len(reasons) > _MAXIMUM_INSTANCES_NAMED else []
        )
        return "; ".join(reasons[:_MAXIMUM_INSTANCES_NAMED] + more)

    @property
    def restored_by_all(self) -> frozenset[str]:
        """The parts of a moved request's state that every instance restores."""
        known = [frozenset(i.state.hello.carries) for i in self.instances if i.state.hello is not None]
        return frozenset.intersection(*known) if known else frozenset()

    @property
    def adapters(self) -> list[str]:
        """Names of the LoRA adapters that an instance to decode on has."""
        return sorted(frozenset[str]().union(*(i.state.adapters for i in self.decode_instances)))

    def all_serve(self, adapter: str | None) -> bool:
        """Whether every instance to decode on has this LoRA adapter."""
        return all(i.state.serves(adapter) for i in self.decode_instances)

    def differing(self) -> dict[str, str]:
        """Return how instances differ from most of those that decode in what decides KV or tokens, by their names."""
        most = compatibility.largest_alike(i.state.settings for i in self.decode_instances)
        found = ((i.name, compatibility.difference(i.state.settings, most)) for i in self.instances)
        return {name: how for name, how in found if how is not None}

    async def wait_for_change(self, timeout_s: float) -> None:
        """Wait until the status of an instance changes, or for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    def _notify(self) -> None:
        """Wake every `wait_for_change`."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _make_names_distinct(self) -> None:
        """Append the addresses to the names of instances that describe themselves by the same name."""
        instances = self.all_instances()
        for own_name, count in Counter(i.own_name for i in instances).items():
            same = [i for i in instances if i.own_name == own_name]
            names = [f"{own_name}@{urlsplit(i.url).netloc}" for i in same] if count > 1 else [own_name]
            if count > 1 and names != [i.name for i in same]:
                logger.warning("%d instances have the name %s; they are shown as %s", count, own_name, ", ".join(names))
            for instance, name in zip(same, names, strict=True):
                instance.name = name

    async def _claim(self, instance: Instance, found: messages.Description) -> Unusable | None:
        """Return why an instance is not used at this URL; None where it is.

        Another URL that leads to it is used, or it is on loopback and others of the pool are not.
        """
        self._described[instance] = found
        if (cause := published.among_other_hosts(found, self._described.values())) is not None:
            return Unusable(Status.WRONG_ADDRESS, cause)
        if not published.on_loopback(found):
            for other, described in self._described.items():
                if published.on_loopback(described):
                    other.release()
        used = self._by_boot.get(found.boot)
        if used is not None and used is not instance:
            if await used.leads_to(found.boot):
                cause = f"{used.name} at {used.url} is the same instance; leave one of the two out"
                return Unusable(Status.DUPLICATE, cause)
            used.release()
        self._by_boot = {boot: i for boot, i in self._by_boot.items() if i is not instance} | {found.boot: instance}
        if instance.duplicate or instance.health.status is Status.WRONG_ADDRESS or found.name != instance.own_name:
            instance.health.set_status(instance.url, Status.UNKNOWN)
            instance.name = instance.own_name = found.name
            if self._served is not None and not found.models:
                logger.warning(
                    "%s (%s) does not report which model it serves (an earlier ARES?); it is used",
                    found.name,
                    instance.url,
                )
            self._make_names_distinct()
        return None

    async def connect_peers(self, instance: Instance) -> None:
        """Let decode instances do the NIXL handshake with all that they may pull from, before a request needs it."""
        assert instance.state.hello is not None  # noqa: S101 - for the type checker: called on its Hello
        self._log_differences()
        others = [i for i in self.instances if i is not instance and _exchange_kv(i, instance)]
        if instance.role != "prefill":
            await instance.control.connect_peers([i.state.hello.peer for i in others if i.state.hello])
        for other in others:
            if other.role != "prefill" and other.state.hello is not None:
                await other.control.connect_peers([instance.state.hello.peer])

    def _log_differences(self) -> None:
        """Warn of instances that have begun to differ from most others."""
        differing = self.differing()
        for name, how in differing.items():
            if self._differing.get(name) != how:
                logger.warning("%s differs from most instances in %s: no request moves between them and it", name, how)
        self._differing = differing


def why_closed(instance: Instance) -> str | None:
    """Return why an instance takes no new requests; None where it does."""
    if instance.open:
        return None
    if instance.health.why:
        return instance.health.why
    closed = Status.LEAVING if instance.leaving else Status.DRAINING if instance.state.draining else None
    return closed.value.text if closed is not None else "has just been lost"


def _exchange_kv(one: Instance, other: Instance) -> bool:
    return compatibility.difference(one.state.settings, other.state.settings, Decides.KV | Decides.TOKENS) is None


def _distinct(urls: list[str]) -> list[str]:
    """Leave out what is another spelling of a URL before it."""
    found: dict[str, str] = {}
    for url in urls:
        first = found.setdefault(canonical(url), url)
        if first is not url:
            logger.warning("--worker %s is the same as %s: it is used once", url, first)
    return list(found.values())
