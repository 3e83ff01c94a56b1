"""The gateway's configuration, resolved once: a YAML file, then `ARES_*` variables, then flags; later ones win."""

import logging
import urllib.parse
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from ares import plugins, variables
from ares.addresses import on_loopback
from ares.objectives import DEFAULT_GAP_S, Gap, ServiceClass
from ares.policy import PRESETS, Preset
from ares.protocol.keys import ControlKey, clean

logger = logging.getLogger(__name__)


class ConfigError(ValueError):
    """The configuration is wrong; the message names the setting."""


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
    served_model_name: list[str] = Field(default_factory=list)
    """Names that clients call the model by, the first one in replies; by default `model`."""
    workers: list[str] = Field(min_length=1, examples=[["http://10.0.0.1:8100", "http://10.0.0.2:8100"]])
    """Base URLs of the instances."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
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
    classes: dict[str, ServiceClass] = Field(default_factory=dict, examples=[{"chat": {"ttft_s": 2, "rank": -1}}])
    """Classes of service by name; a request names its own in the header `x-ares-class`."""
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
    cooldown_s: float | None = Field(default=None, ge=0)
    """The policy does not move a request again for this long; by default its own `cooldown_s`, or 3 s."""
    commanded_cooldown_s: float = Field(default=60.0, ge=0)
    """And one that was moved by command (`ares migrate`) for this long, unless it must leave its instance."""
    handover_timeout_s: float = Field(default=10.0, gt=0, le=20)
    """Longest hand-over; well inside the KV lease of 30 s."""
    shutdown_timeout_s: float = Field(default=30.0, ge=0)
    """Seconds that running requests have to finish when the gateway is told to stop."""
    maximum_attempts: int = Field(default=3, gt=0)
    """Losses of its instance that a request survives, and instances that are tried for each step of its way."""
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
    tls_certificate: Path | None = None
    """PEM file of the certificate chain to serve with; with it, the gateway speaks TLS only."""
    tls_key: Path | None = None
    """PEM file of its private key."""

    @field_validator("workers")
    @classmethod
    def _urls(cls, value: list[str]) -> list[str]:
        for url in value:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                raise ValueError(f"{url!r} is not the URL of an instance, such as http://127.0.0.1:8100")
            if parts.path.rstrip("/").endswith("/v1") or parts.query or parts.fragment:
                raise ValueError(f"{url!r}: give the URL of the instance itself, such as http://127.0.0.1:8100")
        return value

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

    class Resolved(GatewayConfig):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            variable_settings = variables.Variables(settings_cls, wanted)
            return init_settings, variable_settings, YamlConfigSettingsSource(settings_cls, yaml_file=file)

    if file is not None and not file.is_file():
        raise ConfigError(f"{file}: no such file")
    wanted = {name: value for name, value in flags.items() if value is not None}
    for warning in variables.warnings(GatewayConfig.model_fields, wanted):
        logger.warning("%s", warning)
    try:
        return Resolved(**wanted)
    except ValidationError as error:
        # Not `from error`: pydantic's own text shows what was given, which may be a key.
        raise ConfigError(_message(error.errors()[0], file, wanted)) from None
    except SettingsError as error:  # of a variable, which the cause names
        raise ConfigError(str(error.__cause__ or error)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: {error}") from error
    # PyYAML raises anything on a scalar that its tag does not fit, such as `!!timestamp now`.
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: should be lines such as `port: 8000` ({error})") from error


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
