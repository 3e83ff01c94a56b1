"""What a gateway knows of its instances, requests and moves, as JSON."""

import asyncio
import itertools
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

from ares.gateway.control.predictions import rows_by_key
from ares.gateway.control.warm_copies import warm_copy
from ares.gateway.http import merged_models
from ares.gateway.models import Models
from ares.gateway.pool.instance import Instance
from ares.gateway.pool.pool import why_closed
from ares.gateway.records.window import WINDOW_VALUES, Recent
from ares.gateway.service import Gateway
from ares.gateway.session.session import Session
from ares.predicted_load import plausible, predicted_peak, predicted_remaining
from ares.protocol import messages


def whole(models: Models, moves: int | None = None) -> dict[str, Any]:
    """Return the status of this process: `snapshot`, with recent moves, the newest last, learners and connectors.

    `moves` is how many of the moves it has at most; None: all that are kept.
    """
    first = models.first
    newest_first = itertools.islice(reversed(first.migrations), moves)
    return snapshot(models) | {
        "migrations": [asdict(record) for record in newest_first][::-1],
        "learners": first.learners.as_json(),
        "process": {"tasks": len(asyncio.all_tasks())},
        "connectors": {i.name: i.state.telemetry.resources for i in models.instances if i.state.telemetry},
    }


def snapshot(models: Models) -> dict[str, Any]:
    """Return instances, running requests, and recent measurements; with several models, which one each is of."""
    of_each = [_of_model(gateway) for gateway in models]
    whole = of_each[0]
    if models.several:
        whole |= merged_models.merged(models.names, of_each)
        whole["models"] = [
            {
                "name": gateway.names[0],
                "names": gateway.names,
                "adapters": gateway.pool.adapters,
                "why": None if gateway.pool.ready else gateway.pool.why_not_ready,
            }
            | {name: one[name] for name in merged_models.OF_EACH}
            for gateway, one in zip(models, of_each, strict=True)
        ]
    return whole | {"recent": recent(models).summary()}


def recent(models: Models) -> Recent:
    """Return the recent measurements of all models."""
    if not models.several:
        return models.first.recent
    made = Recent(WINDOW_VALUES * len(models.names))
    for gateway in models:
        made.extend(gateway.recent.values())
    return made


def _of_model(gateway: Gateway) -> dict[str, Any]:
    rows, differing = rows_by_key(gateway.pool.instances), gateway.pool.differing()
    sessions = Counter(id(s.instance) for s in gateway.sessions.values())
    return {
        "now": time.time(),
        "preset": gateway.controller.preset,
        "settings": gateway.controller.in_force,
        "gateway": gateway.name,
        "controller": gateway.controller.lease_status,
        "suspensions": gateway.controller.suspensions,
        "waiting": gateway.controller.waiting,
        "backlog": len(gateway.backlog),
        "backlog_tokens": gateway.backlog.tokens,
        "suspended": gateway.controller.suspended,
        "instances": [
            _instance(i, sessions[id(i)], gateway.drainer.left(i) if i.closing or i.next_role else None)
            | {"differs_in": differing.get(i.name)}
            for i in gateway.pool.instances
        ],
        "requests": [_request(s, rows.get(s.key or "")) for s in list(gateway.sessions.values())],
        "roles": gateway.role_planner.status,
        "learner_ages_s": gateway.learners.ages(),
        "learner_old_s": gateway.tuning.learner_old_s,
    }


def role_of(instance: Instance) -> dict[str, Any]:
    """Return the role of an instance, the one that it is about to have, and how long that may take."""
    changes = instance.next_role is not None
    left_s = round(max(0.0, instance.changes_by - time.monotonic()), 3) if changes else None
    return {"role": instance.role, "next_role": instance.next_role, "role_left_s": left_s}


def _instance(instance: Instance, sessions: int, left: int | None) -> dict[str, Any]:
    load, hello = instance.state.telemetry, instance.state.hello
    row: dict[str, Any] = {
        "name": instance.name,
        **role_of(instance),
        "url": instance.url,
        "healthy": instance.health.healthy,
        "draining": instance.state.draining,
        "leaving": instance.leaving,
        "why": why_closed(instance),
        "left": left,
    }
    if load is not None and hello is not None:
        row |= {
            "running": load.running,
            "waiting": load.waiting,
            "resident_tokens": sum(r.resident for r in load.rows),
            "predicted_remaining_tokens": predicted_remaining(load),
            "predicted_peak_tokens": predicted_peak(load, instance.state.layout),
            "capacity_tokens": instance.state.capacity_tokens,
            "kv_blocks_used": load.kv_blocks_used,
            "kv_blocks": hello.kv_blocks,
            "pinned": load.pinned,
            "step_time_s": load.step_time_s,
            "steps": load.steps,
            "busy_s": load.busy_s,
            "prompt_tokens": load.prompt_tokens,
            "block_size": hello.block_size,
            "prefix_cache": instance.state.cached.status,
            "max_num_seqs": hello.max_num_seqs,
            "max_num_batched_tokens": hello.max_num_batched_tokens,
            "step_time_coefficients": None
            if (fitted := instance.state.step_time.coefficients) is None
            else fitted.tolist(),
            "prefill_time_coefficients": instance.state.prefill_time.coefficients,
            "preemptions": load.preemptions,
            "sessions": sessions,
            "predictor": load.predictor,
            "predictor_refused": None
            if not load.predictor_refused[0]
            else dict(zip(("version", "why"), load.predictor_refused, strict=True)),
        }
    return row


def _request(session: Session, row: messages.Row | None) -> dict[str, Any]:
    why, copy = session.unmovable_now(), warm_copy(session)
    predicted = row.remaining if row is not None else None
    usable = predicted is not None and plausible(predicted)
    low, middle, high = predicted if predicted is not None and usable else (None, None, None)
    return {
        "id": session.id,
        "state": "moving" if session.moving else session.phase,
        "instance": session.instance.name if session.instance else None,
        "resident_tokens": session.tokens,
        "prompt_tokens": len(session.prompt),
        "output_tokens": len(session.emitted),
        "remaining_p10": low,
        "remaining_p50": middle,
        "remaining_p90": high,
        "moves": session.moves,
        "warm_copy": copy._asdict() if copy is not None else None,
        "movable": why is None,
        "reason": why,
    }
