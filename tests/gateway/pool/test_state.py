"""What is known of an instance that greets again."""

from ares.gateway.pool.state import InstanceState
from ares.protocol import messages


def greeting(boot: str) -> messages.Hello:
    peer = messages.Peer("engine", "127.0.0.1", 5600)
    return messages.Hello("decode-0", "decode", boot, peer, 16, 1000, 4096, {}, prefix_caching=True, kv_events=True)


def test_what_was_learned_of_an_instance_holds_until_it_restarts() -> None:
    state = InstanceState()
    state.start(greeting("first"))
    state.cached.sent([b"block"])
    learned = state.cached, state.step_time, state.prefill_time
    state.clear()
    state.start(greeting("first"))  # it had not heard of this gateway for a while
    assert (state.cached, state.step_time, state.prefill_time) == learned
    assert state.cached.leading([b"block"]) == 1
    state.clear()
    state.start(greeting("second"))
    assert state.cached.leading([b"block"]) == 0
    assert state.step_time is not learned[1]
    assert state.prefill_time is not learned[2]
