"""What is given to vLLM: flags of the command line and of the file of `--config`, in one list, in vLLM's order.

vLLM reads such a file while it parses its flags (utils/argparse_utils.py, 0.32). Our defaults, and what is refused
before vLLM is imported, need to know what stands there: all `ares` commands that start instances put it in its place.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ares.text_files import TextFileError, read_text
from ares.yaml_text import MALFORMED, YamlError, parse

_SUFFIXES = (".yaml", ".yml")
_LINES = "should be lines such as `max-model-len: 4096`"
# Flags of vLLM that are options of the `ares` commands: on a command line they are taken there.
_OPTIONS = ("config", "host", "model", "port")
# Switches that have no form `--no-NAME`; all others have one.
_ONLY_ON = {
    "aggregate-engine-logging",
    "data-parallel-multi-port-external-lb",
    "disable-log-stats",
    "grpc",
    "headless",
}
_SHORT = {
    "-ac": "attention-config",
    "-asc": "api-server-count",
    "-cc": "compilation-config",
    "-dc": "diffusion-config",
    "-dcp": "decode-context-parallel-size",
    "-dp": "data-parallel-size",
    "-dpa": "data-parallel-address",
    "-dpb": "data-parallel-backend",
    "-dpe": "data-parallel-external-lb",
    "-dph": "data-parallel-hybrid-lb",
    "-dpl": "data-parallel-size-local",
    "-dpm": "data-parallel-multi-port-external-lb",
    "-dpn": "data-parallel-rank",
    "-dpp": "data-parallel-rpc-port",
    "-dpr": "data-parallel-start-rank",
    "-ep": "enable-expert-parallel",
    "-n": "nnodes",
    "-pcp": "prefill-context-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-q": "quantization",
    "-r": "node-rank",
    "-sc": "speculative-config",
    "-tp": "tensor-parallel-size",
}
_OPTIMIZATION = "-O"


class FlagFileError(ValueError):
    """The file of `--config` cannot be used; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class GivenFlag:
    """One flag.

    Attributes
    ----------
    name
        Its long name, with dashes, without those before it, and without the keys of ``NAME.KEY``.
    value
        The first word of its value; of a switch, whatever follows it.
    on
        False for ``--no-NAME``.
    """

    name: str
    value: str
    on: bool = True


def expand(flags: Sequence[str]) -> list[str]:
    """Return flags with those of the file of ``--config`` before all others: of two, vLLM takes the last.

    Raises
    ------
    FlagFileError
        There is no such file, it is not what it should be, or several are given.
    """
    files: list[str] = []
    others: list[str] = []
    words = iter(flags)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--config":
            files.append(value if equals else next(words, ""))
        else:
            others.append(word)
    if len(files) > 1:
        raise FlagFileError(f"--config is given {len(files)} times: put all flags into one file")
    return [*(_flags_of(files[0]) if files else []), *others]


def each(flags: Sequence[str]) -> Iterator[GivenFlag]:
    """Yield what is given; names that are shortened to a beginning, which vLLM takes too, stay as they are."""
    for number, word in enumerate(flags):
        text, equals, value = word.partition("=")
        value = value if equals else next(iter(flags[number + 1 :]), "")
        if text.startswith("--"):
            name = text[2:].split(".")[0].replace("_", "-")
            on = not name.startswith("no-")
            yield GivenFlag(name if on else name[3:], value, on)
        elif text.startswith("-") and (long := _SHORT.get(text.split(".")[0])) is not None:
            yield GivenFlag(long, value)
        elif text.startswith(_OPTIMIZATION):
            yield GivenFlag("optimization-level", text[2:] or value)


def names(flags: Sequence[str]) -> set[str]:
    """Return the long names of the flags that are given, on or off."""
    return {given.name for given in each(flags)}


def _flags_of(file: str) -> list[str]:
    """Return the flags of a file as vLLM makes them (`FlexibleArgumentParser.load_config_file`, 0.32)."""
    if not file or file.startswith("--"):
        raise FlagFileError("--config: expected a YAML file of vLLM's flags")
    if not file.endswith(_SUFFIXES):
        raise FlagFileError(f"--config {file}: expected a file whose name ends in .yaml or .yml")
    try:
        read: Any = parse(read_text(Path(file)))
    except TextFileError as error:
        raise FlagFileError(f"--config {error}") from None
    except YamlError as error:
        raise FlagFileError(f"--config {file}: {error}") from None
    except MALFORMED as error:
        raise FlagFileError(f"--config {file}: {_LINES} ({' '.join(str(error).split())})") from None
    if not isinstance(read, dict) or not all(isinstance(name, str) for name in read):
        raise FlagFileError(f"--config {file}: {_LINES}")
    if (twice := _given_twice(read)) is not None:
        raise FlagFileError(f"--config {file}: {twice} is given twice: leave one out")
    for name in read:
        if name in _OPTIONS:
            raise FlagFileError(f"--config {file}: {name}: leave it out, and give --{name} to the `ares` command")
    flags = []
    for name, value in read.items():
        try:
            flags += _words(name, value)
        except MALFORMED as error:  # JSON has no dates
            raise FlagFileError(f"--config {file}: {name}: {error}") from None
    return flags


def _given_twice(names: Iterable[str]) -> str | None:
    """Return a name that is given with dashes and with underscores: vLLM would drop the first."""
    seen: set[str] = set()
    for name in names:
        dashed = name.replace("_", "-")
        if dashed in seen:
            return name
        seen.add(dashed)
    return None


def _words(name: str, value: object) -> list[str]:
    flag = f"--{name}"
    if value is True:
        return [flag]
    if value is False:
        dashed = name.replace("_", "-")
        return [] if dashed in _ONLY_ON else [f"--no-{name}"]
    if isinstance(value, list):
        return [flag, *map(str, value)] if value else []
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
