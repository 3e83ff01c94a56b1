import os
from pathlib import Path
from typing import Any

import pytest

from ares.gateway.discovery.base import MAXIMUM_INSTANCES, SourceError, checked
from ares.gateway.discovery.file import FileSource, urls
from ares.gateway.tuning import Tuning
from tests.gateway.discovery.following import following

QUICK = Tuning(file_period_s=0.01)
LLM_D = """
endpoints:
  - name: vllm-0
    address: "10.0.0.1"
    port: "8000"
  - name: vllm-1
    namespace: other
    address: fd00::1
    port: 8001
    labels: {llm-d.ai/role: decode}
"""


def write(path: Path, text: str) -> None:
    """Write as careful writers do."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


async def test_a_file_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "instances.yaml"
    path.write_text("instances:\n- http://a:1\n- url: http://b:2\n- http://a:1\n")
    async with following(FileSource("file", path, QUICK)) as found:
        assert await found.next() == ["http://a:1", "http://b:2"]
        write(path, LLM_D)
        assert await found.next() == ["http://10.0.0.1:8000", "http://[fd00::1]:8001"]
        path.write_text("instances: []\n")
        assert await found.next() == []
        assert found.quiet


async def test_links_are_exchanged_as_in_a_mounted_config_map(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"data-{number}").mkdir()
        (tmp_path / f"data-{number}" / "instances.yaml").write_text(f"instances: ['http://a:{number}']")
    data, path = tmp_path / "..data", tmp_path / "instances.yaml"
    data.symlink_to("data-1")
    path.symlink_to("..data/instances.yaml")
    async with following(FileSource("file", path, QUICK)) as found:
        assert await found.next() == ["http://a:1"]
        (tmp_path / "new").symlink_to("data-2")
        (tmp_path / "new").replace(data)
        assert await found.next() == ["http://a:2"]


async def test_what_is_still_being_written_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "instances.yaml"
    path.write_text("instances: ['http://a:1']")
    source = FileSource("file", path, Tuning(file_period_s=0.1))
    async with following(source) as found:
        await found.next()
        with path.open("w") as file:
            for part in ("instances:\n", "- http://a:1\n", "- http://b:2\n"):
                file.write(part)
                file.flush()
        assert await found.next() == ["http://a:1", "http://b:2"]


async def test_a_file_that_is_missing_or_broken_says_so_until_it_is_right(tmp_path: Path) -> None:
    path = tmp_path / "instances.yaml"
    async with following(FileSource("file", path, QUICK)) as found:
        assert await found.next() == f"{path}: no such file"
        write(path, "instances: [")
        await found.until(f"{path}: it is no YAML: expected the node content, but found '<stream end>', line 1")
        write(path, "#" * (1 << 20) + "\ninstances: []")
        await found.until(f"{path}: it is larger than 1 MiB")
        path.unlink()
        path.mkdir()
        await found.until(f"{path}: Is a directory")
        path.rmdir()
        os.mkfifo(path)
        await found.until(
            f"{path}: expected `instances:` or `endpoints:`, found nothing; for no instance, write instances: []"
        )
        write(path, "instances: ['http://a:1']")
        await found.until(["http://a:1"])


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (None, "found nothing; for no instance, write instances: "),
        ([], "found a list"),
        ("text", "found a str"),
        ({}, "found neither"),
        ({"instances": [], "endpoints": []}, "found 'instances', 'endpoints'"),
        ({"workers": []}, "found 'workers'"),
        ({1: [], None: 2}, "found 1, None"),
        ({"instances": None}, "expected a list, found None"),
        ({"instances": {"a": 1}}, "expected a list, found a dict"),
        ({"instances": [8100]}, "expected a URL .*, found 8100"),
        ({"instances": [10**5000]}, "found a large number"),
        ({"instances": [{"url": "http://a", "role": "decode"}]}, "found a dict"),
        ({"endpoints": ["http://a:1"]}, "expected name, address and port, found 'http://a:1'"),
        ({"endpoints": [{"name": "a", "address": "10.0.0.1"}]}, "expected name, address and port"),
        ({"endpoints": [{"name": "a", "address": "10.0.0.1", "port": "1", "weight": 2}]}, "unknown field 'weight'"),
        ({"endpoints": [{"name": "a", "address": 10, "port": "1"}]}, "'a' has no address, but 10"),
        ({"endpoints": [{"name": "a", "address": "x/y", "port": "1"}]}, "no address, but 'x/y'"),
        ({"endpoints": [{"name": "a", "address": "h", "port": 0}]}, "no port, but '0'"),
        ({"endpoints": [{"name": "a", "address": "h", "port": "9" * 5000}]}, r"no port, but '9+\.\.\."),
        ({"endpoints": [{"name": "a", "address": "h", "port": True}]}, "no port, but 'True'"),
        (
            {"endpoints": [{"name": "a", "address": host, "port": 1} for host in ("h", "i")]},
            "'a' stands there twice, with different addresses",
        ),
    ],
)
def test_a_document_of_another_form_is_refused(document: Any, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        checked(urls(document))


def test_urls_are_checked_and_counted() -> None:
    with pytest.raises(SourceError, match="'http://a:x' is not the URL"):
        checked(["http://a:1", "http://a:x"])
    many = (f"http://a:{port}" for port in range(1, MAXIMUM_INSTANCES + 2))
    with pytest.raises(SourceError, match=f"more than {MAXIMUM_INSTANCES} instances"):
        checked(many)
