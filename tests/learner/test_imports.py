"""The learner's own process stays small: torch belongs to its jobs."""

import subprocess
import sys


def test_the_learner_itself_does_not_import_torch() -> None:
    check = "import sys, ares.learner.service; sys.exit(any(name in sys.modules for name in ('torch', 'vllm')))"
    assert subprocess.run([sys.executable, "-c", check], check=False, timeout=60).returncode == 0
