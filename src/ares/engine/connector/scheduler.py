"""The connector's scheduler side: cuts running requests, pins and releases their KV, reports the load.

A migration needs no patch. A running request ends by vLLM's own stop check when its `max_tokens` is lowered to what is
emitted and in flight (v1/core/sched/utils.py:check_stop); it then finishes like a prefill in a prefill-decode pair:
the stock connector pins its blocks under a lease and returns the `kv_transfer_params` with which another instance
pulls them. Everything here runs on the engine thread except `telemetry`, which only reads.
"""

import logging
import time
from pathlib import Path
from typing import Any

from ares import __version__
from ares.engine import configuration, identity, vllm_version
from ares.engine.connector import resources
from ares.engine.connector.exported_kv import is_shortened, restrict_to_output
from ares.engine.connector.kv_groups import kv_groups
from ares.engine.connector.late_scheduling import LateScheduling
from ares.engine.connector.precopy_pins import PrecopyPins
from ares.engine.connector.pull import PullPolicy
from ares.engine.connector.resume_grammar import GrammarReplay
from ares.engine.connector.resume_output import carried_state, resume_output
from ares.engine.connector.step_times import StepTimes
from ares.engine.connector.tracking import PendingCut, TrackedRequest, WorkerCommands
from ares.engine.control import ControlChannel, EngineCommand, GatewayDisconnected, GatewayExpired
from ares.engine.kv_events import KvEventLog, readable_endpoint
from ares.engine.learning.folder import LearningFolder, Predicting
from ares.engine.learning.service import LearningService
from ares.engine.prediction import carried_forecast
from ares.engine.prediction.metadata import Prediction, PredictionMetadata
from ares.engine.vllm_api import (
    NixlConnectorMetadata,
    NixlPullConnectorScheduler,
    Request,
    RequestStatus,
    check_sequence_repetition,
    current_platform,
)
from ares.protocol import fields, messages, rpc
from ares.protocol.fields import RequestState

logger = logging.getLogger(__name__)


def _in_flight(request: Request, scheduled: dict[str, int]) -> int:
    """Return how many output tokens a request has after all steps so far, the one that begins included.

    With speculative decoding it may have fewer by then, where drafts in flight are rejected, or reach the number before
    the last token of a step, whose further tokens vLLM then drops.
    """
    step = scheduled.get(request.request_id, 0)
    # A prompt that is still being computed in chunks yields no token in this step.
    samples = step > 0 and request.num_computed_tokens + step >= request.num_tokens
    return int(request.num_output_tokens + request.num_output_placeholders + samples)


def _repeats(request: Request) -> bool:
    """Whether vLLM's repetition check ends the output here; it comes after that of the limit, which a cut lowers."""
    sampling = request.sampling_params
    return (
        sampling.repetition_detection is not None
        and request.num_output_tokens >= sampling.min_tokens
        and check_sequence_repetition(request.output_token_ids, sampling.repetition_detection)
    )


def _key_of(request: Request) -> str | None:
    """Return the key that a gateway gave a request; None where it has none, or one that no gateway gives."""
    key = (request.kv_transfer_params or {}).get(fields.KEY)
    if key is None or (isinstance(key, str) and len(key) <= messages.LONGEST_KEY):
        return key
    logger.warning("%s: its %s is not that of a gateway, and is not used", request.request_id, fields.KEY)
    return None


class Scheduler(NixlPullConnectorScheduler):  # type: ignore[misc]
    """vLLM's pull scheduler that can hand a running request over."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._tracked: dict[str, TrackedRequest] = {}
        self._by_key: dict[str, TrackedRequest] = {}
        # Those whose gateways want their tokens after each step.
        self._sends_tokens: dict[str, TrackedRequest] = {}
        # Finished here, with KV pinned until it is pulled, released or its lease ends: vLLM's id to our key, and back.
        self._pinned: dict[str, str] = {}
        self._pinned_by_key: dict[str, str] = {}
        # Prefills that ended in this step: vLLM's id to our key, until the step's predictions are posted.
        self._prefilled: dict[str, str] = {}
        self._preemptions = 0
        self._steps = StepTimes()
        self._worker_commands = WorkerCommands()
        # Requests that pull within the current step, and the blocks that they pull into.
        self._pulling: dict[str, list[int]] = {}
        settings = identity.current()
        self._one_sided = current_platform.device_type != "cpu" or settings.on_loopback
        self._pulls = PullPolicy(vllm_config, kv_cache_config, self, one_sided=self._one_sided)
        self._precopy_pins = PrecopyPins(self.block_size)
        # Answers to copies that wait until the workers know of the pins: schedulings until then, receiver, answer.
        self._copied: list[tuple[int, bytes, messages.CopyResult]] = []
        # With asynchronous scheduling, the metadata of a step is with the workers when the next but one is scheduled.
        self._steps_ahead = 2 if vllm_config.scheduler_config.async_scheduling else 0
        self._grammars = GrammarReplay(vllm_config)
        self._sequence = 0
        # Without learning, what predicts changes only by a failure.
        self._predicting = Predicting(settings.predictor_version)
        self._learning: LearningService | None = None
        if settings.learn_folder:
            self._learning = LearningService(LearningFolder(Path(settings.learn_folder)), settings.predictor_version)
        self.kv_cache_manager: Any = None
        # vLLM has one address for both: it listens on this one, and publishes it in kv_transfer_params.
        self._listen_host: str = self.side_channel_host
        self.side_channel_host: str = settings.published_host
        parallel = vllm_config.parallel_config
        events_config = vllm_config.kv_events_config
        events_endpoint = readable_endpoint(events_config) if vllm_config.cache_config.enable_prefix_caching else None
        hello = messages.Hello(
            name=settings.name,
            role=settings.role,
            boot=settings.boot,
            peer=messages.Peer(
                engine_id=self.engine_id,
                host=self.side_channel_host,
                port=self.side_channel_port,
                tp_size=self.transfer_tp_size,
                dcp_size=parallel.decode_context_parallel_size,
                pp_size=parallel.pipeline_parallel_size,
            ),
            block_size=self.block_size,
            # Block 0 is vLLM's null block and holds nothing.
            kv_blocks=kv_cache_config.num_blocks - 1,
            max_model_len=vllm_config.model_config.max_model_len,
            versions={
                "ares": __version__,
                "vllm": vllm_version.installed(),
                **configuration.versions("nixl", "torch"),
            },
            token_bytes=self._pulls.token_bytes,
            pull_within_step_bytes=self._pulls.limit_bytes,
            carries=carried_state(vllm_config, by_worker=settings.resumes_output),
            prefix_caching=self._pulls.uniform_cache and bool(vllm_config.cache_config.enable_prefix_caching),
            leases=True,
            max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            kv_groups=kv_groups(kv_cache_config),
            configuration=configuration.describe(vllm_config, predicts=bool(settings.predictor)),
            learns=self._learning is not None,
            kv_events=events_endpoint is not None,
            roles=list(settings.roles),
            expects=bool(self._steps_ahead),
            step_tokens=True,
        )
        self._channel = ControlChannel(
            settings.control_endpoint,
            hello,
            self.telemetry,
            key=identity.control_key(),
            learning=self._learning,
            kv_events=KvEventLog(events_endpoint, events_config.topic) if events_endpoint is not None else None,
        )
        if hello.expects:
            LateScheduling(self._channel.expected).install()
        resources.register("scheduler", self._count_resources)

    def set_xfer_handshake_metadata(self, metadata: Any) -> None:
        """Serve NIXL's side channel on the address to listen on, which need not be the published one."""
        published = self.side_channel_host
        self.side_channel_host = self._listen_host
        try:
            super().set_xfer_handshake_metadata(metadata)
        finally:
            self.side_channel_host = published

    # --- a request's way through the scheduler ---

    def on_new_request(self, request: Request) -> None:
        """Track the request under the key that the gateway gave it."""
        super().on_new_request(request)
        tracked = TrackedRequest(request, _key_of(request))
        self._tracked[request.request_id] = tracked
        if tracked.key is not None:
            self._by_key[tracked.key] = tracked
            self._channel.expected.arrived(tracked.key)
            if request.kv_transfer_params.get(fields.STEP_TOKENS) is True:
                self._sends_tokens[request.request_id] = tracked

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Pull the KV that the source holds, which is less than the prompt.

        The prompt of a migrated request ends with a token whose KV the source has not computed. Asking for the whole
        prompt, as the stock connector does, would at a block boundary ask for a block that does not exist.
        """
        count, load_async = super().get_num_new_matched_tokens(request, num_computed_tokens)
        params = request.kv_transfer_params
        tracked = self._tracked[request.request_id]
        if tracked.cached_tokens is None:
            tracked.cached_tokens = num_computed_tokens
        if not count or not params or not params.get(fields.DO_REMOTE_PREFILL):
            return count, load_async
        count = max(0, min(count, (params.get(fields.REMOTE_NUM_TOKENS) or 0) - num_computed_tokens))
        tracked.local_tokens = num_computed_tokens
        if not self._pulls.within_step(params, count):
            return count, count > 0
        # The step itself has to compute at least the last token.
        return max(0, min(count, request.num_tokens - 1 - num_computed_tokens)), False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """Start the pull into the blocks that the scheduler has just given the request."""
        tracked = self._tracked[request.request_id]
        params = request.kv_transfer_params
        wanted = bool(params and params.get(fields.DO_REMOTE_PREFILL))
        tracked.queued_s = time.perf_counter() - tracked.arrived
        if wanted and num_external_tokens and self._pulls.within_step(params, num_external_tokens):
            # The stock code pulls into blocks without a hash, but here the scheduler has hashed the full ones already.
            first = tracked.local_tokens // self.block_size
            last = -(-(tracked.local_tokens + num_external_tokens) // self.block_size)
            into = [block.block_id for block in blocks.blocks[0][first:last]]
            self._reqs_need_recv[request.request_id] = (request, (into,), (first,), True)
            params[fields.DO_REMOTE_PREFILL] = False
            params["_remote_blocks_processed"] = True
            self._pulling[request.request_id] = into
            self._worker_commands.pull_now.add(request.request_id)
        else:
            super().update_state_after_alloc(request, blocks, num_external_tokens)
        if tracked.resumed_tokens is None:
            tracked.resumed_tokens = resume_output(request, self._grammars.accept)
        tracked.pulled_tokens = num_external_tokens
        if request.request_id in self._pulling or not (num_external_tokens or tracked.kv_received):
            # KV that is pulled within the step is here when the step begins; if that fails, a second message follows.
            self._report_kv_received(tracked, failed=False)

    def update_connector_output(self, connector_output: Any) -> None:
        """Report which pulls ended, and forget pins that were freed."""
        super().update_connector_output(connector_output)
        if isinstance(meta := connector_output.kv_connector_worker_meta, PredictionMetadata):
            self._record_predictions(meta.predictions)
            if meta.failed:
                self._predicting = Predicting()
        self._prefilled = {}
        failed = connector_output.failed_recving or ()
        for request_id in connector_output.finished_recving or ():
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                self._report_kv_received(tracked, failed=request_id in failed)
                self._pulls.record(tracked.request.kv_transfer_params, failed=request_id in failed)
        invalid = connector_output.invalid_block_ids or set()
        for request_id, into in self._pulling.items():
            tracked = self._tracked.get(request_id)
            if tracked is not None and not invalid.isdisjoint(into):
                self._report_kv_received(tracked, failed=True)
                self._pulls.record(tracked.request.kv_transfer_params, failed=True)
        self._pulls.record_speed(connector_output.kv_connector_stats, within_step=bool(self._pulling))
        self._pulling = {}
        if self._precopy_pins and connector_output.finished_sending:
            self._precopy_pins.free(self.kv_cache_manager, connector_output.finished_sending)
        for request_id in connector_output.finished_sending or ():
            key = self._pinned.pop(request_id, None)
            if key is not None:
                self._pinned_by_key.pop(key, None)

    def _record_predictions(self, predictions: dict[str, Prediction | None]) -> None:
        for request_id, prediction in predictions.items():
            if (tracked := self._tracked.get(request_id)) is not None:
                tracked.prediction = prediction
            elif prediction is not None and (key := self._prefilled.get(request_id)) is not None:
                carried = "" if prediction.carried is None else carried_forecast.encode(prediction.carried)
                self._channel.post(messages.Predicted(key, prediction.remaining, carried))

    def _report_kv_received(self, tracked: TrackedRequest, *, failed: bool) -> None:
        tracked.kv_received = True
        if tracked.key is not None:
            pulled = 0 if failed else tracked.pulled_tokens
            self._channel.post(messages.KvReceived(tracked.key, pulled, failed, tracked.queued_s))

    def request_finished(self, request: Request, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Pin the KV of a request that was cut; leave every other end to vLLM."""
        tracked = self._tracked.pop(request.request_id, None)
        self._sends_tokens.pop(request.request_id, None)
        if tracked is None or tracked.key is None:
            return super().request_finished(request, block_ids)  # type: ignore[no-any-return]
        self._by_key.pop(tracked.key, None)
        self._preemptions += request.num_preemptions
        params = request.kv_transfer_params
        capped = request.status == RequestStatus.FINISHED_LENGTH_CAPPED
        ended = capped or request.status == RequestStatus.FINISHED_STOPPED
        # The token after a shortened prompt is discarded, so that it cannot end the output.
        shortened = is_shortened(request)
        goes_on = capped and (tracked.cut is not None or bool(params.get(fields.DO_REMOTE_DECODE)))
        if goes_on and not tracked.release_kv and not shortened and _repeats(request):
            # vLLM has fixed the finish reason by now; gateways know it by the stop reason.
            request.stop_reason = fields.REPETITION_DETECTED
            tracked.release_kv = True
        pin = (capped or (ended and shortened)) and not tracked.release_kv
        if (capped or pin) and params.get(fields.DO_REMOTE_DECODE):
            self._prefilled[request.request_id] = tracked.key
        if tracked.cut is not None and pin:
            params[fields.DO_REMOTE_DECODE] = True
            request.stop_reason = fields.MIGRATED
        elif tracked.gateway_expired and capped:
            # If the stream is read after all: this is not where the output ends.
            request.stop_reason = fields.MIGRATED
        elif params.get(fields.DO_REMOTE_DECODE) and ended and not pin:
            # A prefill that ended for good (its first token was a stop token), or whose KV no instance will pull.
            params[fields.DO_REMOTE_DECODE] = False
            self._reqs_not_processed.add(request.request_id)
        if tracked.cut is not None and not pin:
            self._reqs_not_processed.add(request.request_id)
        pinned, kv_transfer_params = super().request_finished(request, block_ids)
        if pinned:
            self._complete_pin(request, tracked.key, kv_transfer_params)
            if tracked.cut is not None and (carried := tracked.carried()):
                kv_transfer_params[fields.FIRST_FORECAST] = carried
        if tracked.cut is not None:
            self._answer(tracked, kv_transfer_params if pin else None)
        if request.max_tokens == 1:  # of a prefill: vLLM's reply does not have it
            kv_transfer_params = {**(kv_transfer_params or {}), fields.CACHED_TOKENS: tracked.cached_tokens}
        return pinned, kv_transfer_params

    def _complete_pin(self, request: Request, key: str, kv_transfer_params: dict[str, Any]) -> None:
        """Note a new pin, and correct what vLLM tells the target of it."""
        if is_shortened(request):
            kv_transfer_params[fields.PROMPT_SHORTENED] = True
        restrict_to_output(
            kv_transfer_params,
            request,
            min(request.num_tokens - 1, self._get_remote_prefill_token_count(request.num_tokens)),
            self.kv_cache_manager,
            self.get_exchange_clipped_blocks,
            has_state=self._has_mamba,
        )
        self._pinned[request.request_id] = key
        self._pinned_by_key[key] = request.request_id
        self._shorten_orphaned_lease(key, request.request_id)

    def _shorten_orphaned_lease(self, key: str, request_id: str) -> None:
        """Shorten the lease of a new pin whose gateway has disconnected already."""
        if messages.owner(key) in self._channel.disconnected:
            self._worker_commands.orphaned.add(request_id)

    def _answer(self, tracked: TrackedRequest, kv_transfer_params: dict[str, Any] | None) -> None:
        assert tracked.cut is not None  # noqa: S101 - for the type checker: only cut requests are answered
        assert tracked.key is not None  # noqa: S101 - likewise: only requests with a key are cut
        output = tracked.request.output_token_ids
        self._channel.post(
            messages.CutResult(
                call=tracked.cut.call,
                key=tracked.key,
                outcome=fields.CutOutcome.FINISHED if kv_transfer_params is None else fields.CutOutcome.PINNED,
                output_tokens=tracked.output_tokens,
                tail=list(output[-messages.CUT_TAIL_TOKENS :]),
                kv_transfer_params=kv_transfer_params or {},
            ),
            tracked.cut.sender,
        )

    def step_completed(self) -> None:
        """Measure the step that has ended, and send gateways the tokens that their running requests got in it."""
        self._steps.completed(time.perf_counter(), idle=not self._tracked)
        if rows := [row for tracked in self._sends_tokens.values() if (row := tracked.new_tokens()) is not None]:
            self._channel.post_tokens(rows)

    # --- commands ---

    def build_connector_meta(self, scheduler_output: Any) -> NixlConnectorMetadata:
        """Carry out the waiting commands, then build vLLM's metadata with our commands to the workers in it.

        Called at the end of every scheduling, before the scheduler counts the scheduled tokens as computed.
        """
        scheduled = scheduler_output.num_scheduled_tokens
        tokens = scheduler_output.total_num_scheduled_tokens
        self._steps.scheduled(time.perf_counter(), tokens, self._prompt_tokens(scheduled))
        if self._copied:
            self._answer_copies()
        if self._channel.waiting:
            for sender, command in self._channel.commands():
                self._carry_out(sender, command, scheduled)
        meta = super().build_connector_meta(scheduler_output)
        if not self._worker_commands:
            return meta
        commands, self._worker_commands = self._worker_commands, WorkerCommands()
        return commands.added_to(meta)

    def _prompt_tokens(self, scheduled: dict[str, int]) -> int:
        """Return how many of a step's tokens are of prompts; a request that decodes without drafts has one token."""
        count = 0
        for request_id, tokens in scheduled.items():
            if tokens > 1 and (tracked := self._tracked.get(request_id)) is not None:
                left = tracked.request.num_prompt_tokens - tracked.request.num_computed_tokens
                count += max(0, min(tokens, left))
        return count

    def _carry_out(self, sender: bytes, command: EngineCommand, scheduled: dict[str, int]) -> None:
        match command:
            case messages.Cut():
                self._cut(sender, command, scheduled)
            case messages.Copy():
                self._copy(sender, command)
            case messages.Release(key=key):
                self._worker_commands.release.update(self._precopy_pins.ids(key))
                if (request_id := self._pinned_by_key.get(key)) is not None:
                    self._worker_commands.release.add(request_id)
                elif (tracked := self._by_key.get(key)) is not None:
                    tracked.release_kv = True
            case messages.Connect(peers=peers):
                self._worker_commands.connect.extend(p for p in peers if p.engine_id != self.engine_id)
            case GatewayDisconnected(gateway=gateway):
                self._worker_commands.orphaned.update(self._precopy_pins.ids_of(gateway))
                kept = self._pinned_by_key.items()
                self._worker_commands.orphaned.update(
                    request_id for key, request_id in kept if messages.owner(key) == gateway
                )
            case GatewayExpired(gateway=gateway):
                self._end_requests(gateway, scheduled)

    def _end_requests(self, gateway: str, scheduled: dict[str, int]) -> None:
        """End the requests of a gateway that did not connect again; one that does not run ends with its next token."""
        if gateway not in self._channel.disconnected:
            return
        for key, tracked in self._by_key.items():
            if messages.owner(key) != gateway or tracked.cut is not None:
                continue
            request = tracked.request
            tracked.release_kv = True
            limit = max(_in_flight(request, scheduled), request.num_output_tokens + 1)
            if limit < request.max_tokens:
                request.max_tokens = limit
                tracked.gateway_expired = True
            logger.warning("%s ends: its gateway has been disconnected for %g s", key, rpc.GATEWAY_EXPIRY_S)

    def _cut(self, sender: bytes, command: messages.Cut, scheduled: dict[str, int]) -> None:
        tracked = self._by_key.get(command.key)
        if tracked is None:
            self._channel.post(messages.CutResult(command.call, command.key, fields.CutOutcome.UNKNOWN), sender)
            return
        request = tracked.request
        limit = _in_flight(request, scheduled)
        if limit == request.num_output_tokens or tracked.cut is not None:
            self._channel.post(messages.CutResult(command.call, command.key, fields.CutOutcome.NOT_RUNNING), sender)
            return
        tracked.cut = PendingCut(sender, command.call)
        # The workers keep a lease only for requests that they know, and the next they hear of this one may be its pull:
        # with asynchronous scheduling, a step whose sampling waits for the tokens before it ends after this request.
        self._reqs_in_batch.add(request.request_id)
        if limit < request.max_tokens:
            request.max_tokens = limit
        else:
            # It ends by its own limit in this step: there is nothing to pin, and the answer will be `FINISHED`.
            tracked.release_kv = True

    def _copy(self, sender: bytes, command: messages.Copy) -> None:
        tracked = self._by_key.get(command.key)
        if tracked is None or tracked.request.status != RequestStatus.RUNNING or not self._pulls.uniform_cache:
            self._channel.post(messages.CopyResult(command.call, command.pin), sender)
            return
        pinned = self._precopy_pins.pin(self.kv_cache_manager, tracked.request, command.pin, command.most)
        kv_transfer_params = None
        if pinned is not None:
            # The stock connector takes it for a prefill of these tokens that has just ended.
            self._reqs_in_batch.add(pinned.request_id)
            _, kv_transfer_params = super().request_finished(pinned, (pinned.block_ids,))
            self._shorten_orphaned_lease(command.pin, pinned.request_id)
        tokens = pinned.num_computed_tokens if pinned is not None else 0
        answer = messages.CopyResult(command.call, command.pin, tokens, kv_transfer_params or {})
        if pinned is not None and self._steps_ahead:
            # Workers ignore the notification of a pull from a pin that they do not know yet, and would keep that pin
            # until its lease ends.
            self._copied.append((self._steps_ahead, sender, answer))
        else:
            self._channel.post(answer, sender)

    def _answer_copies(self) -> None:
        waiting, self._copied = self._copied, []
        for steps, sender, answer in waiting:
            if steps > 1:
                self._copied.append((steps - 1, sender, answer))
            else:
                self._channel.post(answer, sender)

    def has_pending_push_work(self) -> bool:
        """Keep the engine loop running until commands are carried out and nothing is being copied from it.

        Without a GPU, a pull over TCP needs steps of its source, in which that polls NIXL (engine/connector/worker.py).
        vLLM has this hook for connectors that push KV; the name is vLLM's.
        """
        if self._channel.waiting or self._precopy_pins or (self._pinned and not self._one_sided):
            return True
        return bool(super().has_pending_push_work())

    # --- telemetry ---

    def telemetry(self) -> messages.Telemetry:
        """Return the load. Runs on the channel's thread: copies first, and never writes to vLLM's objects."""
        rows = []
        running = waiting = preempted = prefilling = 0
        for tracked in list(self._tracked.values()):
            request = tracked.request
            state: RequestState
            if tracked.is_precopy:
                state = RequestState.COPYING
            elif request.status == RequestStatus.RUNNING:
                running, state = running + 1, RequestState.RUNNING
            elif request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                waiting, state = waiting + 1, RequestState.LOADING
            else:
                waiting, state = waiting + 1, RequestState.WAITING
            preempted += request.num_preemptions
            prefilling += tracked.is_prefill
            if tracked.key is not None:
                resident = request.num_tokens if state in {RequestState.LOADING, RequestState.RUNNING} else 0
                rows.append(messages.Row(tracked.key, resident, tracked.output_tokens, state, tracked.remaining()))
        self._sequence += 1
        pool = self.kv_cache_manager.block_pool if self.kv_cache_manager is not None else None
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks() if pool is not None else 0
        steps = self._steps.totals
        predicting = self._predicting if self._learning is None else self._learning.predicting()
        return messages.Telemetry(
            sequence=self._sequence,
            kv_blocks_used=used,
            running=running,
            waiting=waiting,
            pinned=len(self._pinned) + len(self._precopy_pins),
            step_time_s=steps.step_time_s,
            steps=steps.steps,
            preemptions=self._preemptions + preempted,
            rows=rows,
            busy_s=steps.busy_s,
            prompt_tokens=steps.prompt_tokens,
            pull_bytes_per_s=self._pulls.bytes_per_s,
            resources=resources.count(),
            predictor=predicting.version,
            predictor_refused=predicting.refused,
            prefilling=prefilling,
        )

    def _count_resources(self) -> dict[str, int]:
        return {
            "requests": len(self._tracked),
            "keys": len(self._by_key),
            "pins": len(self._pinned),
            "precopy_pins": len(self._precopy_pins),
            "pulls_to_start": len(self._reqs_need_recv),
        }

    def shutdown(self) -> None:
        """Close the control channel with vLLM's own."""
        self._channel.close()
        super().shutdown()
