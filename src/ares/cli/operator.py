"""The operator's commands: `ares status`, `migrate`, `drain`, `undrain`, `role`, `preset` and `replay`."""

import http.client
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import SpinnerColumn, TextColumn
from rich.table import Table

from ares.cli import operator_learners, operator_tables
from ares.protocol.keys import KeyFileError, clean, read_key
from ares.terminal.errors import exit_with_error
from ares.terminal.http_client import open_url, proxy_of
from ares.terminal.progress import progress_display

_errors = Console(stderr=True)
_KEY_VARIABLE = "ARES_ADMIN_KEY"

# A URL with one of these after the host is that of a route, not of the gateway.
_ROUTES = ("v1", "admin", "dashboard", "docs", "openapi.json", "health", "ready", "metrics", "version")
_EXAMPLE = "such as http://127.0.0.1:8000"


def _address(given: str) -> str:
    """Return the address of a gateway without a trailing slash, or exit with an error."""
    url = given.strip()
    try:
        parts = urllib.parse.urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or any(not character.isprintable() or character.isspace() for character in url):
        exit_with_error(f"--url (ARES_URL): {given!r} is not the address of a gateway, {_EXAMPLE}")
    if "@" in parts.netloc:
        exit_with_error(
            "--url (ARES_URL): the gateway takes no user name and password; give its admin key with --key-file"
        )
    if parts.query or parts.fragment or parts.path.strip("/").partition("/")[0] in _ROUTES:
        exit_with_error(
            f"--url (ARES_URL): give the address of the gateway alone, {parts.scheme}://{parts.netloc}, not {given!r}"
        )
    return url.rstrip("/")


Url = Annotated[str, typer.Option(envvar="ARES_URL", help="Where the gateway answers.", callback=_address)]
KeyFile = Annotated[
    Path | None, typer.Option(help=f"File with the key of the admin routes; without one, {_KEY_VARIABLE} is read.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def status(
    url: Url = "http://127.0.0.1:8000",
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Show instances, the predictor's learner, running requests and recent moves."""
    read = _call(f"{url}/admin/v1/status", key_file)
    if as_json:
        typer.echo(json.dumps(read, indent=2))
        return
    console = operator_tables.console()
    count = len(read.get("processes", ()))
    processes = f" ({count} processes)" if count else ""
    console.print(
        f"gateway {read['gateway']}{processes}, preset {read['preset']}; {_who_moves(read['controller'])}",
        highlight=False,
    )
    operator_tables.instances(read, console)
    operator_tables.roles(read, console)
    operator_learners.refusals(read["instances"], console)
    console.print()
    operator_learners.learners(read, console)
    operator_tables.requests(read, console)


def migrate(
    request: Annotated[str, typer.Argument(help="Id of a running request, from `ares status` or from its reply.")],
    to: Annotated[str, typer.Option("--to", help="Name of the decode instance to move it to.")],
    mode: Annotated[str, typer.Option(help="How its KV is transferred: auto, stop_and_copy or pre_copy.")] = "auto",
    url: Url = "http://127.0.0.1:8000",
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Move a running request to another decode instance."""
    record = _call(f"{url}/admin/v1/migrations", key_file, {"request_id": request, "target": to, "mode": mode})
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        operator_tables.move(record, operator_tables.console())
    if record["outcome"] != "moved":
        sys.exit(1)


def drain(
    instance: Annotated[str, typer.Argument(help="Name of the instance (see `ares status`).")],
    deadline: Annotated[float, typer.Option(min=0, help="Seconds until the remaining requests are aborted.")] = 60.0,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until no request is left on it.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Drain it even if it is the last open instance that prefills or decodes.")
    ] = False,
    url: Url = "http://127.0.0.1:8000",
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Take an instance out of service: no new requests, and running ones are moved away."""
    path = f"{url}/admin/v1/instances/{urllib.parse.quote(instance, safe='')}/drain"
    record = _call(path, key_file, {"deadline_s": deadline} | ({"force": True} if force else {}))
    if wait:
        record["left"] = _until_empty(record["name"], deadline + _AFTER_DEADLINE_S, url, key_file)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        typer.echo(f"{instance} is draining; requests left: {record['left']}")
    if wait and record["left"]:
        sys.exit(1)


def undrain(
    instance: Annotated[str, typer.Argument(help="Name of the instance (see `ares status`).")],
    url: Url = "http://127.0.0.1:8000",
    key_file: KeyFile = None,
) -> None:
    """Put a drained instance back into service."""
    _call(f"{url}/admin/v1/instances/{urllib.parse.quote(instance, safe='')}/undrain", key_file, {})
    typer.echo(f"{instance} takes requests again")


def role(
    instance: Annotated[str, typer.Argument(help="Name of the instance (see `ares status`).")],
    role: Annotated[
        str, typer.Argument(help="prefill, decode or both; its present role ends a change that is under way.")
    ],
    deadline: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds that the change may take; with work of the old role left then, it keeps that role."
        ),
    ] = 60.0,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has the role, or keeps the one it had.")] = False,
    url: Url = "http://127.0.0.1:8000",
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Change the role of an instance while it runs; first its prefills finish, and its requests move away."""
    path = f"{url}/admin/v1/instances/{urllib.parse.quote(instance, safe='')}/role"
    record = _call(path, key_file, {"role": role, "deadline_s": deadline})
    if wait:
        record |= _until_changed(record["name"], role, deadline + _AFTER_DEADLINE_S, url, key_file)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    elif record["next_role"]:
        typer.echo(f"{record['name']} changes from {record['role']} to {record['next_role']}; left: {record['left']}")
    else:
        typer.echo(f"{record['name']} has the role {record['role']}")
    if wait and record["role"] != role:
        sys.exit(1)


def preset(
    name: Annotated[str | None, typer.Argument(help="Preset to switch to (docs/policy.md); none: show it.")] = None,
    url: Url = "http://127.0.0.1:8000",
    key_file: KeyFile = None,
) -> None:
    """Show or switch the policy preset of a running gateway."""
    if name is None:
        typer.echo(_call(f"{url}/admin/v1/status", key_file)["preset"])
    else:
        typer.echo(_call(f"{url}/admin/v1/preset", key_file, {"preset": name}, "PUT")["preset"])


def replay(
    log: Annotated[Path, typer.Argument(help="Decision log of `ares gateway --decision-log`.")],
    preset: Annotated[str | None, typer.Option(help="Decide with this preset instead of the logged one.")] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Python file that registers a policy; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Repeat the decisions of a log, with the logged preset or another one.

    Exits with status 1 if the logged preset decides differently from the log.
    """
    from ares import plugins
    from ares.gateway.records import replay as decision_replay

    try:
        plugins.load(policy or ())
        size = log.stat().st_size
        with progress_display(_errors, transient=True) as bar:
            task = bar.add_task(f"replaying {log.name}", total=size)
            result = decision_replay.replay(log, preset, lambda read: bar.update(task, completed=read))
    except OSError as error:
        exit_with_error(f"{log}: cannot be read: {error.strerror}")
    except (decision_replay.ReplayError, ValueError) as error:
        exit_with_error(str(error))
    if not result.decisions:
        exit_with_error(f"{log}: no decisions in it; a gateway writes them with --decision-log")
    if as_json:
        shown = {
            "decisions": result.decisions,
            "same": result.same,
            "logged": dict(result.logged),
            "made": dict(result.made),
            "differences": result.differences,
        }
        typer.echo(json.dumps(shown, indent=2))
    else:
        table = Table("decided", "as logged", f"by {preset}" if preset else "again")
        for kind in sorted({*result.logged, *result.made}):
            table.add_row(kind, str(result.logged[kind]), str(result.made[kind]))
        console = Console()
        console.print(table)
        console.print(f"{result.same} of {result.decisions} decisions are the same as logged")
    if preset is None and result.same != result.decisions:
        sys.exit(1)


def _who_moves(controller: dict[str, Any]) -> str:
    """Return which gateway decides moves."""
    if controller["where"] == "nowhere":
        return "this preset moves no requests"
    if controller["where"] == "here":
        return "this gateway decides moves"
    holder = f" ({controller['holder']})" if controller["holder"] else ""
    return f"another gateway{holder} has decided moves for {controller['missed_periods']} periods"


# Requests that are aborted at the deadline are gone soon after.
_AFTER_DEADLINE_S = 15.0
_POLL_S = 0.2
# After so long every gateway knows the role of an instance.
HEARD_S = 2.0


def _until_empty(instance: str, timeout_s: float, url: str, key_file: Path | None) -> int:
    """Wait until nothing is left on an instance, and return how many requests are."""
    left = 0
    for row, show in _watched(instance, timeout_s, url, key_file):
        if row is None:
            return 0  # it has ended
        if not row["draining"]:
            exit_with_error(f"{instance} is no longer draining", 1)
        left = row["left"]
        if not left:
            break
        show(f"{instance} is draining, {left} left")
    return left


def _until_changed(instance: str, role: str, timeout_s: float, url: str, key_file: Path | None) -> dict[str, Any]:
    """Wait until an instance has a role, or is not about to have another one than now; return what it has."""
    last: dict[str, Any] = {}
    remains_until: float | None = None
    for row, show in _watched(instance, timeout_s, url, key_file):
        if row is None:
            exit_with_error(f"{instance} is lost", 1)
        last = {name: row[name] for name in ("role", "next_role", "role_left_s", "left")}
        if row["next_role"] is not None:
            remains_until = None
            show(f"{instance} becomes {row['next_role']}, {row['left']} left")
            continue
        # Another gateway, or process of one, may answer that has not heard of the change yet.
        remains_until = remains_until or time.monotonic() + HEARD_S
        if row["role"] == role or time.monotonic() > remains_until:
            break
    return last


def _watched(
    instance: str, timeout_s: float, url: str, key_file: Path | None
) -> Iterator[tuple[dict[str, Any] | None, Callable[[str], None]]]:
    """Yield the status of an instance until the timeout, None where it is lost, and what shows a line of progress."""
    until = time.monotonic() + timeout_s
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with progress_display(_errors, *columns, transient=True) as shown:
        task = shown.add_task(instance, total=None)
        while True:
            rows = {row["name"]: row for row in _call(f"{url}/admin/v1/status", key_file)["instances"]}
            row = rows.get(instance)
            yield row if row is not None and row["healthy"] else None, lambda text: shown.update(task, description=text)
            if time.monotonic() > until:
                return
            time.sleep(_POLL_S)


def _key(file: Path | None) -> str | None:
    try:
        key = read_key(file) if file is not None else clean(os.environ.get(_KEY_VARIABLE, ""))
    except KeyFileError as error:
        exit_with_error(str(error))
    if not key.isprintable() or any(ord(character) > 255 for character in key):
        exit_with_error(f"the key in {file or _KEY_VARIABLE} has characters that no HTTP header can hold")
    return key or None


def _call(
    url: str, key_file: Path | None, body: dict[str, Any] | None = None, method: str | None = None
) -> dict[str, Any]:
    key = _key(key_file)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310 - the operator's own URL
    try:
        with open_url(request, timeout=60) as reply:
            read = json.load(reply)
        if not isinstance(read, dict):
            raise TypeError
        return read
    except urllib.error.HTTPError as error:
        try:
            failure = json.load(error)["error"]
            message, code = failure["message"], failure["code"]
        except (ValueError, KeyError, TypeError):
            _no_gateway(url, f"it answers {error.code} {error.reason}")
        if error.code == 404 and code is None:  # no such route
            _no_gateway(url, message)
        exit_with_error(message, 1)
    except (OSError, http.client.HTTPException) as error:
        _no_gateway(url, getattr(error, "reason", None) or error)
    except (TypeError, ValueError):
        _no_gateway(url, "what answers there is something else")


def _no_gateway(url: str, why: object) -> NoReturn:
    advice = _advice(url, why)
    why = " ".join((str(why) or type(why).__name__).split())
    address = url.partition("/admin/")[0]
    proxy = proxy_of(url)
    through = ", asked through the proxy of the proxy variables (NO_PROXY=HOST asks it directly)" if proxy else ""
    exit_with_error(f"no gateway at {address}{through}: {why}; {advice}", 1)


def _advice(url: str, why: object) -> str:
    match why:
        case ssl.SSLCertVerificationError():
            return (
                "set SSL_CERT_FILE to the certificate of the authority that signed the gateway's, and give --url with "
                "a name that it is for"
            )
        case ssl.SSLError():
            return "it may not speak TLS: give --url with http://"
        case ConnectionResetError() if url.startswith("http:"):  # also where it closes without a reply
            return "it may speak TLS: give --url with https://"
    return "start one with `ares up`, or give --url"
