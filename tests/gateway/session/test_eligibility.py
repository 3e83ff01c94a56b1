"""Whether an instance can continue a request, by what it reports."""

from typing import Any

import pytest

from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool import compatibility
from ares.gateway.pool.state import InstanceState
from ares.gateway.session.eligibility import why_ineligible
from ares.gateway.session.output import Output
from ares.gateway.session.placement import Placement
from ares.protocol import messages
from ares.protocol.fields import CARRIES_OUTPUT, CARRIES_SEED


def hello(*, longest: int = 1000, carries: tuple[str, ...] = (), block_size: int = 16, **engine: str) -> messages.Hello:
    return messages.Hello(
        name="d",
        role="decode",
        boot="b",
        peer=messages.Peer("e", "127.0.0.1", 5600),
        block_size=block_size,
        kv_blocks=100,
        max_model_len=longest,
        versions={},
        carries=list(carries),
        configuration={"dtype": "bfloat16", "model_runner": "V2", **engine},
    )


def instance(**reported: Any) -> InstanceState:
    state = InstanceState()
    state.start(hello(**reported))
    return state


def placement(maximum: int = 100, **sampling: Any) -> Placement:
    made = Placement(
        prompt=[10] * 50,
        sampling=Sampling({}, maximum, **sampling),
        output=Output(),
        choose_prefill=lambda *_: None,
        gateway="g",
        maximum_attempts=1,
    )
    made.began_with = compatibility.values(hello())
    return made


@pytest.mark.parametrize(
    ("sampling", "reported", "why"),
    [
        ({"needs": frozenset({CARRIES_OUTPUT})}, {}, "does not restore output of the request"),
        ({"adapter": "poems"}, {}, "does not have the adapter poems"),
        ({"maximum": 951}, {}, "takes sequences of fewer tokens than the 1001 that"),
        (
            {},
            {"dtype": "float16"},
            "differs in what decides KV or tokens from where the request was: data type (float16,",
        ),
        (
            {"needs": frozenset({CARRIES_SEED})},
            {"carries": (CARRIES_SEED,), "model_runner": "V1"},
            "differs in what decides KV or tokens from where the request was: model runner (V1, V2 there",
        ),
    ],
)
def test_what_an_instance_lacks_is_named(sampling: dict[str, Any], reported: dict[str, Any], why: str) -> None:
    found = why_ineligible(placement(**sampling), instance(**reported), None)
    assert found is not None
    assert found.startswith(why)


@pytest.mark.parametrize("reported", [{}, {"model_runner": "V1"}, {"block_size": 32}, {"dtype": ""}])
def test_without_a_seed_or_kv_other_settings_do_not_matter(reported: dict[str, Any]) -> None:
    assert why_ineligible(placement(950), instance(**reported), None) is None


def test_kv_goes_between_those_that_are_alike_alone() -> None:
    wide = compatibility.values(hello(block_size=32))
    assert "KV block size (16, 32 there" in str(why_ineligible(placement(), instance(), wide))
    assert why_ineligible(placement(), instance(block_size=32), wide) is None


def test_nothing_is_known_to_be_wrong_with_an_instance_that_has_not_reported() -> None:
    assert why_ineligible(placement(10_000), InstanceState(), compatibility.values(hello())) is None
