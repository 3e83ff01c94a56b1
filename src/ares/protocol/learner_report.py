"""What a learner reports to the gateways: `PUT /admin/v1/predictor`. Shown to operators; no decision depends on it.

Fields that a gateway does not know, and values of another type, are refused, so that a mistake is found where it is
made. All numbers are finite. Times are seconds since 1970 by the learner's clock.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator

LARGEST_REPORT_BYTES = 1 << 18
NEWEST_LOSSES, NEWEST_EVENTS = 200, 50
LONGEST_NAME, MOST_INSTANCES = 256, 2048

# Kinds of events; a gateway counts others as `other`.
EVENTS = frozenset(
    {"promoted", "demoted", "trained", "rejected", "rolled_back", "frozen", "unfrozen", "refused", "error"}
)


def one_line(text: str) -> str:
    """Return a text for a log or a terminal: one line, without control characters."""
    return "".join(character if character.isprintable() else " " for character in " ".join(text.split()))


Version = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
Name = Annotated[str, Field(pattern=r"\S", max_length=LONGEST_NAME), AfterValidator(one_line)]
Word = Annotated[str, Field(pattern=r"^[a-z0-9_+-]{1,32}$")]
Text = Annotated[str, Field(max_length=2000), AfterValidator(one_line)]
Time = Annotated[FiniteFloat, Field(ge=0, le=1e11)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Loss = Annotated[FiniteFloat, Field(ge=0, le=1e15)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class Predictor(_Part):
    """A champion or a challenger."""

    version: Version
    """SHA-256 of its checkpoint in hexadecimal; empty for a curve, which has none."""
    kind: Literal["network", "curve"]
    """A trained network, or a model-free curve of remaining lengths."""
    trained_outputs: Count
    """Outputs that it was trained on."""
    since: Time
    """When it became what it is."""

    @model_validator(mode="after")
    def _has_a_version(self) -> "Predictor":
        if (self.kind == "network") != bool(self.version):
            raise ValueError("a network has a version, and a curve has none")
        return self


class Outputs(_Part):
    """Recorded outputs."""

    recorded: Count
    """Outputs that are there to train on."""
    needed: Count
    """How many there must be before the next training."""
    dropped: Annotated[dict[Name, Count], Field(max_length=64)] = {}
    """Outputs that were not used, by reason."""


class Losses(_Part):
    """Mean CRPS in tokens of each predictor, on outputs that none of them was trained on."""

    time: Time
    outputs: Count
    """Outputs that were predicted."""
    position: Word
    """Where in the outputs it was predicted; `all` for everywhere."""
    curve: Loss
    champion: Loss | None
    challenger: Loss | None


class Event(BaseModel):
    """What the learner did; numbers of other names may follow."""

    model_config = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)
    __pydantic_extra__: dict[str, FiniteFloat | None]

    time: Time
    event: Word
    """What happened, such as `promoted`, `rejected` or `rolled_back`."""
    version: Version
    text: Text
    """One sentence, with the numbers."""


class Report(_Part):
    """The state of a learner."""

    learner: Name
    """Its name; a newer report replaces the older one of the same name."""
    model: Name
    """The model whose outputs it learns from."""
    time: Time
    frozen: bool
    """Whether it keeps the champion as it is."""
    champion: Predictor
    challenger: Predictor | None
    doing: Annotated[str, Field(pattern=r"\S", max_length=64), AfterValidator(one_line)]
    """What it does now, such as `collecting`, `training` or `trial`."""
    outputs: Outputs
    losses: Annotated[list[Losses], Field(max_length=NEWEST_LOSSES)] = []
    """The newest ones, the newest last."""
    instances: Annotated[dict[Name, Version], Field(max_length=MOST_INSTANCES)] = {}
    """The version that each instance runs, as the learner knows it."""
    events: Annotated[list[Event], Field(max_length=NEWEST_EVENTS)] = []
    """The newest ones, the newest last."""

    @property
    def newest_losses(self) -> dict[str, Losses]:
        """The newest losses of each position."""
        return {losses.position: losses for losses in self.losses}

    def as_json(self) -> dict[str, Any]:
        """Return what it was made from."""
        return self.model_dump()
