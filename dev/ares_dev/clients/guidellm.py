"""guidellm: chats, completions and responses."""

import json
import subprocess
import sys
from pathlib import Path

from ares_dev.clients.report import Report, Target, expect, main

_FORMATS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_REQUESTS = 6


def run(target: Target, report: Report) -> None:
    """Run the benchmark once for each format of requests."""
    for number, path in enumerate(_FORMATS):
        with report.check(path, requests=_REQUESTS) as check:
            file = Path(f"{number}.json")
            command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"]
            command += ["--backend", f"kind=openai_http,target={target.url},model={target.model},request_format={path}"]
            command += ["--profile", "kind=concurrent,streams=2"]
            command += ["--constraint", f"kind=max_requests,count={_REQUESTS}"]
            command += ["--tokenizer", f"kind=huggingface_auto,model={target.tokenizer}"]
            command += ["--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={target.tokens}"]
            command += ["--output", f"kind=json,path={file}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the client
            expect(done.returncode == 0, f"status {done.returncode}: {(done.stdout + done.stderr)[-400:]}")
            (benchmark,) = json.loads(file.read_text())["benchmarks"]
            for failed in (*benchmark["requests"]["errored"], *benchmark["requests"]["incomplete"]):
                check.fail(str(failed["info"]["error"]))
            found = benchmark["requests"]["successful"]
            expect(len(found) + check.failed == _REQUESTS, f"{len(found)} completed")
            short = [row["output_tokens"] for row in found if row["output_tokens"] != target.tokens]
            expect(not short, f"outputs of {short} tokens instead of {target.tokens}")


if __name__ == "__main__":
    main(run)
