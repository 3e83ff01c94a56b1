"""The plan of a run, as data: a function of the seed and of the cluster's shape, and of nothing else.

Only the plan is determined. Its effect depends on real time: which request a move finds running, which line of code a
kill interrupts. What was really done is kept in the executed plan: `Event.orders`, `Plan.sent`.
"""

import math
import random
from typing import Any, Literal

import msgspec

Kind = Literal["move", "kill", "pause", "drain", "role", "preset", "fault"]
Client = Literal["plain", "whole", "slow", "leaves"]

ROLES = ("prefill", "decode", "both")
PRESETS = ("ares", "ares-no-prediction", "paper", "ares-suspension", "ares-rebalance", "static-least-loaded", "off")
# A slow reader of more would delay the end of a run.
_LONGEST_SLOW = 600
# Parameters of requests that need more than their tokens to be resumed.
STATEFUL: dict[str, Any] = {"seed": 4, "temperature": 1.0, "presence_penalty": 0.5}
# What is done to the cluster: each card once, shuffled, before any comes again.
_DECK = (
    *("kill decode", "kill decode", "kill prefill", "pause decode", "pause decode", "pause prefill"),
    *("drain", "drain", "preset", "preset"),
)
_TELEMETRY_FAULTS = (
    *('{"predictions":"nan"}', '{"predictions":"negative"}', '{"predictions":"huge"}'),
    *('{"telemetry":"constant"}', '{"telemetry":"empty"}', '{"telemetry":"full"}'),
    *('{"telemetry":"absurd"}', '{"telemetry":"silent"}', '{"telemetry":"silent"}'),
)
# Of two real decode instances one would be left, for as long as the other has another role.
_MOCK_DECK = (
    *('{"refuse":true}', '{"drop_streams":true}', '{"slow":8}', '{"lose_tokens":0.5}', "freeze", "die"),
    *("role decode", "role decode", "role prefill"),
)
# The cluster recovers from these by itself, so that they may hit many instances at a time.
_HARMLESS = ("predictions", "constant", "empty", "full", "slow", "lose_tokens")


class Shape(msgspec.Struct, frozen=True):
    """What the plan is for.

    Attributes
    ----------
    prefill, decode, per_process
        Instances, and how many of them share a process.
    streams
        Requests at a time.
    seconds
        How long new requests and events come.
    simulated
        Whether the engines are.
    longest_prompt, longest_output
        In tokens.
    prompts
        Number of different prompts; None: every request has its own.
    events_per_s, moves_per_s
        Events a second; orders to move a second, each of some requests.
    vocabulary
        Number of token ids that prompts may have; the lowest, which are special tokens of many models, are left out.
    """

    prefill: int
    decode: int
    per_process: int
    streams: int
    seconds: float
    simulated: bool
    longest_prompt: int
    longest_output: int
    events_per_s: float
    moves_per_s: float
    prompts: int | None = None
    vocabulary: int = 40_000

    def processes(self, role: str) -> list[str]:
        """Return the names of the processes of a role."""
        return [f"{role}-{n}" for n in range(-(-(self.prefill if role == "prefill" else self.decode) // self._most))]

    def instances(self, process: str) -> list[str]:
        """Return the names of the instances in a process."""
        if not self.simulated:
            return [process]
        role, number = process.rsplit("-", 1)
        left = (self.prefill if role == "prefill" else self.decode) - int(number) * self._most
        return [f"{process}-{n}" for n in range(min(self._most, left))]

    @property
    def _most(self) -> int:
        return self.per_process if self.simulated else 1


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something done to the cluster.

    Attributes
    ----------
    at_s, seconds
        When, from the start, and for how long: until it is undone.
    target
        A process for `kill` and `pause`, an instance for `drain`, `role` and `fault`.
    what
        The preset, the mode of a move, the role that an instance is to have meanwhile, or the body of
        `/simulate/faults`.
    draw
        Seed of what can only be chosen when it is due: the requests of a move and their targets.
    count
        Requests of a move.
    orders
        Requests of a move with their targets, once it was executed; executed again, it draws nothing.
    """

    at_s: float
    kind: Kind
    target: str = ""
    seconds: float = 0.0
    what: str = ""
    draw: int = 0
    count: int = 0
    orders: list[tuple[str, str]] | None = None

    @property
    def harmless(self) -> bool:
        """Whether any number of such events may happen at a time."""
        return self.kind in ("move", "preset") or any(word in self.what for word in _HARMLESS)


class RequestPlan(msgspec.Struct, frozen=True):
    """One request and its client.

    Attributes
    ----------
    name
        Its x-request-id.
    prompt, prompt_tokens
        Which prompt, and its length.
    tokens
        Limit on the output; a mock engine may end it earlier, unless `ignore_eos`.
    parameters
        More of the body.
    client
        `plain` and `whole` read at once; `slow` reads little at a time, and pauses for `seconds` after each read;
        `leaves` goes away after `events` events of its stream, or after `seconds`.
    wait_s
        Before it is sent.
    """

    name: str
    prompt: int
    prompt_tokens: int
    tokens: int
    ignore_eos: bool
    parameters: dict[str, Any]
    client: Client
    events: int
    seconds: float
    wait_s: float


class Plan(msgspec.Struct, frozen=True, omit_defaults=True):
    """Events, and the seed of the requests, which are too many to list: `request` makes each.

    Attributes
    ----------
    sent
        When each request was sent, from the start and by its name, in an executed plan; then only these are sent.
    """

    seed: int
    shape: Shape
    events: list[Event]
    sent: dict[str, float] = {}

    @property
    def kinds(self) -> tuple[dict[str, Any], ...]:
        """The sampling parameters that requests bring, the most frequent ones first."""
        return {}, STATEFUL, {"logprobs": 5}

    def request(self, slot: int, turn: int) -> RequestPlan:
        """Return the request that a slot sends at its turn."""
        draw = random.Random(f"{self.seed} {slot} {turn}")  # noqa: S311 - a workload, not a secret
        shape = self.shape
        number = slot * 100_000 + turn if shape.prompts is None else draw.randrange(shape.prompts)
        client: Client = draw.choices(("plain", "whole", "slow", "leaves"), (78, 6, 6, 10))[0]
        tokens = _log_uniform(draw, 1, shape.longest_output)
        parameters = draw.choices(self.kinds, (82, 10, 8))[0]
        if client == "slow":
            # Enough for the buffers between here and the engine to fill.
            tokens, parameters = min(shape.longest_output, _LONGEST_SLOW), self.kinds[-1]
        early = draw.random() < 0.3
        return RequestPlan(
            name=f"chaos-{slot}-{turn}",
            prompt=number,
            prompt_tokens=self.prompt_tokens(number),
            tokens=tokens,
            ignore_eos=not shape.simulated or draw.random() < 0.7,
            parameters=dict(parameters),
            client=client,
            events=0 if early else _log_uniform(draw, 1, tokens),
            seconds=round(draw.uniform(0.0, 1.0) if client == "leaves" else draw.uniform(0.05, 0.5), 3),
            # Not all at once: they are spread over the first seconds.
            wait_s=round(draw.uniform(0.0, min(5.0, shape.seconds / 4)) if turn == 0 else draw.expovariate(10.0), 3),
        )

    def prompt_tokens(self, prompt: int) -> int:
        """Return the length of a prompt."""
        return _log_uniform(random.Random(f"{self.seed} length {prompt}"), 2, self.shape.longest_prompt)  # noqa: S311

    def token_ids(self, prompt: int) -> list[int]:
        """Return the tokens of a prompt."""
        draw = random.Random(f"{self.seed} prompt {prompt}")  # noqa: S311 - likewise
        vocabulary = self.shape.vocabulary
        return draw.choices(range(vocabulary // 40, vocabulary), k=self.prompt_tokens(prompt))


def make_plan(seed: int, shape: Shape) -> Plan:
    """Draw a plan."""
    draw = random.Random(f"{seed} events")  # noqa: S311 - likewise
    return Plan(
        seed, shape, sorted([*_moves(draw, shape), *_cluster_events(draw, shape)], key=lambda event: event.at_s)
    )


def _moves(draw: random.Random, shape: Shape) -> list[Event]:
    found, at = [], 0.0
    while (at := at + draw.expovariate(shape.moves_per_s)) < shape.seconds:
        # Now and then many at once.
        count = draw.choice((1, 1, 2, max(2, shape.streams // 40)))
        mode = draw.choice(("auto", "stop_and_copy", "pre_copy"))
        found.append(Event(round(at, 3), "move", what=mode, draw=draw.getrandbits(32), count=count))
    return found


def _cluster_events(draw: random.Random, shape: Shape) -> list[Event]:
    """Draw the events of processes and instances, never for more than half of the decode processes at a time."""
    found: list[Event] = []
    until: dict[str, float] = {}
    deck: list[str] = []
    at = min(2.0, shape.seconds / 10)
    while (at := at + draw.expovariate(shape.events_per_s)) < shape.seconds - 0.5:
        if not deck:
            deck = [*_DECK, *_TELEMETRY_FAULTS, *(_MOCK_DECK if shape.simulated else ())]
            draw.shuffle(deck)
            if not found and not shape.simulated:
                # A real engine takes long to restart, and others must be available meanwhile: one kill comes early,
                # in a short run too, and just before it one instance is silent.
                deck += ["kill decode", draw.choice(('{"telemetry":"silent"}', '{"telemetry":"absurd"}'))]
        until = {name: end for name, end in until.items() if end > at}
        postponed: list[str] = []
        while deck:
            card = deck.pop()
            event = _event_of(draw, shape, at, card)
            if event is None:
                continue
            process = event.target if event.kind in ("kill", "pause") else event.target.rsplit("-", 1)[0]
            process = process if shape.simulated else event.target
            role = process.split("-", 1)[0]
            hit = sum(name.startswith(role) for name in until)
            if event.harmless:
                found.append(event)
                break
            if process not in until and hit + 1 <= max(role == "prefill", len(shape.processes(role)) // 2):
                until[process] = at + event.seconds + (2.0 if event.kind == "kill" else 1.0)
                found.append(event)
                break
            postponed.append(card)
        # An event for which too few are available comes as soon as it can.
        deck += reversed(postponed)
    return found


def _event_of(draw: random.Random, shape: Shape, at: float, card: str) -> Event | None:
    """Turn a card into an event; None where the cluster is too small for it."""
    at = round(at, 3)
    role = "prefill" if card.endswith("prefill") else "decode"
    processes = shape.processes(role)
    if card != "preset" and (not processes or (role == "decode" and len(processes) < 2)):
        return None
    process = draw.choice(processes) if processes else ""
    instance = draw.choice(shape.instances(process)) if processes else ""
    longest = min(15.0, shape.seconds / 2)
    match card.partition(" ")[0]:
        case "kill":
            return Event(at, "kill", process, round(draw.uniform(0.0, 3.0), 3))
        case "pause":
            # As often for a moment as for so long that the instance is given up.
            seconds = math.exp(draw.uniform(math.log(0.1), math.log(longest)))
            return Event(at, "pause", process, round(seconds, 3))
        case "drain":
            return Event(at, "drain", instance, round(draw.uniform(0.5, longest), 3), draw.choice(("0.5", "5", "60")))
        case "role":
            other = draw.choice([one for one in ROLES if one != role])
            return Event(at, "role", instance, round(draw.uniform(0.5, longest), 3), other)
        case "preset":
            return Event(at, "preset", what=draw.choice(PRESETS))
        case "freeze":
            seconds = round(draw.uniform(0.1, longest), 3)
            return Event(at, "fault", instance, seconds, f'{{"freeze_s":{seconds}}}')
        case "die":
            seconds = round(draw.uniform(0.1, 4.0), 3)
            return Event(at, "fault", instance, seconds, f'{{"die":true,"restart_after_s":{seconds}}}')
        case _:
            return Event(at, "fault", instance, round(draw.uniform(0.5, longest), 3), card)


def _log_uniform(draw: random.Random, least: int, most: int) -> int:
    return min(most, int(math.exp(draw.uniform(math.log(least), math.log(most + 1)))))
