"""The tables of docs/api.md: fields of requests and flags of vLLM, from the code that takes or refuses them."""

from pathlib import Path
from typing import Annotated

import typer

from ares.engine.front_end_flags import FLAGS, Place
from ares.engine.refused_settings import REFUSED
from ares.gateway.openai import unsupported
from ares.gateway.openai.requests import ChatRequest, CompletionRequest

_PLACES = {
    Place.GATEWAY: "the gateway",
    Place.BOTH: "gateway and instances",
    Place.INSTANCE: "the instances",
    Place.SERVER: "an instance's HTTP server (`ares worker`)",
    Place.COMMAND: "an option of `ares` itself, or set by it",
    Place.NOWHERE: "refused",
}


def filled(page: str) -> str:
    """Return the page with every table updated; ValueError where it has no place for one."""
    tables = {
        "honoured": _honoured(),
        "refused": _refused(),
        "without effect": _without_effect(),
        "flags": _flags(),
        "settings": _settings(),
    }
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", "<!-- end -->"
        if begin not in page:
            raise ValueError(f"docs/api.md has no place {begin}")
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return page


def _honoured() -> str:
    chat, text = ChatRequest.model_fields.keys(), CompletionRequest.model_fields.keys()
    groups = {"both routes": chat & text, "chats": chat - text, "completions": text - chat}
    left_out = unsupported.WITHOUT_EFFECT.keys()
    rows = [f"| {where} | {_listed(sorted(names - left_out))} |" for where, names in groups.items()]
    return "\n".join(["| of | fields |", "|---|---|", *rows])


def _refused() -> str:
    known = ChatRequest.model_fields.keys() & CompletionRequest.model_fields.keys()
    by_reason: dict[str, list[str]] = {}
    for name in unsupported.refused():
        if name not in known:
            by_reason.setdefault(unsupported.instead(name), []).append(name)
    rows = [f"| {_listed(names)} | {reason} |" for reason, names in sorted(by_reason.items(), key=lambda item: item[1])]
    return "\n".join(["| field | instead |", "|---|---|", *rows])


def _without_effect() -> str:
    rows = [f"| `{name}` | {why} |" for name, why in sorted(unsupported.WITHOUT_EFFECT.items())]
    return "\n".join(["| field | in vLLM |", "|---|---|", *rows])


def _flags() -> str:
    rows = []
    for place, where in _PLACES.items():
        by_reason: dict[str, list[str]] = {}
        for name, flag in sorted(FLAGS.items()):
            if flag.place is place:
                by_reason.setdefault(flag.instead, []).append(f"--{name}")
        rows += [f"| {_listed(names)} | {where} | {reason} |" for reason, names in by_reason.items()]
    return "\n".join(["| flag | acts on | for `ares up`, where it is refused |", "|---|---|---|", *rows])


def _settings() -> str:
    by_reason: dict[str, list[str]] = {}
    for name, refused in sorted(REFUSED.items()):
        taken = [value for value in refused.taken if value != "None"]
        names = f"--{name}" + (f" (but {' and '.join(taken)})" if taken else "")
        by_reason.setdefault(refused.why, []).append(names)
    rows = [f"| {_listed(names)} | {reason} |" for reason, names in by_reason.items()]
    return "\n".join(["| setting | why, and what to do |", "|---|---|", *rows])


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def command(page: Annotated[Path, typer.Argument(help="The page to fill.")] = Path("docs/api.md")) -> None:
    """Update the tables of docs/api.md, from the code that takes fields and flags."""
    page.write_text(filled(page.read_text()))
