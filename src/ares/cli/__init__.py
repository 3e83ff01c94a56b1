"""The `ares` command, one file a group of commands."""
