"""Files that people give: whatever is in them, they are read, or refused by the reader's own error that names them."""

import asyncio
import gzip
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example
from hypothesis import strategies as st

from ares.config import ConfigError, load
from ares.gateway.control.snapshot import ClusterSnapshot
from ares.gateway.discovery.base import SourceError
from ares.gateway.discovery.file import FileSource
from ares.gateway.records.decision_log import DecisionLog
from ares.gateway.records.replay import ReplayError, replay
from ares.policy import Cluster, Copyable, copier, preset
from ares.policy.admission import Candidates, Progress
from ares.policy.copies.most_saved import MostSavedSettings
from ares.policy.oom_avoidance import OomAvoidanceSettings, avoid_oom
from ares.policy.roles import PressureSettings, RolePool, role_policy
from ares.predictor import prompts
from ares.predictor.errors import PredictorError
from ares.protocol.keys import ControlKey, KeyFileError, read_key, read_keys
from ares.simulator.calibrate import recorded_engine
from ares.simulator.error_model_files import error_model
from ares.simulator.profile import Profile, ProfileError, load_profile, profile_names
from ares.simulator.recording import Recording, read_recording
from ares.traces import FORMATS, TraceError, Workload, read_trace
from tests.fuzz.cases import NASTY, fuzz, noise, warped


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def attempt(read: Callable[[], Any], error: type[Exception], *named: str) -> Any:
    """Return what is read, or None where it is refused with a message that names the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return read()
        except error as refusal:
            said = str(refusal)
    assert any(name in said for name in named), said
    said.encode()
    return None


def lines(*texts: str) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode("utf-8", "surrogatepass")


# --- traces ---

TRACES = {
    "azure": lines(
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.9799600,374,44",
        "2024-05-10 00:00:00.009930+00:00,12,3",
    ),
    "mooncake": lines(
        '{"timestamp": 0, "input_length": 10, "output_length": 5, "hash_ids": [1]}',
        '{"timestamp": 1500, "input_length": 20, "output_length": 7}',
    ),
    "bailian": lines(
        '{"chat_id": 0, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 10, "output_length": 5, "turn": 1}',
        '{"chat_id": 1, "parent_chat_id": 0, "timestamp": 1.5, "input_length": 20, "output_length": 7, "turn": 2}',
    ),
    "burstgpt": lines(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,ChatGPT,472,18,490,Conversation log",
        "45,ChatGPT,1087,230,1317,API log",
    ),
    "csv": lines("arrival_s,input_tokens,output_tokens", "0,5,5", "1.5,7,9"),
    "packed": gzip.compress(lines("arrival_s,input_tokens,output_tokens", "0,5,5", "1.5,7,9"), mtime=0),
}
MOONCAKE = {"timestamp": 0, "input_length": 10, "output_length": 5}


def _check_workload(work: Workload | None) -> None:
    if work is None:
        return
    assert len(work)
    assert work.arrival_s[0] == 0
    assert np.isfinite(work.arrival_s).all()
    assert (np.diff(work.arrival_s) >= 0).all()
    assert min(work.prompt_tokens.min(), work.output_tokens.min()) >= 1
    assert (work.memory_time > 0).all()


@fuzz("readers: traces", 150, data=noise(*TRACES.values()), form=st.none() | st.sampled_from([*FORMATS, "x"]))
@example(data=b'{"timestamp": 0}\n\xff\n', form=None)
@example(data=TRACES["csv"] + b"\xff", form=None)
@example(data=b'a,"' + b"x" * 200_000, form=None)
@example(data=TRACES["csv"] + b"1,1e300,5\n", form=None)
@example(data=TRACES["azure"] + b"0001-01-01 00:00:00+23:59,1,1\n", form=None)
def test_traces(folder: Path, data: bytes, form: str | None) -> None:
    path = folder / "trace"
    path.write_bytes(data)
    _check_workload(attempt(lambda: read_trace(path, form), TraceError, "trace"))


@fuzz("readers: traces", 100, line=warped(MOONCAKE))
@example(line='{"timestamp": 0, "input_length": ' + "9" * 5000 + ', "output_length": 1}')
@example(line='{"timestamp": 0, "input_length": ' + "9" * 400 + ', "output_length": 1}')
def test_lines_of_traces(folder: Path, line: str) -> None:
    path = folder / "trace"
    path.write_bytes(lines(json.dumps(MOONCAKE), line))
    _check_workload(attempt(lambda: read_trace(path, "mooncake"), TraceError, "trace"))


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    for form in (None, *FORMATS):
        with pytest.raises(TraceError, match="nowhere"):
            read_trace(tmp_path / "nowhere", form)


# --- recordings ---

REQUEST = {
    "request_id": "a",
    "input_toks": 10,
    "output_toks": 5,
    "arrival_time": 100.0,
    "queued_ts": 1.0,
    "first_token_ts": 1.5,
    "last_token_ts": 2.0,
}
META = {
    "model": "m",
    "vllm_version": "0.32.0",
    "kv_cache": {"block_size": 16, "num_gpu_blocks": 101},
    "engine_kwargs": {"max_num_seqs": 8, "max_num_batched_tokens": 512},
}


@fuzz("readers: recordings", 60, line=warped(REQUEST), meta=warped(META))
@example(line="[1]", meta="{}")
@example(line=json.dumps(REQUEST), meta="[]")
@example(line=json.dumps(REQUEST), meta='{"kv_cache": {"block_size": [1]}}')
@example(line='{"input_toks": NaN}', meta="9" * 5000)
def test_recordings(folder: Path, line: str, meta: str) -> None:
    (folder / "requests.jsonl").write_bytes(lines(json.dumps(REQUEST), json.dumps(REQUEST), line))
    (folder / "meta.json").write_bytes(lines(meta))
    read: Recording | None = attempt(lambda: read_recording(folder), TraceError, folder.name)
    if read is not None:
        _check_recording(read)


@fuzz("readers: recordings", 60, data=noise(lines(*[json.dumps(REQUEST)] * 3)), meta=noise(lines(json.dumps(META))))
def test_bytes_of_recordings(folder: Path, data: bytes, meta: bytes) -> None:
    (folder / "requests.jsonl").write_bytes(data)
    (folder / "meta.json").write_bytes(meta)
    read = attempt(lambda: read_recording(folder), TraceError, folder.name)
    if read is not None:
        _check_recording(read)


def _check_recording(read: Recording) -> None:
    for times in read.times("all").values():
        assert np.isfinite(times).all()
    assert recorded_engine(read, None, "name")["kv_tokens"] >= 0


# --- profiles and error models ---

PROFILE = json.loads(load_profile(profile_names()[0]).model_dump_json())
ERRORS = {"start": 0.5, "end": 0.1, "tokens": 100.0}


@fuzz("readers: profiles", 100, text=warped(PROFILE), data=st.none() | noise(json.dumps(PROFILE).encode()))
@example(text='{"name": ' + "9" * 5000 + "}", data=None)
@example(text="[" * 100_000, data=None)
@example(text=json.dumps({**PROFILE, "stall_s": float("inf")}), data=None)
def test_profiles(folder: Path, text: str, data: bytes | None) -> None:
    path = folder / "profile.json"
    path.write_bytes(lines(text) if data is None else data)
    read: Profile | None = attempt(lambda: load_profile(str(path)), ProfileError, "profile.json")
    if read is not None:
        assert np.isfinite(read.step.row()).all()
        assert json.loads(read.model_dump_json()) == read.model_dump()


@fuzz("readers: error models", 60, text=warped(ERRORS), data=st.none() | noise(json.dumps(ERRORS).encode()))
@example(text='{"start": NaN, "end": 1, "tokens": 1}', data=None)
@example(text='{"start": 1, "end": 1, "tokens": ' + "9" * 400 + "}", data=None)
@example(text="[" * 100_000, data=None)
def test_error_models(folder: Path, text: str, data: bytes | None) -> None:
    path = folder / "errors.json"
    path.write_bytes(lines(text) if data is None else data)
    read = attempt(lambda: error_model(str(path)), ValueError, "errors.json")
    if read is not None:
        assert np.isfinite([read.start, read.end, read.tokens]).all()


# --- decision logs ---


def _progress(count: int) -> Progress:
    ones = np.ones(count)
    return Progress(
        np.arange(count), 2.0 * ones, ones, 20.0 * ones, 0.05 * ones, np.inf * ones, 0.1 * ones, 0 * np.arange(count)
    )


def _logged(folder: Path) -> list[Any]:
    """Return a decision of each kind as a gateway logs them."""
    cluster = Cluster(
        instances=("decode-0", "decode-1"),
        capacity_tokens=np.array([1000, 1000]),
        promised_tokens=np.array([0, 50]),
        open=np.array([True, True]),
        requests=("a", "b", "c"),
        location=np.array([0, 0, 1]),
        resident_tokens=np.array([500, 400, 100]),
        movable=np.array([True, True, False]),
        remaining_tokens=np.array([[10.0, 100.0, 400.0], [5.0, 20.0, 80.0], [1.0, 2.0, 3.0]]),
        step_base_s=np.array([0.02, 0.02]),
        step_request_s=np.array([1e-4, 1e-4]),
        step_token_s=np.array([1e-7, 1e-7]),
        transfer_bytes_s=1e6,
        token_bytes=1.0,
    )
    view = ClusterSnapshot(cluster, _progress(3), [], [None] * 3, [])  # type: ignore[list-item]
    candidates = Candidates(
        requests=("d",),
        tokens=np.array([60]),
        remaining_tokens=np.array([[10.0, 20.0, 30.0]]),
        rank=np.array([-1]),
        waited_s=np.array([2.0]),
        suspended=np.array([False]),
        progress=_progress(1),
    )
    chosen = preset("ares")
    dispatch, admission, policy, *_ = chosen.make()
    oom_avoidance = OomAvoidanceSettings()
    file = folder / "valid.jsonl"
    log = DecisionLog(file)
    decided = admission.decide(cluster, candidates, view.running)
    log.admissions("ares", admission, {"age_credit": 0.0}, [300], view, candidates, decided)
    moves = policy.decide(cluster)
    log.moves("ares", view, policy, oom_avoidance, avoid_oom(cluster, oom_avoidance, view.running), moves)
    left = np.array([10.0, 20.0, 30.0])
    log.dispatch("ares", dispatch, {}, view, 60, left, dispatch.choose(cluster, 60, left))
    copyable = Copyable(
        requests=np.array([True, True, False]),
        cached_tokens=np.array([[500, 0], [400, 16], [0, 100]]),
        copied_to=np.array([-1, 1, -1]),
        takes=np.array([True, True]),
        under_way=np.array([0, 1]),
        under_way_tokens=np.array([0, 160]),
        token_s=1e-3,
        token_bytes=4.0,
        link_bytes=1e4,
    )
    copies = copier("most_saved", MostSavedSettings(link_bytes_s=1e6, memory_share=0.9))
    log.copies("ares", copies, {}, view, copyable, copies.decide(cluster, copyable))
    pool = RolePool(
        instances=("prefill-0", "decode-0", "decode-1"),
        decodes=np.array([False, True, True]),
        able=np.array([True, True, True]),
        changing=False,
        elapsed_s=2.0,
        busy=np.array([1.0, 0.0, 0.0]),
        queued_s=np.array([20.0, 0.0, 0.0]),
        requests=np.array([0.0, 2.0, 1.0]),
        tokens=np.array([0.0, 900.0, 100.0]),
        capacity_tokens=np.array([1000.0, 1000.0, 1000.0]),
        waiting_tokens=0.0,
        step_s=(0.02, 1e-4, 1e-7),
        ttft_s=10.0,
        tpot_s=np.inf,
    )
    roles = role_policy("pressure", PressureSettings(patience_s=0.0, cooldown_s=0.0))
    log.roles("ares", roles, roles.memory(), pool, roles.plan(pool))
    log.close()
    read = replay(file, None)
    assert (read.decisions, read.differences) == (5, [])
    assert read.made["copy"] == read.made["become_prefill"] == 1
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def logged(folder: Path) -> list[Any]:
    return _logged(folder)


@pytest.mark.timeout(300)
@fuzz("readers: decision logs", 80, data=st.data(), other=st.sampled_from([None, None, "off", "ares", "static-rr"]))
def test_decision_logs(folder: Path, logged: list[Any], data: st.DataObject, other: str | None) -> None:
    path = folder / "log.jsonl"
    path.write_bytes(lines(data.draw(warped(*logged))))
    with np.errstate(all="ignore"):  # numbers that mean nothing may come to nothing
        attempt(lambda: replay(path, other), ReplayError, "log.jsonl")


@pytest.mark.timeout(300)
@fuzz("readers: decision logs", 30, data=st.data())
def test_bytes_of_decision_logs(folder: Path, logged: list[Any], data: st.DataObject) -> None:
    path = folder / "log.jsonl"
    path.write_bytes(data.draw(noise(lines(*map(json.dumps, logged)))))
    with np.errstate(all="ignore"):
        attempt(lambda: replay(path, None), ReplayError, "log.jsonl")


def _with(record: Any, path: str, value: Any) -> Any:
    changed = json.loads(json.dumps(record))
    *before, last = path.split(".")
    inner = changed
    for name in before:
        inner = inner[name]
    inner[last] = value
    return changed


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        (1, "cluster.location", [0, 0, 7]),
        (1, "cluster.location", [0, 0, -1]),
        (1, "cluster.resident_tokens", [1]),
        (1, "cluster.resident_tokens", [10**30, 1, 1]),
        (1, "cluster.levels", []),
        (1, "cluster.levels", [0.5, 0.1, 0.9]),
        (1, "rebalance.settings.points", 10**9),
        (1, "rebalance.settings.horizon", 1e12),
        (1, "rebalance.settings.theta", "much"),
        (1, "oom_avoidance.lookahead_s", 1e12),
        (1, "time", "noon"),
        (0, "running.generated", [1]),
        (0, "candidates.tokens", [1, 2]),
        (0, "candidates.remaining_tokens", [[1.0]]),
        (0, "candidates.cached_tokens", [[1]]),
        (0, "candidates.cached_tokens", [[1, -2]]),
        (0, "admission.settings.cached_weight", 17.0),
        (0, "decided", [{"kind": ["admit"], "index": 0, "instance": 0}]),
        (0, "memory.age_credit", "much"),
        (0, "ended", [-1]),
        (0, "ended", "many"),
        (0, "admission.settings.order", "lifo"),
        (0, "admission.settings.headroom", 5.0),
        (2, "tokens", -1),
        (2, "remaining", [1.0]),
        (3, "copyable.cached_tokens", [[1, 2]]),
        (3, "copyable.cached_tokens", [[1, 2], [3, 4], [5, -6]]),
        (3, "copyable.copied_to", [0, 1, 2]),
        (3, "copyable.takes", [True]),
        (3, "copyable.token_s", -1.0),
        (3, "copyable.link_bytes", None),
        (4, "pool.decodes", [True]),
        (4, "pool.tokens", [1.0, None, 2.0]),
        (4, "pool.busy", [-1.0, 0.0, 0.0]),
        (4, "pool.step_s", [1.0]),
        (4, "pool.changing", 1),
        (4, "pool.elapsed_s", "long"),
        (4, "memory", {"prefill": "much"}),
    ],
)
def test_a_decision_that_cannot_be_is_refused(
    folder: Path, logged: list[Any], kind: int, path: str, value: Any
) -> None:
    file = folder / "log.jsonl"
    file.write_bytes(lines(json.dumps(_with(logged[kind], path, value))))
    with pytest.raises(ReplayError, match=r"log\.jsonl:1: not a logged decision"):
        replay(file, None)


# --- configuration and keys ---

CONFIG = {
    "model": "some/model",
    "workers": ["http://127.0.0.1:8100"],
    "port": 8000,
    "preset": "ares",
    "slo_tpot_s": 0.05,
    "classes": {"chat": {"ttft_s": 1.0, "rank": 1}},
    "api_keys": ["x" * 32],
    "control_key": "y" * 32,
}
_tags = st.sampled_from(
    ["!!timestamp", "!!int", "!!float", "!!binary", "!!set", "!!omap", "!!python/name:os.system", "!x"]
)


@fuzz("readers: configuration", 40, text=warped(CONFIG), tag=st.none() | _tags, value=st.sampled_from(NASTY))
@example(text="5", tag=None, value="")
@example(text="{1: 2}", tag=None, value="")
@example(text="[" * 100_000, tag=None, value="")
@example(text="{}", tag="!!int", value='""')
@example(text="{}", tag="!!timestamp", value="now")
def test_configurations(folder: Path, text: str, tag: str | None, value: str) -> None:
    path = folder / "gateway.yaml"
    path.write_bytes(lines(text if tag is None else f"model: {tag} {value}\nworkers: [a]"))
    attempt(lambda: load(path), ConfigError, "gateway.yaml", "setting", "no such file", "TLS")


@fuzz("readers: configuration", 20, data=noise(yaml.safe_dump(CONFIG).encode()))
def test_bytes_of_configurations(folder: Path, data: bytes) -> None:
    path = folder / "gateway.yaml"
    path.write_bytes(data)
    attempt(lambda: load(path), ConfigError, "gateway.yaml", "setting", "no such file", "TLS")


@fuzz("readers: keys", 100, data=noise(b"# keys\n" + b"k" * 40 + b"\n", b"a" * 64 + b"\n" + b"b" * 64, b""))
def test_keys(folder: Path, data: bytes) -> None:
    path = folder / "key"
    path.write_bytes(data)
    keys = attempt(lambda: read_keys(path), KeyFileError, "key")
    assert keys is None or all(key.strip() for key in keys)
    key = attempt(lambda: read_key(path), KeyFileError, "key")
    if key is not None:
        attempt(lambda: ControlKey(key), KeyFileError, "control key")


# --- prompts ---


@fuzz("readers: prompts", 100, line=warped({"prompt": "Hi"}, {"question": "Hi"}, {"turns": ["Hi", "and?"]}))
@example(line='{"prompt": "\\ud800"}')
@example(line="[" * 100_000)
def test_prompts(folder: Path, line: str) -> None:
    path = folder / "prompts.jsonl"
    path.write_bytes(lines('{"text": "first"}', line))
    read = attempt(lambda: prompts.read([path]), PredictorError, "prompts.jsonl")
    assert read is None or all(prompt.text.strip() for prompt in read)


@fuzz("readers: prompts", 60, data=noise(lines('{"prompt": "Hi"}', '{"text": "x"}'), b"a\nb\n"), text=st.booleans())
def test_bytes_of_prompts(folder: Path, data: bytes, text: bool) -> None:
    path = folder / ("prompts.txt" if text else "prompts.jsonl")
    path.write_bytes(data)
    attempt(lambda: prompts.read([path]), PredictorError, path.name)


# --- instances ---

INSTANCES = [
    b"instances:\n- http://10.0.0.1:8100\n- url: http://[fd00::1]:8100/\n",
    lines(
        "endpoints:",
        '- {name: a, namespace: b, address: "10.0.0.1", port: "8100", labels: {c: d}}',
        "- {name: e, address: f, port: 1}",
    ),
]


@fuzz("readers: files of instances", 60, data=noise(*INSTANCES))
@example(data=b"instances: [http://me:secret@a\xed\xa0\x80:1]")
@example(data=b"instances: !!timestamp now")
@example(data=b"endpoints: [{name: a, address: h, port: 1e999}]")
@example(data=b"a: &a [x, x]\nb: &b [*a, *a]\ninstances: [*b, *b]")
def test_files_of_instances(folder: Path, data: bytes) -> None:
    path = folder / "instances.yaml"
    path.write_bytes(data)

    async def first() -> list[str]:
        states = FileSource("file", path).states()
        try:
            return await anext(states)
        finally:
            await states.aclose()

    attempt(lambda: asyncio.run(first()), SourceError, str(path))
