"""Load the parsers that a gateway's flags name. vLLM and torch are imported only where one is named."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from ares import extras
from ares.config import ConfigError, GatewayConfig

if TYPE_CHECKING:
    from ares.gateway.openai.parsing import Parsers


def load(config: GatewayConfig, folder: Path) -> "Parsers | None":
    """Load the parsers of a gateway; None where its flags name none.

    Takes seconds and about 600 MB of memory: torch comes with vLLM.

    Parameters
    ----------
    folder
        Folder of the served model, for its tokenizer and its configuration.

    Raises
    ------
    ConfigError
        vLLM has no such parser, or it does not fit the model.
    MissingPackageError
        vLLM is not installed.
    """
    if config.tool_call_parser is None and config.reasoning_parser is None:
        return None
    extras.require("vllm")
    from ares.parsers import vllm_api
    from ares.parsers.chat import ChatParsers

    for path, load_plugin in (
        (config.tool_parser_plugin, vllm_api.ToolParserManager.import_tool_parser),
        (config.reasoning_parser_plugin, vllm_api.ReasoningParserManager.import_reasoning_parser),
    ):
        if path is not None:
            if not path.is_file():  # vLLM logs it, and has no parser
                raise ConfigError(f"{path}: no such file")
            load_plugin(str(path))
    _check("--tool-call-parser", config.tool_call_parser, vllm_api.tool_parsers())
    _check("--reasoning-parser", config.reasoning_parser, vllm_api.reasoning_parsers())
    return ChatParsers(config, folder)


def _check(flag: str, name: str | None, known: Collection[str]) -> None:
    if name is not None and name not in known:
        raise ConfigError(f"{flag} {name}: vLLM has no such parser; it has {', '.join(sorted(known))}")
