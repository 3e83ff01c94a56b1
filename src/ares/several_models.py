"""Several models behind one gateway: which settings each of `models` may have of its own."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

# Only a model's own: for all of them together they would make no sense.
OWN = ("model", "served_model_name", "tokenizer", "record", "decision_log")
# Those beside `models` are for all that do not have their own.
OVERRIDING = (
    "chat_template",
    "chat_template_content_format",
    "default_chat_template_kwargs",
    "response_role",
    "generation_config",
    "override_generation_config",
    "max_logprobs",
    "tool_call_parser",
    "reasoning_parser",
    "tool_parser_plugin",
    "reasoning_parser_plugin",
    "enable_auto_tool_choice",
    "tool_strict_level",
    "exclude_tools_when_tool_choice_none",
    "maximum_prompt_tokens",
    "maximum_waiting",
    "maximum_waiting_tokens",
    "maximum_wait_s",
    "slo_ttft_s",
    "slo_tpot_s",
    "slo_gap_s",
)


def with_first(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given settings with the first of `models` as `model`.

    Raises
    ------
    ValueError
        An entry has no model or a setting that cannot be its own, or a setting beside them has no effect.
    """
    models = given.get("models", [])
    if not isinstance(models, list):
        raise ValueError("models: should be a list of settings, each with a model")
    if not models:
        if "models" in given and not given.get("model"):
            raise ValueError("models: is empty: give it at least one {model: org/name}, or give model instead")
        return dict(given)
    for number, entry in enumerate(models):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str) or not entry["model"]:
            raise ValueError(f"models.{number}: should be settings with a model, such as {{model: org/name}}")
        if unknown := [str(name) for name in entry if name not in (*OWN, *OVERRIDING)]:
            raise ValueError(
                f"models.{number}.{unknown[0]}: no setting that a model can have of its own; those are "
                f"{', '.join((*OWN, *OVERRIDING))}"
            )
    if useless := [name for name in OWN if given.get(name)]:
        raise ValueError(f"{useless[0]} has no effect beside models: give it to one of them")
    return {**given, "model": models[0]["model"]}


def merged(shared: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one model: those of all, with its own in their places."""
    without = {name: value for name, value in shared.items() if name not in OWN and name != "models"}
    return {**without, "served_model_name": [], "tokenizer": None, "record": None, "decision_log": None, **entry}


def refuse_shared(setting: str, values: Sequence[object]) -> None:
    """Refuse what two models have in common, a name or a file; ValueError says which."""
    for value, count in Counter(values).items():
        if count > 1:
            raise ValueError(f"models: two of them have the {setting} {value}; each needs one of its own")
