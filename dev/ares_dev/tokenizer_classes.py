"""The table of transformers' tokenizer classes: gateway/openai/tokenizer_classes.json, from the installed version."""

import json
from pathlib import Path
from typing import Any

import ares

FILE = Path(ares.__file__).parent / "gateway/openai/tokenizer_classes.json"


def table() -> dict[str, Any]:
    """Return which class each model type has, which model types name a wrong one, and the names of all classes.

    Source: transformers, models/auto/tokenization_auto.py.
    """
    import transformers
    from transformers.models.auto import tokenization_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    classes = {
        kind: name.removesuffix("Fast")
        for kind, name in sorted(auto.TOKENIZER_MAPPING_NAMES.items())
        # A model type without a configuration counts as none.
        if name is not None and kind in CONFIG_MAPPING_NAMES
    }
    # What it is without mistral_common; with it, these are other tokenizers where there is a tekken.json.
    mistral = ("ministral", "ministral3", "mistral", "mistral3", "mixtral", "pixtral", "voxtral", "voxtral_realtime")
    classes |= {kind: "MistralCommonBackend" for kind in mistral if kind in classes}
    names = {name.removesuffix("Fast") for name in dir(transformers) if name.endswith(("Tokenizer", "TokenizerFast"))}
    return {
        "transformers": transformers.__version__,
        "classes": classes,
        "wrongly_named": sorted(auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS & set(CONFIG_MAPPING_NAMES)),
        "names": sorted(names | {*classes.values()}),
    }


def command() -> None:
    """Write the table of the installed transformers."""
    FILE.write_text(json.dumps(table(), indent=1) + "\n")
