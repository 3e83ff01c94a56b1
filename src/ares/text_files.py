r"""Text files of users, or pipes: traces, prompts, recordings, profiles, logs.

All are read in the same way: UTF-8, with or without a byte order mark; lines end at ``\n`` or ``\r\n`` and nowhere
else, since U+2028, U+0085 and form feeds are part of a text; gzip, bzip2 and xz are recognised by their first bytes and
unpacked. Each file is opened once, so that a pipe can be given. Anything else is refused by a message that names it.
"""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

# By the first bytes of a file: how it is opened, or what it is and what to do about it.
_COMPRESSED: dict[re.Pattern[bytes], Callable[[IO[bytes]], Any]] = {
    re.compile(rb"\x1f\x8b"): lambda file: gzip.GzipFile(fileobj=file),
    re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"): bz2.BZ2File,
    re.compile(rb"\xfd7zXZ\x00"): lzma.LZMAFile,
}
_REFUSED: dict[re.Pattern[bytes], str] = {
    re.compile(rb"\x28\xb5\x2f\xfd"): "is compressed with zstd: unpack it first, zstd -dc FILE > TEXT",
    re.compile(rb"\x04\x22\x4d\x18"): "is compressed with lz4: unpack it first, lz4 -dc FILE > TEXT",
    re.compile(rb"PK\x03\x04"): "is a zip archive: unpack it and give the file inside",
    re.compile(rb"7z\xbc\xaf\x27\x1c"): "is a 7z archive: unpack it and give the file inside",
    re.compile(rb".{257}ustar", re.DOTALL): "is a tar archive: unpack it and give the file inside",
    re.compile(rb"PAR1.*\0", re.DOTALL): "is a Parquet file: write it as JSONL or CSV first",
    re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff"): "is UTF-32: save it as UTF-8, iconv -f UTF-32 -t UTF-8 FILE > TEXT",
    re.compile(rb"\xff\xfe|\xfe\xff"): "is UTF-16: save it as UTF-8, iconv -f UTF-16 -t UTF-8 FILE > TEXT",
    re.compile(rb".*\0", re.DOTALL): "has zero bytes in it: it is no UTF-8 text; if it is UTF-16, save it as UTF-8",
}
_HEAD = 512
_MARK = "\ufeff"
# No file that we read has a line of more bytes; one that has must not fill the memory.
LONGEST_LINE = 1 << 28


class TextFileError(ValueError):
    """The file cannot be read as text; the message names it, and the line where it is about one."""


def read_lines(path: Path, longest_line: int = LONGEST_LINE) -> Iterator[str]:
    """Yield the lines of a file without their ends.

    Parameters
    ----------
    path
        The file, or a pipe.
    longest_line
        Most bytes in a line.

    Raises
    ------
    TextFileError
        It cannot be opened or read, is not text, is not UTF-8, or has too long a line.
    """
    try:
        with path.open("rb") as file:
            yield from _lines(path, _opened(path, file), longest_line)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise TextFileError(f"{path}: cannot be read: {reason}") from None


def read_text(path: Path) -> str:
    """Return all of a file with every line's end as a newline; TextFileError as for `read_lines`."""
    return "\n".join(read_lines(path))


class _Rewound(io.RawIOBase):
    """A stream whose first bytes were read already: a pipe cannot go back."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._head:
            part = self._rest.read(len(buffer))
        else:
            part, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def _opened(path: Path, file: IO[bytes]) -> IO[bytes]:
    """Return the text's bytes, decompressed where they are compressed."""
    for depth in range(2):
        head = file.read(_HEAD)
        file = io.BufferedReader(_Rewound(head, file), 1 << 16)
        found = next((how for pattern, how in _COMPRESSED.items() if pattern.match(head)), None)
        if found is None:
            break
        if depth:
            raise TextFileError(f"{path}: is compressed twice: unpack it first")
        file = found(file)
    if why := next((why for pattern, why in _REFUSED.items() if pattern.match(head)), None):
        raise TextFileError(f"{path}: {why}")
    return file


def _lines(path: Path, file: IO[bytes], longest_line: int) -> Iterator[str]:
    for number, raw in enumerate(iter(lambda: file.readline(longest_line), b""), start=1):
        ended = raw.endswith(b"\n")
        if not ended and len(raw) == longest_line:
            raise TextFileError(f"{path}:{number}: a line of more than {longest_line >> 20} MiB")
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            wrong = raw[error.start]
            raise TextFileError(
                f"{path}:{number}: not UTF-8 text: byte 0x{wrong:02x} at {error.start}: save it as UTF-8"
            ) from None
        line = line.removesuffix("\n").removesuffix("\r")
        if number == 1:
            line = line.removeprefix(_MARK)
            if not ended and "\r" in line:
                raise TextFileError(
                    f"{path}: its lines end with carriage returns alone: convert it, tr '\\r' '\\n' < FILE > TEXT"
                )
        yield line
