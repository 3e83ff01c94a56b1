"""What the instances run with, and whether that fits together: versions, model runner, parallelism, KV cache."""

from collections.abc import Callable
from dataclasses import dataclass

from ares.check.instances import Found
from ares.check.rows import Outcome, Row, listed
from ares.engine import vllm_version
from ares.gateway.openai.requests import unmovable_parameters
from ares.gateway.pool import compatibility
from ares.gateway.pool.compatibility import Decides
from ares.protocol.fields import CARRIES_STRUCTURED_OUTPUTS_AFTER_REASONING

GROUP = "configuration"
_RESTART = "start all instances with the same value"


@dataclass(frozen=True, slots=True)
class _Setting:
    """A setting that instances report.

    Attributes
    ----------
    name
        How the report calls it.
    read
        Returns an instance's value; empty where it does not report it.
    unequal
        The outcome where instances have different values.
    advice
        What to do then.
    """

    name: str
    read: Callable[[Found], str]
    unequal: Outcome
    advice: str


def _reported(name: str) -> Callable[[Found], str]:
    return lambda found: found.hello.configuration.get(name, "")


def _compared(setting: compatibility.Setting) -> _Setting:
    """Return a setting that gateways compare instances by."""
    seeds = setting.decides is Decides.DRAWS
    advice = f"{_RESTART} ({setting.flag})" + ("; until then requests with a seed do not move" if seeds else "")
    return _Setting(
        setting.name, lambda found: setting.read(found.hello), Outcome.WARN if seeds else Outcome.FAIL, advice
    )


def _version(name: str) -> Callable[[Found], str]:
    return lambda found: found.hello.versions.get(name, "")


# Of an engine without --attention-backend, only its workers know.
_MAY_BE_UNKNOWN = {"attention backend"}
_SETTINGS = (
    _Setting("vLLM", lambda found: found.vllm or _version("vllm")(found), Outcome.FAIL, "install one vLLM everywhere"),
    _Setting("NIXL", _version("nixl"), Outcome.FAIL, "install one NIXL everywhere: its handshake compares versions"),
    _Setting("torch", _version("torch"), Outcome.WARN, "install one torch everywhere: kernels may differ in tokens"),
    _Setting("ARES", _version("ares"), Outcome.WARN, "update them one after the other (docs/operations.md)"),
    *map(_compared, compatibility.SETTINGS),
    _Setting(
        "model folder",
        _reported("model_folder"),
        Outcome.FAIL,
        "put the model at one path everywhere: NIXL's handshake compares it, and else KV is computed again",
    ),
    _Setting("scheduling", _reported("scheduling"), Outcome.WARN, f"{_RESTART} (--async-scheduling)"),
    _Setting(
        "tensor parallel size",
        lambda found: str(found.hello.peer.tp_size),
        Outcome.WARN,
        "supported; sums are split in another way, so that tokens may differ after a move",
    ),
    _Setting("speculative decoding", _reported("speculative_decoding"), Outcome.WARN, f"{_RESTART}"),
    _Setting("LoRA", _reported("lora"), Outcome.WARN, f"{_RESTART} (--enable-lora)"),
)


def rows(found: list[Found]) -> list[Row]:
    """Return a row for each setting, for vLLM's version, and for which requests can be moved."""
    if not found:
        return [Row(GROUP, "all", Outcome.NOT_RUN, "no instance answers")]
    known = [setting for setting in _SETTINGS if any(map(setting.read, found))]
    rows = [_row(setting, found) for setting in known]
    unknown = [setting.name for setting in _SETTINGS if setting not in known and setting.name not in _MAY_BE_UNKNOWN]
    if unknown:
        why = "mock engines have none" if found[0].mock else "not reported: instances of an earlier ARES"
        rows.append(Row(GROUP, ", ".join(unknown), Outcome.NOT_RUN, why))
    return [*rows, _prefix_caching(found), _supported(found), _movable(found)]


def exact(found: list[Found]) -> bool:
    """Whether equal tokens are to be expected of all instances, however they batch requests.

    That is with float32, whose rounding is too small to change a greedy token, and in vLLM's batch-invariant mode.
    """
    if len({each.hello.peer.tp_size for each in found}) > 1:
        return False
    return all(each.mock or _rounds_alike(each.hello.configuration) for each in found)


def _rounds_alike(configuration: dict[str, str]) -> bool:
    return configuration.get("dtype") == "float32" or configuration.get("batch_invariant") == "on"


def _row(setting: _Setting, found: list[Found]) -> Row:
    names: dict[str, list[str]] = {}
    for each in found:
        names.setdefault(setting.read(each), []).append(each.name)
    figures = {name: value for value, of in names.items() for name in of}
    silent = names.pop("", [])
    if len(names) == 1:
        (value,) = names
        missing = f"; not reported by {listed(silent)}" if silent else ""
        return Row(GROUP, setting.name, Outcome.PASS, value + missing, figures=figures)
    value = "; ".join(f"{value}: {listed(of)}" for value, of in names.items())
    return Row(GROUP, setting.name, setting.unequal, value, setting.advice, figures)


def _prefix_caching(found: list[Found]) -> Row:
    check, without = "prefix caching", [each.name for each in found if not each.hello.prefix_caching]
    if not without or found[0].mock:
        return Row(GROUP, check, Outcome.PASS, "off" if without else "on")
    advice = "without it KV cannot be copied ahead of a move, which is then longer: --enable-prefix-caching"
    return Row(GROUP, check, Outcome.WARN, f"off on {listed(without)}", advice)


def _supported(found: list[Found]) -> Row:
    check = "supported vLLM"
    if found[0].mock:
        return Row(GROUP, check, Outcome.NOT_RUN, "mock engines")
    other = [each for each in found if vllm_version.release(each.vllm) not in vllm_version.SUPPORTED]
    supported = " and ".join(f"{major}.{minor}" for major, minor in vllm_version.SUPPORTED)
    if not other:
        return Row(GROUP, check, Outcome.PASS, f"ARES supports {supported}")
    versions = listed(f"{each.vllm or 'unknown'} on {each.name}" for each in other)
    value = f"{versions}; ARES supports {supported}"
    return Row(GROUP, check, Outcome.FAIL, value, "install a supported vLLM")


def _movable(found: list[Found]) -> Row:
    restored = frozenset.intersection(*(frozenset(each.hello.carries) for each in found))
    stay = unmovable_parameters(restored)
    if not any(CARRIES_STRUCTURED_OUTPUTS_AFTER_REASONING in each.hello.carries for each in found):
        # No instance has a reasoning parser: every grammar begins with the output.
        stay.remove("structured_outputs_after_reasoning")
    figures = {"restored": sorted(restored), "unmovable_parameters": stay}
    if not stay:
        return Row(GROUP, "movable requests", Outcome.PASS, "all", figures=figures)
    value = f"all but those with {listed(stay, len(stay))}"
    if found[0].mock:
        return Row(GROUP, "movable requests", Outcome.PASS, f"{value} (mock engines restore no state)", figures=figures)
    return Row(
        GROUP, "movable requests", Outcome.WARN, value, "such requests stay where they are (docs/migration.md)", figures
    )
