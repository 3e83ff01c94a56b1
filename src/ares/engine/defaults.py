"""The vLLM flags that `ares up` adds for a small cluster on one machine, unless they are given."""

# Start in seconds instead of a minute and a half (no compilation), leave room for several instances in memory, and do
# not log every request.
_LOCAL = {
    "--max-model-len": "4096",
    "--kv-cache-memory-bytes": "1G",
    "--enforce-eager": None,
    "--disable-uvicorn-access-log": None,
}


def local_flags(given: list[str]) -> list[str]:
    """Return `given` with the missing defaults before it."""
    names = {flag.split("=")[0] for flag in given}
    if names & {"--no-enforce-eager", "-cc", "--compilation-config"}:
        names.add("--enforce-eager")
    flags = []
    for name, value in _LOCAL.items():
        if name not in names:
            flags += [name] if value is None else [name, value]
    return flags + given
