"""A recording of the run: arrival, first and last token of each session. `ares simulate` can replay it."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ares.gateway.pool.instance import Instance
from ares.gateway.session.session import Session

logger = logging.getLogger(__name__)


class Recorder:
    """Writes `requests.jsonl`, a line for each finished session, and `meta.json`.

    Times are seconds of `time.monotonic`. A disk that fails ends the recording, not the service.

    Parameters
    ----------
    folder
        Made if it is missing; None: nothing is recorded.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._file = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / "requests.jsonl").open("a", buffering=1)

    def describe(self, model: str, preset: str, instances: list[Instance]) -> None:
        """Write the cluster that the requests ran on."""
        decode = [i for i in instances if i.role != "prefill" and i.state.hello is not None]
        if self._folder is None or not decode or decode[0].state.hello is None:
            return
        hello = decode[0].state.hello
        meta: dict[str, Any] = {
            "model": model,
            "preset": preset,
            "vllm_version": hello.versions.get("vllm"),
            "kv_cache": {"block_size": hello.block_size, "num_gpu_blocks": hello.kv_blocks + 1},
            "decode_instances": len(decode),
            "prefill_instances": sum(1 for i in instances if i.role == "prefill"),
        }
        self._try(lambda folder: (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n"))

    def record(self, session: Session) -> None:
        """Add a finished session."""
        if self._file is None:
            return
        line = {
            "request_id": session.id,
            "input_toks": len(session.prompt),
            "output_toks": len(session.emitted),
            "arrival_time": session.arrived_at,
            "queued_ts": session.arrived_at,
            "first_token_ts": session.output.first_token_at,
            "last_token_ts": time.monotonic(),
            "moves": session.moves,
            "suspensions": session.suspensions,
        }
        file, text = self._file, json.dumps(line) + "\n"
        self._try(lambda _: file.write(text))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _try(self, write: Callable[[Path], object]) -> None:
        assert self._folder is not None  # noqa: S101 - for the type checker
        try:
            write(self._folder)
        except OSError:
            logger.exception("the recording ends here; serving continues")
            self.close()
