"""How a session gets onto instances: a prefill, and after admission a stream of tokens from a decode instance."""

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.compatibility import Values
from ares.gateway.pool.delta import Delta, EngineLostError, EngineRefusedError
from ares.gateway.pool.instance import Instance, NoInstanceError
from ares.gateway.pool.prompt_blocks import PromptBlocks
from ares.gateway.session.eligibility import why_ineligible
from ares.gateway.session.output import Output
from ares.gateway.session.pending_call import PendingCall
from ares.gateway.session.pinned_kv import PinnedKV
from ares.gateway.session.segment import Segment
from ares.gateway.tracing.calls import call_span
from ares.gateway.tracing.span import NO_SPAN, Span
from ares.protocol import fields, messages

# Waits until the session is admitted to decode, and returns the instance: none of these names.
Admit = Callable[[set[str]], Awaitable[Instance]]


class Prefilled(NamedTuple):
    """The result of a prefill; empty where the decode instance is to prefill.

    Attributes
    ----------
    first
        The next token; None where the decode instance generates it: the state of the request starts with it, or the
        prefill instance has not computed all of the prompt.
    kv_transfer_params
        What the decode instance needs to pull the KV.
    predicted
        Quantiles of the tokens that remain, where the instance predicts them.
    """

    first: Delta | None = None
    kv_transfer_params: dict[str, Any] | None = None
    predicted: tuple[float, float, float] | None = None


class Resumption(NamedTuple):
    """Where a request resumes, how much of it was cached there, and whether a prefill instance has computed it."""

    instance: Instance
    cached_tokens: int
    prefilled: bool = False


@dataclass(slots=True, kw_only=True)
class Placement:
    """Gets a session onto instances.

    Attributes
    ----------
    prompt, sampling, output
        Of the session.
    choose_prefill
        Returns the instance to prefill on for a decode instance, None for any; None where that one is to prefill.
    prefill_ended
        Called when that instance has answered, with the tokens that it had cached; None where it failed.
    computes_on
        The decode instance that is to compute the tokens so far, because it has most of them cached; None: any.
    gateway
        Name of the gateway, with which all keys begin.
    maximum_attempts
        Most instances that are tried for one step.
    resumption
        How it resumes, until tokens come from where it does; None: it does not.
    priority
        vLLM's priority: the request with the largest is preempted first.
    began_with
        Settings of the instance where its tokens began; None before that, or where they are not known.
    cached_tokens
        Tokens of the prompt that the prefill instance had cached; None where no prefill instance has reported them.
    first_forecast
        What the predictors of its instances know of it, for every later instance; empty where there is none.
    pinned_kv
        The KV that an instance keeps until the next one pulls it.
    pending_call
        The answer that it waits for.
    span
        Of its request.
    """

    prompt: list[int]
    sampling: Sampling
    output: Output
    choose_prefill: Callable[["Placement", Instance | None], Instance | None]
    gateway: str
    maximum_attempts: int
    prefill_ended: Callable[["Placement", Instance, int | None], None] = lambda *_: None
    computes_on: Instance | None = None
    resumption: Resumption | None = None
    priority: int = 0
    began_with: Values | None = None
    cached_tokens: int | None = None
    first_forecast: str = ""
    pinned_kv: PinnedKV = field(default_factory=PinnedKV)
    pending_call: PendingCall = field(default_factory=PendingCall)
    span: Span = NO_SPAN
    _blocks: PromptBlocks | None = None
    _nonce: str = field(default_factory=lambda: uuid.uuid4().hex[:10])
    _keys: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.prompt) + len(self.output.tokens)

    def block_hashes(self, block_size: int) -> list[bytes]:
        """Return the hash of each full block of the tokens so far (pool/prompt_blocks.py)."""
        if self._blocks is None:
            self._blocks = PromptBlocks(self.sampling.adapter, self.sampling.cache_salt)
        return self._blocks.hashes(self.prompt, self.output.tokens, block_size)

    @property
    def newest_key(self) -> str:
        """Name of the newest request to an instance."""
        return f"{self.gateway}/{self._nonce}/{self._keys}"

    def next_key(self) -> str:
        """Make the name of another request to an instance."""
        self._keys += 1
        return self.newest_key

    async def prefill(self, destination: Instance | None = None) -> Prefilled:
        """Prefill the tokens so far, and generate the next one, for a decode instance; None: not chosen yet."""
        emitted, sampling = self.output.tokens, self.sampling
        if not emitted:
            self.began_with = None
        # Then no decode instance is needed, and no KV is kept for one.
        last = sampling.maximum_tokens - len(emitted) == 1
        for _ in range(self.maximum_attempts):
            instance = self.choose_prefill(self, destination)
            if instance is None:
                break
            if emitted and instance.state.lacks(sampling.needs):
                self.prefill_ended(self, instance, None)
                break
            key = self.next_key()
            if not last:
                self.pinned_kv.add(instance, key)
            request = sampling.prefill_request(key, self.prompt, emitted, self.first_forecast)
            try:
                with call_span(self.span, "prefill", instance, key, len(self.prompt) + len(emitted)) as span:
                    work = instance.engine.complete(request, span.headers)
                    delta, answered = await self.pending_call.answer(instance, work)
                    if delta.finish_reason == "abort":  # an engine that shuts down answers so
                        raise EngineLostError("the prefill instance aborted the request")
            except (EngineLostError, EngineRefusedError) as error:
                self.prefill_ended(self, instance, None)
                self.pinned_kv.free()
                instance.record_failure(error)
                continue
            except BaseException:
                self.prefill_ended(self, instance, None)
                raise
            self.prefill_ended(self, instance, _cached_tokens(answered))
            self.pinned_kv.confirm()
            self._note_settings(instance)
            kv_transfer_params = self._without_cached_tokens(answered)
            predicted = self._note_prediction(instance.control.prediction(key))
            if (sampling.unmovable_reason is not None and not last) or (kv_transfer_params or {}).get(
                fields.PROMPT_SHORTENED
            ):
                return Prefilled(None, kv_transfer_params, predicted)
            delta.name_repetition()
            if delta.finish_reason == "length" and not last:
                delta.finish_reason = None
            return Prefilled(delta, kv_transfer_params, predicted)
        return Prefilled()

    def _note_settings(self, instance: Instance) -> None:
        if self.began_with is None:
            self.began_with = instance.state.settings

    def _note_prediction(self, predicted: messages.Predicted | None) -> tuple[float, float, float] | None:
        """Keep the forecast for later instances; return the quantiles."""
        if predicted is None:
            return None
        self.first_forecast = predicted.forecast or self.first_forecast
        return predicted.remaining

    def _without_cached_tokens(self, answered: dict[str, Any] | None) -> dict[str, Any] | None:
        """Note how much of the prompt was cached at the first prefill; return the rest of the parameters."""
        rest = dict(answered or {})
        cached = rest.pop(fields.CACHED_TOKENS, None)
        if self.cached_tokens is None and isinstance(cached, int):
            self.cached_tokens = cached
        return rest or None

    async def start_decode(
        self, instance: Instance, kv_transfer_params: dict[str, Any] | None, admit: Admit
    ) -> Segment:
        """Start, or resume from the tokens so far, on a decode instance; where that fails, on what `admit` returns.

        Raises
        ------
        EngineLostError
            None of those that were asked took it.
        EngineRefusedError
            One refused it for a reason that holds for every instance.
        """
        tried, asked = set[str](), set[str]()
        chosen: Instance | None = instance
        lost: Exception | None = None
        for _ in range(self.maximum_attempts):
            try:
                chosen = chosen or await admit(tried)
            except NoInstanceError:
                if isinstance(lost, EngineRefusedError):
                    break
                tried.clear()  # there is no other one, and those that failed may be back
                continue
            try:
                return await self.pending_call.answer(chosen, self.open(chosen, self.output.tokens, kv_transfer_params))
            except (EngineLostError, EngineRefusedError) as error:
                chosen.record_failure(error)
                lost = error
                tried.add(chosen.name)
                asked.add(chosen.name)
                chosen = None
        raise EngineLostError(
            f"{len(asked)} instances in turn did not take the request, the last one: {lost}"
        ) from lost

    async def open(
        self, instance: Instance, emitted: list[int], kv_transfer_params: dict[str, Any] | None, key: str | None = None
    ) -> Segment:
        """Start a segment after the tokens `emitted`; returns when the instance has accepted it.

        Raises
        ------
        EngineLostError
            It did not answer.
        EngineRefusedError
            It refused the request; or, with status 503, it cannot continue it: it may have restarted with other
            settings since it was chosen.
        """
        key = key or self.next_key()
        if isinstance(known := (kv_transfer_params or {}).get(fields.FIRST_FORECAST), str):
            self.first_forecast = known
        if kv_transfer_params is not None and not (self.pinned_kv.kept and self.pinned_kv.instance is not instance):
            # Those blocks may be another request's by now, for example after a client has not read for long: the
            # tokens are computed again. An instance of the role `both` that has prefilled them finds them in its own
            # prefix cache.
            self.pinned_kv.free()
            kv_transfer_params = None
        if (
            why := why_ineligible(self, instance.state, self.pinned_kv.settings if kv_transfer_params else None)
        ) is not None:
            raise EngineRefusedError(503, f"{instance.name} {why}")
        body = self.sampling.decode_request(
            key, self.prompt, emitted, kv_transfer_params, priority=self.priority, first_forecast=self.first_forecast
        )
        # From here on the pulling instance frees the pin, also when the request is aborted.
        pin = self.pinned_kv.take() if kv_transfer_params is not None else None
        span = call_span(self.span, "decode", instance, key, len(self.prompt) + len(emitted))
        try:
            stream = await instance.engine.stream(body, span.headers, step_tokens=instance.sends_step_tokens)
        except BaseException as error:
            span.end(error)
            self.pinned_kv.put_back(pin)
            raise
        self._note_settings(instance)
        return Segment(instance, key, len(emitted), stream, pin, span)


def _cached_tokens(answered: dict[str, Any] | None) -> int:
    """Return how many tokens of its prompt a prefill instance had cached."""
    cached = (answered or {}).get(fields.CACHED_TOKENS)
    return cached if isinstance(cached, int) and cached > 0 else 0
