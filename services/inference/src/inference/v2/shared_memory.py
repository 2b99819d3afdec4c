"""Regions of this host's shared memory that clients registered, for tensors that need not travel.

Files are read and written, not mapped: a client that shrinks its region meanwhile makes a short read, where a mapping
would end the process.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.errors import NotFound, Refused

FOLDER = Path("/dev/shm")  # where shm_open keeps its files
KEY = re.compile(r"/?[A-Za-z0-9_.-]{1,250}")


@dataclass(frozen=True)
class Region:
    name: str
    key: str
    offset: int
    byte_size: int


class Regions:
    """Safe to share among threads. Where `allowed` is not set, every call raises Refused."""

    def __init__(self, allowed: bool, limit: int):
        """limit: bytes of a tensor; a file there may say that it has more than the host has memory."""
        self.allowed, self._limit = allowed, limit
        self._lock = threading.Lock()
        self._regions: dict[str, Region] = {}

    def register(self, region: Region) -> None:
        """Raises Refused: the name is taken, the key is no name in FOLDER, or it has fewer bytes than the region."""
        self._check_allowed()
        with self._lock:
            if region.name in self._regions:
                raise Refused(f"shared memory region '{region.name}' already in manager", "malformed")
            with _opened(region, os.O_RDONLY) as file:
                size = os.fstat(file).st_size
            if region.byte_size < 1 or region.offset + region.byte_size > size:
                raise Refused(f"failed to register shared memory region '{region.name}': '{region.key}' has {size} "
                              f"bytes, the region {region.byte_size} from {region.offset}", "malformed")
            self._regions[region.name] = region

    def unregister(self, name: str | None = None) -> None:
        """Forget a region, or all; one that is not registered is no error, as with Triton."""
        self._check_allowed()
        with self._lock:
            for gone in [name] if name is not None else list(self._regions):
                self._regions.pop(gone, None)

    def status(self, name: str | None = None) -> list[Region]:
        self._check_allowed()
        with self._lock:
            return [self._find(name)] if name is not None else sorted(self._regions.values(), key=lambda r: r.name)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` of the region. Raises NotFound, or Refused where they are not inside it."""
        region = self._within(name, offset, size)
        if size > self._limit:
            raise Refused(f"a tensor of {size} bytes in shared memory region '{name}': at most {self._limit} are "
                          "accepted", "malformed")
        with _opened(region, os.O_RDONLY) as file:
            data = os.pread(file, size, region.offset + offset)
        if len(data) != size:
            raise Refused(f"shared memory region '{name}' has fewer bytes than it was registered with", "malformed")
        return data

    def write(self, name: str, offset: int, size: int, data: bytes) -> None:
        """Put `data` at `offset` of the region; `size` is the room that the client gave it. Raises as `read`."""
        region = self._within(name, offset, size)
        if len(data) > size:
            raise Refused(f"shared memory size specified with the request for output 'probabilities' ({size} bytes) "
                          f"should be at least {len(data)} bytes to hold the results", "malformed")
        with _opened(region, os.O_RDWR) as file:
            if os.fstat(file).st_size < region.offset + offset + len(data):  # a write would enlarge it
                raise Refused(f"shared memory region '{name}' has fewer bytes than it was registered with", "malformed")
            os.pwrite(file, data, region.offset + offset)

    def _within(self, name: str, offset: int, size: int) -> Region:
        self._check_allowed()
        with self._lock:
            region = self._find(name)
        if offset + size > region.byte_size:
            raise Refused(f"Invalid offset + byte size for shared memory region: '{name}': {offset} + {size}, it has "
                          f"{region.byte_size}", "malformed")
        return region

    def _find(self, name: str) -> Region:
        if name not in self._regions:
            raise NotFound(f"Unable to find shared memory region: '{name}'")
        return self._regions[name]

    def _check_allowed(self) -> None:
        if not self.allowed:
            raise Refused("shared memory of clients is not allowed on this server: SYSTEM_SHARED_MEMORY=on allows it",
                          "not_allowed")


@contextmanager
def _opened(region: Region, flags: int) -> Iterator[int]:
    if not KEY.fullmatch(region.key) or region.key.strip("/") in (".", ".."):
        raise Refused(f"shared memory key {region.key!r} is no name of POSIX shared memory", "malformed")
    try:
        file = os.open(FOLDER / region.key.lstrip("/"), flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        raise Refused(f"Unable to open shared memory region: '{region.name}': {e.strerror} ('{region.key}')",
                      "malformed") from None
    try:
        yield file
    finally:
        os.close(file)
