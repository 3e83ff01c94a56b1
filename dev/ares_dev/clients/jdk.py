"""The JDK's HttpClient (Requests.java): with its defaults it asks to upgrade each new connection to h2c."""

import json
import subprocess
from pathlib import Path

from ares_dev.clients.report import Report, Target, expect, main

_SOURCE = Path(__file__).with_name("Requests.java")
_AT_ONCE = {"POST of 4 chats at once": 4}


def run(target: Target, report: Report) -> None:
    """Compile and run the Java source, and report its lines."""
    chat = {
        "model": target.model,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": target.tokens,
    }
    bodies = json.dumps(chat), json.dumps({**chat, "stream": True})
    done = subprocess.run(  # noqa: S603 - the client
        ["java", str(_SOURCE), target.url, *bodies],  # noqa: S607 - the one on the PATH
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        name, _, error = line.partition("\t")
        with report.check(name, requests=_AT_ONCE.get(name, 1)):
            expect(not error, error)
    expect(done.returncode == 0 and bool(done.stdout), f"java ended with status {done.returncode}: {done.stderr}")


if __name__ == "__main__":
    main(run)
