"""A gateway that cannot begin to serve says so in a sentence."""

import multiprocessing
import tempfile
from pathlib import Path

import pytest

from ares.addresses import AddressError
from ares.config import GatewayConfig
from ares.free_ports import free_port
from ares.gateway import serving


def refused_without_a_folder(config: GatewayConfig) -> None:
    tempfile.tempdir = "/no/such/folder"
    with pytest.raises(AddressError, match=r"no folder for the sockets.*set TMPDIR"):
        serving.serve(config, lambda *_: None)


def test_several_processes_without_a_temporary_directory(model_folder: Path) -> None:
    config = GatewayConfig(
        model=str(model_folder), processes=2, port=free_port("127.0.0.1"), workers=["http://127.0.0.1:1"]
    )
    # In a process of its own: serving configures the logs.
    one = multiprocessing.get_context("fork").Process(target=refused_without_a_folder, args=(config,))
    one.start()
    one.join(60)
    assert one.exitcode == 0
