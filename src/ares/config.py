"""The gateway's configuration, resolved once: a YAML file, then `ARES_*` variables, then flags; later ones win."""

import logging
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from ares import plugins, several_models, variables
from ares.addresses import on_loopback
from ares.instance_sources import check_url, parse_source
from ares.logs import Format, Level
from ares.objectives import DEFAULT_GAP_S, Gap, ServiceClass
from ares.otlp import traces_url
from ares.policy import PRESETS, Preset
from ares.policy.roles import PressureSettings
from ares.policy.settings import make_settings
from ares.protocol.keys import ControlKey, clean
from ares.resolved_settings import resolve

logger = logging.getLogger(__name__)


class ConfigError(ValueError):
    """The configuration is wrong; the message names the setting."""


_Name = Annotated[str, Field(min_length=1)]
# Live moves take fractions of a second, so that the cooldown is shorter than the default of the policies.
_LIVE_COOLDOWN_S = 3.0


def live_preset(name: str, settings: Collection[str] = ()) -> Preset:
    """Return a preset by its name or file, with settings replaced.

    Raises
    ------
    ValueError
        It is not known, or wrong, or needs to know the future.
    """
    chosen = plugins.preset(name, settings, {"cooldown_s": _LIVE_COOLDOWN_S})
    if chosen.knows_lengths:
        live = ", ".join(known for known, one in PRESETS.items() if not one.knows_lengths)
        raise ValueError(f"preset {name!r} knows the true lengths, which only a simulation does; live: {live}")
    return chosen


def check_policies(files: Collection[Path | str], chosen: Preset, name: str) -> None:
    """Refuse files with policies that a preset uses none of; ValueError says what to give."""
    if files and not plugins.from_file([chosen]):
        raise ValueError(f"{name} uses no policy of --policy: give a preset file that names one")
    if plugins.from_file([chosen]):
        chosen.make()  # raises what is wrong with it


class GatewayConfig(BaseSettings):
    """The settings of a gateway."""

    model_config = SettingsConfigDict(env_prefix=variables.PREFIX, extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(min_length=1)
    """Hugging Face id or folder of the served model: its tokenizer and chat template are read."""
    models: list[dict[str, Any]] = Field(
        default_factory=list, examples=[[{"model": "org/one"}, {"model": "org/two", "served_model_name": ["two"]}]]
    )
    """In place of `model`: several models, each with settings of its own (docs/several-models.md)."""
    served_model_name: list[_Name] = Field(default_factory=list)
    """Names that clients call the model by, the first one in replies; by default `model`."""
    tokenizer: str | None = Field(default=None, min_length=1)
    """Hugging Face id or folder of the tokenizer, where it is not that of `model`."""
    chat_template: str | None = Field(default=None, examples=["template.jinja"])
    """File of the chat template, or its text, or the name of one of the model's; by default the model's own."""
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    """Whether chat templates get content as text or as parts; by default what each takes."""
    default_chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, examples=[{"enable_thinking": False}])
    """Variables of the chat template where a request sets none."""
    trust_request_chat_template: bool = False
    """Whether requests may bring chat templates: programs that run here, and may not end."""
    response_role: str = Field(default="assistant", min_length=1)
    """Role of the answers in a chat."""
    generation_config: str = "auto"
    """Sampling parameters where a request sets none: `auto`, the model's own; `vllm`, none; or those of a folder."""
    override_generation_config: dict[str, Any] = Field(default_factory=dict, examples=[{"temperature": 0.6}])
    """Sampling parameters that replace those of `generation_config`."""
    max_logprobs: int = Field(default=20, ge=-1)
    """Most log probabilities of a token that a request may ask for; -1: the vocabulary."""
    return_tokens_as_token_ids: bool = False
    """Whether log probabilities name tokens by their ids where a request does not say."""
    enable_force_include_usage: bool = False
    """Whether every stream has the usage, in each chunk and at its end."""
    enable_prompt_tokens_details: bool = False
    """Whether the usage says how many tokens of the prompt the prefill instance had cached."""
    sse_keep_alive_interval: float = Field(default=0, ge=0)
    """Seconds after which a comment is sent in a stream without an event; 0: none."""
    allowed_origins: list[str] = Field(default_factory=list, examples=[["https://chat.example.com"]])
    """Origins of web pages that may call the `/v1` routes."""
    allowed_methods: list[str] = Field(default_factory=lambda: ["*"], examples=[["GET", "POST"]])
    """Methods that they may use."""
    allowed_headers: list[str] = Field(default_factory=lambda: ["*"], examples=[["Authorization"]])
    """Headers that they may send."""
    allow_credentials: bool = False
    """Whether they may send cookies and the like."""
    disable_fastapi_docs: bool = False
    """Whether there is no `/docs` and no `/openapi.json`."""
    workers: list[str] = Field(default_factory=list, examples=[["http://10.0.0.1:8100", "http://10.0.0.2:8100"]])
    """Base URLs of the instances that are known from the start."""
    service_discovery: list[str] = Field(default_factory=list, examples=[["file:/etc/ares/instances.yaml"]])
    """Sources of instances that come and go, each `KIND:WHERE` (docs/discovery.md)."""
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to serve on; 0.0.0.0 is every address of this host."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to serve on; 0 takes a free one."""
    processes: int = Field(default=1, ge=1, le=64)
    """Processes that serve the address together (docs/operations.md), as many as cores are to be used."""
    policies: list[Path] = Field(default_factory=list, validate_default=True, examples=[["my_policy.py"]])
    """Files with policies of one's own (docs/write-a-policy.md): Python that the gateway runs."""
    preset: str = Field(default="ares", validate_default=True)
    """Policy preset, a name or a YAML file: how requests are placed and when they move."""
    settings: list[str] = Field(default_factory=list, examples=[["rebalance.theta=0.2"]])
    """Settings of the preset's policies that replace its own."""
    slo_ttft_s: float = Field(default=20.0, gt=0)
    """Objective for the time to first token: a request that waits longer comes after all that can still meet theirs."""
    slo_tpot_s: float | None = Field(default=None, gt=0)
    """Objective for the time of each further token; by default one and a half times a step at full memory."""
    slo_gap_s: Gap = DEFAULT_GAP_S
    """Objective for the longest gap of a stream; "none": a suspension may last as long as the others allow."""
    classes: dict[_Name, ServiceClass] = Field(default_factory=dict, examples=[{"chat": {"ttft_s": 2, "rank": -1}}])
    """Classes of service by name; a request names its own in the header `x-ares-class`."""
    tool_call_parser: str | None = Field(default=None, examples=["hermes"])
    """Parser of vLLM that finds tool calls (docs/reasoning-and-tools.md); needs vLLM on this host."""
    reasoning_parser: str | None = Field(default=None, examples=["qwen3"])
    """Parser of vLLM that splits the reasoning off; needs vLLM on this host."""
    tool_parser_plugin: Path | None = Field(default=None, examples=["my_parser.py"])
    """Python file that the gateway runs: it registers a tool parser of one's own, as vLLM's flag of the same name."""
    reasoning_parser_plugin: Path | None = Field(default=None, examples=["my_parser.py"])
    """And one that registers a reasoning parser."""
    enable_auto_tool_choice: bool = False
    """Let the model choose whether it calls tools: `tool_choice` "auto", the default where tools are given."""
    tool_strict_level: Literal["auto", "function", "parameter"] = "auto"
    """How far the grammar holds tool calls to their schemas, as vLLM's flag of the same name."""
    exclude_tools_when_tool_choice_none: bool = False
    """Leave the tools out of the prompt where `tool_choice` is "none"."""
    maximum_waiting: int = Field(default=2048, gt=0)
    """Requests that may wait outside decode; more are refused with 503 and Retry-After."""
    maximum_waiting_tokens: int | None = Field(default=None, gt=0)
    """Tokens that they may bring and be expected to generate; by default 16 times the KV of the decode instances."""
    maximum_wait_s: float = Field(default=600.0, gt=0)
    """A request that found no room for this long fails."""
    decision_log: Path | None = None
    """File to which every decision is appended as a JSON line, for `ares replay`."""
    record: Path | None = None
    """Folder for a recording of the run (requests.jsonl, meta.json), which the simulator can replay."""
    period_s: float = Field(default=0.5, gt=0)
    """Seconds between two rebalancing decisions."""
    telemetry_interval_s: float = Field(default=0.1, gt=0)
    """Seconds between two reports of an instance."""
    role_planner: Literal["off", "advise", "act"] = "off"
    """Whether the roles of instances are planned by their load (docs/roles.md): `advise` only says what to change."""
    role_planner_settings: dict[str, float] = Field(default_factory=dict, examples=[{"cooldown_s": 60}])
    """Settings of the planner that replace its own."""
    cooldown_s: float | None = Field(default=None, ge=0)
    """The policy does not move a request again for this long; by default 3 s, or what the preset's settings say."""
    commanded_cooldown_s: float = Field(default=60.0, ge=0)
    """And one that was moved by command (`ares migrate`) for this long, unless it must leave its instance."""
    handover_timeout_s: float = Field(default=10.0, gt=0, le=20)
    """Longest hand-over; well inside the KV lease of 30 s."""
    shutdown_timeout_s: float = Field(default=30.0, ge=0)
    """Seconds that running requests have to finish when the gateway is told to stop."""
    maximum_attempts: int = Field(default=3, gt=0)
    """Losses of its instance that a request survives, and one more for each 64 tokens that it generates after one; and
    instances that are tried for one prefill, or one start of decoding."""
    max_body_bytes: int = Field(default=8 << 20, gt=0)
    """Largest request body."""
    max_head_bytes: int = Field(default=32 << 10, gt=0)
    """Largest request line with all headers; a larger one is answered with 431."""
    idle_timeout_s: float = Field(default=60.0, gt=0)
    """A client that takes longer for a head, or between two parts of a body, is cut off."""
    unread_timeout_s: float = Field(default=60.0, gt=0)
    """A client that does not read its stream for so long is cut off, and its request aborted."""
    maximum_prompt_tokens: int | None = Field(default=None, gt=0)
    """Longest prompt; by default what the model takes."""
    maximum_streams_per_key: int | None = Field(default=None, gt=0)
    """Sequences (prompts times `n`) that may run for one of the `api_keys` at a time; more get 429 and Retry-After."""
    admin_key: SecretStr | None = None
    """Key for the admin routes; without one they answer to loopback only."""
    api_keys: list[SecretStr] = Field(default_factory=list, examples=[["KEY", "ANOTHER KEY"]])
    """Keys of clients, any of which will do; without one nobody needs a key."""
    protect_metrics: bool = False
    """Whether `/metrics` needs a client's key too."""
    control_key: SecretStr | None = None
    """Key that the instances' control channels ask for (docs/security.md)."""
    worker_api_key: SecretStr | None = None
    """Key that the instances' HTTP servers ask for: vLLM's --api-key."""
    log_format: Format = "text"
    """Whether the log has lines of text or of JSON."""
    log_level: Level = "info"
    """The lowest level that is logged."""
    access_log: bool = False
    """Whether every request is logged when it has ended."""
    otlp_traces_endpoint: str | None = Field(default=None, examples=["http://127.0.0.1:4318/v1/traces"])
    """Collector of OpenTelemetry that gets a trace of every request, by OTLP over HTTP (docs/tracing.md)."""
    tls_certificate: Path | None = None
    """PEM file of the certificate chain to serve with; with it, the gateway speaks TLS only."""
    tls_key: Path | None = None
    """PEM file of its private key."""

    @model_validator(mode="before")
    @classmethod
    def _first_model(cls, given: dict[str, Any]) -> dict[str, Any]:
        return several_models.with_first(given)

    @field_validator("served_model_name")
    @classmethod
    def _different(cls, value: list[str]) -> list[str]:
        for name, count in Counter(value).items():
            if count > 1:
                raise ValueError(f"{name} stands there twice")
        return value

    @field_validator("workers")
    @classmethod
    def _urls(cls, value: list[str]) -> list[str]:
        return [check_url(url) for url in value]

    @field_validator("service_discovery")
    @classmethod
    def _sources(cls, value: list[str]) -> list[str]:
        return list(dict.fromkeys(parse_source(text).text for text in value))

    @field_validator("role_planner_settings")
    @classmethod
    def _planned(cls, value: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        if value and info.data.get("role_planner") == "off":
            raise ValueError("they have no effect while role_planner is off")
        make_settings(PressureSettings, value)
        return value

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _collector(cls, value: str | None) -> str | None:
        return traces_url(value) if value is not None else None

    @model_validator(mode="after")
    def _some_instances(self) -> "GatewayConfig":
        if not self.workers and not self.service_discovery:
            raise ValueError(
                "no instances: give --worker, ARES_WORKERS, or workers: in a --config file; or let the gateway find "
                "them, with --service-discovery (docs/discovery.md)"
            )
        return self

    @model_validator(mode="after")
    def _each_model(self) -> "GatewayConfig":
        found = self.of_models() if self.models else []
        for name, values in (
            ("name", [name for one in found for name in one.names]),
            ("record", [one.record for one in found if one.record]),
            ("decision_log", [one.decision_log for one in found if one.decision_log]),
        ):
            several_models.refuse_shared(name, values)
        return self

    @field_validator("admin_key", "worker_api_key")
    @classmethod
    def _clean(cls, value: SecretStr | None) -> SecretStr | None:
        return _cleaned(value) if value is not None else None

    @field_validator("api_keys")
    @classmethod
    def _all_clean(cls, value: list[SecretStr]) -> list[SecretStr]:
        return [_cleaned(key) for key in value]

    @field_validator("control_key")
    @classmethod
    def _long(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            ControlKey(value.get_secret_value())
        return value

    @model_validator(mode="after")
    def _whole_tls(self) -> "GatewayConfig":
        files = [self.tls_certificate, self.tls_key]
        if any(files) and not all(files):
            raise ValueError("TLS needs both tls_certificate and tls_key")
        for file in files:
            if file is not None and not file.is_file():
                raise ValueError(f"{file}: no such file")
        return self

    @model_validator(mode="after")
    def _whole_parsers(self) -> "GatewayConfig":
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ValueError("--enable-auto-tool-choice requires --tool-call-parser")
        if self.tool_call_parser is not None and not self.enable_auto_tool_choice:
            raise ValueError("--tool-call-parser has no effect without --enable-auto-tool-choice, as in vLLM")
        if self.tool_strict_level != "auto" and self.tool_call_parser is None:
            raise ValueError("--tool-strict-level has no effect without --tool-call-parser")
        for name, plugin in (("reasoning", self.reasoning_parser_plugin), ("tool", self.tool_parser_plugin)):
            parser = f"{name}_call_parser" if name == "tool" else f"{name}_parser"
            if plugin is not None and getattr(self, parser) is None:
                raise ValueError(f"--{name}-parser-plugin has no effect without --{parser.replace('_', '-')}")
        return self

    @field_validator("chat_template")
    @classmethod
    def _template_text(cls, value: str | None) -> str | None:
        # As vLLM takes it (renderers/chat_utils.py): a file, or text that is no name of a file.
        if value is None or any(character in value for character in "{}\n"):
            return value
        file = Path(value).expanduser()
        if not file.is_file():
            # The name of one of the model's templates is known to the gateway alone.
            if "/" in value or "." in value:
                raise ValueError(f"{value}: no such file")
            return value
        return file.read_text(encoding="utf-8")

    @model_validator(mode="after")
    def _whole_generation_config(self) -> "GatewayConfig":
        if self.generation_config not in ("auto", "vllm"):
            file = Path(self.generation_config).expanduser() / "generation_config.json"
            if not file.is_file():
                raise ValueError(
                    f"generation_config {self.generation_config}: give auto, vllm, or a folder with {file.name}"
                )
        return self

    @property
    def names(self) -> list[str]:
        """Names that clients call the model by, the first one for replies."""
        return self.served_model_name or [self.model]

    def of_models(self) -> list["GatewayConfig"]:
        """Return the settings of each model: of the only one, these.

        Raises
        ------
        ValueError
            A setting of one of them is wrong.
        """
        if not self.models:
            return [self]
        shared = {name: getattr(self, name) for name in GatewayConfig.model_fields}
        made = []
        for number, entry in enumerate(self.models):
            try:
                made.append(GatewayConfig(**several_models.merged(shared, entry)))
            except ValidationError as error:
                # Not pydantic's own text, which shows what was given.
                first = error.errors()[0]
                where = ".".join(map(str, ("models", number, *first["loc"])))
                raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
        return made

    def cooldown(self, chosen: Preset) -> float:
        """Return for how many seconds a request that has moved does not move again under a preset."""
        if self.cooldown_s is not None:
            return self.cooldown_s
        return chosen.cooldown_s if chosen.moves else _LIVE_COOLDOWN_S  # for suspended requests, too

    def exposure(self) -> str | None:
        """Return a warning where other hosts can send requests without a key; else None.

        Raises
        ------
        OSError
            The host is no address.
        """
        if self.api_keys or on_loopback(self.host):
            return None
        return (
            f"--host {self.host} without client keys: anyone who reaches port {self.port} of this machine over the "
            "network can send requests; set keys with --api-key-file or ARES_API_KEYS (docs/security.md)"
        )

    @field_validator("preset")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        check_policies(info.data.get("policies", ()), live_preset(value), value)
        return value

    @field_validator("policies")
    @classmethod
    def _loadable(cls, value: list[Path]) -> list[Path]:
        plugins.load(value)
        return value

    @field_validator("settings")
    @classmethod
    def _settable(cls, value: list[str], info: ValidationInfo) -> list[str]:
        if "preset" in info.data:
            live_preset(info.data["preset"], value)
        return value


def _cleaned(key: SecretStr) -> SecretStr:
    text = clean(key.get_secret_value())
    if not text:
        raise ValueError("an empty key admits everybody")
    return SecretStr(text)


def load(file: Path | None = None, **flags: Any) -> GatewayConfig:
    """Resolve the configuration.

    Parameters
    ----------
    file
        YAML file with any of the settings.
    flags
        Settings given on the command line; None means not given.

    Raises
    ------
    ConfigError
        A setting is unknown, missing or wrong.
    """
    wanted = {name: value for name, value in flags.items() if value is not None}
    for warning in variables.warnings(GatewayConfig.model_fields, wanted):
        logger.warning("%s", warning)
    return resolve(
        GatewayConfig,
        file,
        wanted,
        refuse=ConfigError,
        explain=lambda error: _message(error, file, wanted),
        example="port: 8000",
        variables=lambda settings: variables.Variables(settings, wanted),
    )


def _message(error: ErrorDetails, file: Path | None, flags: Collection[str]) -> str:
    """Return which setting is wrong, why, and where it was given."""
    name = ".".join(map(str, error["loc"]))
    setting = str(error["loc"][0]) if name else ""
    variable = variables.variable(setting)
    if error["type"] == "missing" and name in GatewayConfig.model_fields:
        flag = name.removesuffix("s")  # of a list, a flag gives one item
        return f"setting {name!r} is missing: give --{flag}, {variable}, or {name}: in a --config file"
    where = f"setting {name!r}" if name else f"{file or 'the configuration'}"
    if setting not in flags and variable in variables.given():
        where += f" ({variable})"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"
