"""Which instances may compute a prompt, or the rest of a request that resumes, and the choice among them.

A fault of the policy costs its choice, never the request (I7).
"""

from collections.abc import Callable, Sequence
from typing import Any

from ares.gateway.control.decider import Decider
from ares.gateway.control.prefill_choice import PrefillChoice, cached_tokens
from ares.gateway.control.snapshot import accepting
from ares.gateway.pool.instance import Instance
from ares.gateway.pool.pool import Pool
from ares.gateway.records.metrics import Metrics
from ares.gateway.session.eligibility import why_ineligible
from ares.gateway.session.placement import Placement, Resumption
from ares.gateway.session.session import Session


class PrefillCandidates:
    """Chooses where prompts are computed, under one preset.

    Parameters
    ----------
    pool, metrics
        The gateway's.
    choice
        Asks the prefill policy.
    record_fault
        Counts a fault of that policy, or in making its arguments.
    sees_prefixes
        Whether the preset looks at what is cached: a decode instance may compute a prompt then.
    knows_cached
        Whether it is known what is cached, which warm copies need as well: the rest of a request that resumes may be
        computed where most of it is.
    """

    def __init__(
        self,
        pool: Pool,
        metrics: Metrics,
        choice: PrefillChoice,
        record_fault: Callable[[Decider[Any, Any], Exception], None],
        *,
        sees_prefixes: bool,
        knows_cached: bool,
    ) -> None:
        self._pool, self._metrics, self._choice, self._record_fault = pool, metrics, choice, record_fault
        self._sees_prefixes, self._knows_cached = sees_prefixes, knows_cached

    def choose(self, placement: Placement, destination: Instance | None, *, to_decode: bool) -> Instance | None:
        """Return the open prefill instance that the policy chooses, whose KV the destination, or some, can use.

        None where the decode instance is to prefill: `destination`, or else `placement.computes_on` if that is set.

        Parameters
        ----------
        placement
            The request.
        destination
            Where it is to decode; None: that is not known yet.
        to_decode
            Whether a decode instance may be chosen.
        """
        placement.computes_on = None
        decoding = [destination] if destination is not None else accepting(self._pool.decode_instances, ())
        decoding = decoding or self._pool.decode_instances
        candidates = self._able_to_prefill(placement, decoding)
        resumes = destination is not None and placement.output.tokens
        if destination is not None and resumes and self._computes_rest(placement, candidates, destination):
            return None
        if not candidates:
            return None
        computing: list[Instance] = []
        if self._sees_prefixes and to_decode:
            able = (i for i in decoding if i.takes("decode") and why_ineligible(placement, i.state, None) is None)
            computing = [i for i in able if self._choice.has_room(i, placement.tokens)]
        try:
            chosen, decodes = self._choice.choose(placement, candidates, computing)
        except Exception as error:
            self._record_fault(self._choice.decider, error)
            return self._choice.choose_without_policy(placement, candidates)
        if decodes:
            # Where it is admitted already, there is nothing to choose any more.
            placement.computes_on = chosen if destination is None else None
            return None
        return chosen

    def prefill_ended(self, placement: Placement, instance: Instance, cached_tokens: int | None) -> None:
        """Note that a prefill instance has answered, and how much of the tokens it had cached; None: it failed."""
        self._choice.ended(placement, instance)
        if placement.resumption is not None and cached_tokens is not None:
            placement.resumption = placement.resumption._replace(prefilled=True)

    def admitted(self, placement: Placement, instance: Instance) -> None:
        """Note where a request is to decode, before it is chosen what computes what is missing there."""
        if placement.output.tokens and not placement.pinned_kv.kept:
            cached = int(cached_tokens(placement, [instance])[0]) if self._knows_cached else 0
            placement.resumption = Resumption(instance, cached)
        else:
            self._choice.note_sent(placement, instance)

    def decode_began(self, placement: Placement, instance: Instance) -> None:
        """Count the resumption of a request that runs again: not before, since attempts may fail."""
        found, placement.resumption = placement.resumption, None
        if found is None or found.instance is not instance:
            return
        self._choice.note_sent(placement, instance)
        self._metrics.resumptions.labels("prefill" if found.prefilled else "decode").inc()
        if not found.prefilled:
            self._metrics.resumed_cached_tokens.inc(found.cached_tokens)

    def resumes_on(self, session: Session, exclude: set[str]) -> Instance | None:
        """Return the decode instance where a request had best resume for what is cached there; None: anywhere."""
        placement = session.placement
        # Where its KV is kept, it is pulled.
        if not self._knows_cached or not placement.output.tokens or placement.pinned_kv.kept:
            return None
        able = [
            i
            for i in accepting(self._pool.decode_instances, exclude)
            if i.state.hello is not None and i.state.free_blocks * i.state.hello.block_size > session.tokens
        ]
        return self._choose_resumption(placement, self._able_to_prefill(placement, able), able)

    def _able_to_prefill(self, placement: Placement, decoding: Sequence[Instance]) -> list[Instance]:
        """Return the open prefill instances whose KV one of these decode instances can use."""
        # In a pool without separate prefill instances, moving the KV of every prompt would gain nothing.
        if all(i.role == "both" for i in self._pool.instances):
            return []
        return [
            i
            for i in self._pool.prefill_instances
            if i.takes("prefill")
            and i.state.serves(placement.sampling.adapter)
            and i.state.fits(placement.tokens + 1)
            and any(why_ineligible(placement, each.state, i.state.settings) is None for each in decoding)
        ]

    def _computes_rest(self, placement: Placement, candidates: list[Instance], destination: Instance) -> bool:
        """Whether a request that resumes is computed where it will decode, because most of it is cached there."""
        return self._choose_resumption(placement, candidates, [destination], begins=True) is not None

    def _choose_resumption(
        self, placement: Placement, candidates: list[Instance], decoding: list[Instance], *, begins: bool = False
    ) -> Instance | None:
        if not self._knows_cached or not decoding:
            return None
        try:
            return self._choice.choose_resumption(placement, candidates, decoding, begins=begins)
        except Exception as error:
            self._record_fault(self._choice.decider, error)
            return None
