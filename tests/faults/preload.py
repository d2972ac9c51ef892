"""A small library in C that is loaded into a server: power cuts, full disks, clocks that jump.

`kill -9` can't show what an fsync is worth, for the kernel keeps what the server wrote. So the
library logs how much of each file was synced, and `lose_power` cuts the files down to that.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("preload.c")
_CONTROL = struct.Struct("=qq")


def missing() -> str | None:
    """Say why the library can't be used here; None if it can."""
    if sys.platform != "linux":
        return "LD_PRELOAD is one of Linux"
    return None if shutil.which("gcc") else "there is no gcc, which compiles tests/faults/preload.c"


@dataclass
class Preload:
    """The library, as it is loaded into one server, and what it is told."""

    library: Path
    synced: Path
    control: Path

    @staticmethod
    def build(directory: Path) -> Preload:
        library = directory / "preload.so"
        command = ["gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        control = directory / "control"
        control.write_bytes(_CONTROL.pack(0, 0))
        return Preload(library, directory / "synced", control)

    def environment(self) -> dict[str, str]:
        return {
            "LD_PRELOAD": str(self.library),
            "FAULTS_SYNCED": str(self.synced),
            "FAULTS_CONTROL": str(self.control),
        }

    def tell(self, *, clock: int = 0, disk_full: bool = False) -> None:
        """Set the seconds that are added to the clock, and whether the disk is full."""
        with self.control.open("r+b") as file, mmap.mmap(file.fileno(), _CONTROL.size) as shared:
            shared[:] = _CONTROL.pack(clock, disk_full)

    def lose_power(self, directory: Path) -> int:
        """Throw away what was not synced of a dead server's files; return how many bytes."""
        sizes: dict[int, int] = {}
        for line in self.synced.read_text().splitlines():
            inode, size = line.split()
            sizes[int(inode)] = int(size)
        thrown = 0
        for file in directory.glob("appendonlydir/*"):
            status = file.stat()
            kept = min(status.st_size, sizes.get(status.st_ino, 0))
            thrown += status.st_size - kept
            with file.open("r+b") as open_file:
                open_file.truncate(kept)
        return thrown
