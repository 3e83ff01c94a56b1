"""The arguments of the application, as they stand in `args:` of a Serve config file."""

import shlex
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ares import config as configuration
from ares.engine import front_end_flags, given_flags, refused_settings
from ares.engine.defaults import DEFAULT_DRAIN_S, gpus_per_instance, is_cpu_build
from ares.protocol.keys import refuse_key_flag
from ares.protocol.messages import Role

# Options of `ares worker` that the application sets, and what a Serve config has for them.
_OURS = {
    "role": "prefill and decode say how many there are of each",
    "model": "the argument model is for all",
    "name": "it is made of role and replica",
    "host": "it is the address of the node in Ray",
    "advertise-host": "it is the address of the node in Ray",
    "port": "a free one is taken",
    "control-port": "a free one is taken",
    "drain-deadline": "give drain_s",
    "simulate": "give simulate",
    "instances": "give prefill and decode",
    "device-ids": "Ray chooses the GPUs",
    "control-key-file": "set ARES_CONTROL_KEY in runtime_env",
}
# Settings of `ares gateway` that its own server or its command has, not the application.
_OF_THE_SERVER = {
    "model": "the argument model is for all",
    "models": "an application serves one model",
    "workers": "instances are found by themselves; others: service_discovery",
    "host": "give http_options",
    "port": "give http_options",
    "processes": "give gateways",
    "tls_certificate": "give http_options",
    "tls_key": "give http_options",
    "max_head_bytes": "Serve reads the heads of requests",
    "idle_timeout_s": "Serve reads the requests",
    "unread_timeout_s": "Serve writes the replies",
    "shutdown_timeout_s": "give drain_s",
}


def _words(value: Any) -> Any:
    return shlex.split(value) if isinstance(value, str) else value


Flags = Annotated[tuple[str, ...], BeforeValidator(_words)]


class Settings(BaseModel):
    """What an application consists of."""

    # What is wrong may be a key.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    model: str = Field(min_length=1)
    """Hugging Face id, or a folder that every node has."""
    prefill: int = Field(default=1, ge=0)
    """Prefill instances; 0 lets decode instances do both."""
    decode: int = Field(default=2, ge=1)
    """Decode instances."""
    gateways: int = Field(default=1, ge=1)
    """Replicas of the gateway."""
    flags: Flags = ()
    """Flags of `ares up`: vLLM's for all instances, and those of its front end for the gateway."""
    prefill_flags: Flags = ()
    """Further ones of prefill instances."""
    decode_flags: Flags = ()
    """And of decode instances."""
    gateway: dict[str, Any] = Field(default_factory=dict)
    """Settings of `ares gateway`, as in its YAML file."""
    simulate: str | None = None
    """Profile of mock engines in place of vLLM."""
    cpus: float = Field(default=1, gt=0)
    """CPUs of an instance that Ray reserves."""
    gpus: float | None = Field(default=None, ge=0)
    """And GPUs; by default what the flags ask for, such as --tensor-parallel-size."""
    per_node: int | None = Field(default=None, ge=1, le=100)
    """Most instances of a role on a node; then Serve uses no placement groups."""
    start_timeout_s: float = Field(default=600, gt=0)
    """How long an instance may take to start."""
    drain_s: float = Field(default=DEFAULT_DRAIN_S, ge=0)
    """How long an instance or a gateway that stops waits for its requests."""
    wait_for_nodes: bool = False
    """Wait for nodes that an autoscaler adds, where those that are there do not suffice."""

    @model_validator(mode="after")
    def _checked(self) -> "Settings":
        every = [*self.flags, *self.prefill_flags, *self.decode_flags]
        if self.prefill_flags and not self.prefill:
            raise ValueError("prefill_flags have no effect with prefill: 0; give decode_flags")
        for name in sorted(given_flags.names(every) & _OURS.keys()):
            raise ValueError(f"--{name} is set by the application: {_OURS[name]}")
        for name in sorted(self.gateway.keys() & _OF_THE_SERVER.keys()):
            raise ValueError(f"gateway: {name} has no effect in Serve: {_OF_THE_SERVER[name]}")
        refuse_key_flag(every)
        for role in ("prefill", "decode"):
            flags = self.instance_flags(role)
            if self.simulate is None:
                refused_settings.check(flags)
            front_end_flags.check(flags, up=True)
        self.gateway_settings()
        return self

    def roles(self) -> list[tuple[str, Role, int]]:
        """Return name, role and number of the instances of each deployment."""
        decode: tuple[str, Role, int] = ("Decode", "decode" if self.prefill else "both", self.decode)
        return [("Prefill", "prefill", self.prefill), decode] if self.prefill else [decode]

    def instance_flags(self, role: Role) -> list[str]:
        """Return the flags of vLLM, or of the mock engine, for an instance."""
        given = front_end_flags.split(given_flags.expand(list(self.flags)))
        own = self.prefill_flags if role == "prefill" else self.decode_flags
        return [*given.instance_flags(mock=self.simulate is not None), *given_flags.expand(list(own))]

    def worker_arguments(self, role: Role) -> list[str]:
        """Return the arguments of `ares worker`, without its name and addresses."""
        simulated = ["--simulate", self.simulate] if self.simulate is not None else []
        return ["--model", self.model, *simulated, *self.instance_flags(role)]

    def instance_gpus(self, role: Role) -> float:
        """Return the GPUs of an instance."""
        if self.gpus is not None:
            return self.gpus
        return 0 if self.simulate is not None or is_cpu_build() else gpus_per_instance(self.instance_flags(role))

    def gateway_settings(self) -> dict[str, Any]:
        """Return the settings of `ares gateway`; ValueError where one is wrong."""
        front_end = front_end_flags.split(given_flags.expand(list(self.flags))).settings
        for name in front_end.keys() & self.gateway.keys():
            raise ValueError(f"gateway: {name} is given by flags, too")
        given = {"model": self.model, **front_end, **self.gateway}
        try:
            configuration.load(**{"service_discovery": ["api"], **given})
        except configuration.ConfigError as error:
            raise ValueError(f"gateway: {error}") from None
        return given
