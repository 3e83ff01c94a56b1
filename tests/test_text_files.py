"""One rule for all text that users give: from files, compressed files and pipes."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ares.text_files import TextFileError, read_lines, read_text


def written(folder: Path, data: bytes) -> Path:
    path = folder / "given"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"a\nb", ["a", "b"]),
        (b"a\nb\n", ["a", "b"]),
        (b"a\r\n\r\nb\r\n", ["a", "", "b"]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", ["a", "\ufeffb"]),
        ("a\u2028b\na\x85b\na\x0cb\na\rb\n".encode(), ["a\u2028b", "a\x85b", "a\x0cb", "a\rb"]),
        (b"a\r", ["a"]),
    ],
)
def test_lines_end_at_newlines_alone(tmp_path: Path, data: bytes, lines: list[str]) -> None:
    assert list(read_lines(written(tmp_path, data))) == lines


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_files_are_read_by_their_first_bytes(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = written(tmp_path, pack(b"\xef\xbb\xbfa\n" + b"b" * 100_000 + b"\r\nc"))
    assert list(read_lines(path)) == ["a", "b" * 100_000, "c"]
    path.write_bytes(pack(b"a\n" * 100_000)[:-10])
    with pytest.raises(TextFileError, match="given: cannot be read: "):
        list(read_lines(path))
    path.write_bytes(pack(pack(b"a\n")))
    with pytest.raises(TextFileError, match="given: is compressed twice"):
        list(read_lines(path))
    path.write_bytes(pack(_tar()))
    with pytest.raises(TextFileError, match="given: is a tar archive"):
        list(read_lines(path))


def _tar() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return packed.getvalue()


def _zip() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a", "b")
    return packed.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("a\nb\n".encode("utf-16"), "UTF-16"),
        ("a\nb\n".encode("utf-16-be"), "UTF-16"),
        ("a\nb\n".encode("utf-32"), "UTF-32"),
        ("a\ncafé\n".encode("latin-1"), "given:2: not UTF-8 text: byte 0xe9 at 3"),
        (b"\x28\xb5\x2f\xfd\x04\x00\x51\x00", "zstd"),
        (b"\x04\x22\x4d\x18\x60\x40\x82", "lz4"),
        (b"PAR1\x15\x00", "Parquet"),
        (_zip(), "zip archive"),
        (_tar(), "tar archive"),
        (b"a\rb\rc\r", "carriage returns alone"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(TextFileError, match=said):
        read_text(written(tmp_path, data))


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextFileError, match="nowhere: cannot be read: No such file"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(TextFileError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


def test_endless_input_does_not_fill_the_memory(tmp_path: Path) -> None:
    with pytest.raises(TextFileError, match="given:1: a line of more than 1 MiB"):
        list(read_lines(written(tmp_path, b"x" * (1 << 21)), longest_line=1 << 20))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_pipe_is_read_once_however_slowly_it_is_written(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    data = pack(b"a\n" + b"b" * 20_000 + b"\n")

    def write() -> None:
        with path.open("wb", buffering=0) as pipe:
            for part in (data[:1], data[1:5], data[5:]):
                pipe.write(part)

    writer = threading.Thread(target=write)
    writer.start()
    assert list(read_lines(path)) == ["a", "b" * 20_000]
    writer.join()
