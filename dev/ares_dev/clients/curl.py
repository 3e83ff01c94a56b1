"""curl --http2: each connection begins with an upgrade to h2c, which a server may leave unanswered."""

import json
import subprocess

from ares_dev.clients.report import Report, Target, expect, main

# Longer than what curl sends at once: it first asks whether it may (`Expect: 100-continue`).
_LONG = 1_100_000
_STATUS = "\n%{http_code}"


def _curl(target: Target, path: str, *options: str, body: dict[str, object] | None = None) -> tuple[int, str]:
    command = ["curl", "--http2", "--silent", "--show-error", "--write-out", _STATUS, target.url + path, *options]
    if body is not None:
        command += ["--json", "@-"]
    done = subprocess.run(  # noqa: S603 - the client
        command, input=None if body is None else json.dumps(body), capture_output=True, text=True, check=False
    )
    expect(done.returncode == 0, f"status {done.returncode}: {done.stderr}")
    text, _, status = done.stdout.rpartition("\n")
    return int(status), text


def run(target: Target, report: Report) -> None:
    """Send requests without and with a body."""
    chat = {
        "model": target.model,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": target.tokens,
    }
    with report.check("GET"):
        status, text = _curl(target, "/v1/models")
        expect(status == 200 and bool(json.loads(text)["data"]), f"status {status}: {text}")
    with report.check("GET, 2 on one connection", requests=2):
        status, text = _curl(target, "/v1/models", target.url + "/health")
        expect(status == 200, f"status {status}: {text}")
    with report.check("POST of a chat"):
        status, text = _curl(target, "/v1/chat/completions", body=chat)
        expect(status == 200 and bool(json.loads(text)["choices"]), f"status {status}: {text}")
    with report.check("POST of a chat, streamed"):
        status, text = _curl(target, "/v1/chat/completions", "--no-buffer", body={**chat, "stream": True})
        expect(status == 200 and text.rstrip().endswith("[DONE]"), f"status {status}: {text[-200:]}")
    with report.check("POST of a completion"):
        body = {"model": target.model, "prompt": "one two", "max_tokens": target.tokens}
        status, text = _curl(target, "/v1/completions", body=body)
        expect(status == 200 and bool(json.loads(text)["choices"]), f"status {status}: {text}")
    with report.check("POST of a long body, refused for its length"):
        body = {**chat, "messages": [{"role": "user", "content": "word " * (_LONG // 5)}]}
        status, text = _curl(target, "/v1/chat/completions", body=body)
        expect(status == 400 and "tokens" in text, f"status {status}: {text[:200]}")


if __name__ == "__main__":
    main(run)
