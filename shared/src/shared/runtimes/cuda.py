"""CUDA's runtime through cuda-bindings, as much as a Session needs: streams, memory, copies, graphs, events.

Importing it needs cuda-bindings and no GPU. Everything is on device 0, which a GPU lease chooses by
CUDA_VISIBLE_DEVICES. What an object holds is freed when nothing refers to it any more, most of it by `close()` too.
"""

import weakref
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

try:
    from cuda.bindings import runtime as rt
except ImportError:  # cuda-python before 12.8
    from cuda import cudart as rt

from shared.errors import LannerError

SUCCESS, NOT_READY = rt.cudaError_t.cudaSuccess, rt.cudaError_t.cudaErrorNotReady  # to look these up takes long, too
UP, DOWN = rt.cudaMemcpyKind.cudaMemcpyHostToDevice, rt.cudaMemcpyKind.cudaMemcpyDeviceToHost


class CudaError(LannerError):
    """A call of the CUDA runtime failed: its name, CUDA's own name for the error, and what CUDA says of it."""

    code = "cuda"


def call(function: Any, *args: Any) -> Any:
    """The result of a runtime function: None, one value, or a tuple. Raises CudaError."""
    error, *values = function(*args)
    if error != SUCCESS:
        text = rt.cudaGetErrorString(error)[1]
        said = text.decode() if isinstance(text, bytes) else str(text)
        raise CudaError(f"{function.__name__} failed with {error.name}: {said}")
    return values[0] if len(values) == 1 else tuple(values) or None


def _free(function: Any, handle: Any) -> None:
    """For finalizers: at interpreter exit the driver may be gone, and then there is nothing to free."""
    function(handle)


class Memory:
    """`size` bytes on the device at `pointer`."""

    def __init__(self, size: int):
        self.size = size
        self.pointer = int(call(rt.cudaMalloc, max(size, 1)))
        self.close = weakref.finalize(self, _free, rt.cudaFree, self.pointer)


class Pinned:
    """Page-locked host memory: copies to and from it run beside everything else. `array` keeps it alive."""

    def __init__(self, shape: tuple[int, ...], dtype: type[np.generic]):
        size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
        self.pointer = int(call(rt.cudaHostAlloc, size, rt.cudaHostAllocDefault))
        self.__array_interface__ = {"version": 3, "data": (self.pointer, False), "shape": shape,
                                    "typestr": np.dtype(dtype).str}
        weakref.finalize(self, _free, rt.cudaFreeHost, self.pointer)

    @property
    def array(self) -> np.ndarray:
        return np.asarray(self)


class Pool:
    """Page-locked memory that is lent again once nothing refers to it: to lock it takes longer than to fill it."""

    def __init__(self, most: int):
        """most: bytes that are locked; whoever asks for more gets memory that is not."""
        self._most, self._locked = most, 0
        self._free: dict[int, list[np.ndarray]] = {}  # by size
        self._starts: list[int] = []  # addresses, in order; and where what begins there ends
        self._stops: dict[int, int] = {}

    def take(self, size: int) -> memoryview:
        """`size` bytes, lent until no view of them is left; from any thread."""
        rounded = 1 << max(size - 1, 1).bit_length()
        free = self._free.setdefault(rounded, [])
        try:
            whole = free.pop()
        except IndexError:
            if self._locked + rounded > self._most:
                return np.empty(size, np.uint8).data
            try:
                whole = Pinned((rounded,), np.uint8).array
            except CudaError:  # a host may allow less
                return np.empty(size, np.uint8).data
            self._locked += rounded
            self._stops[whole.ctypes.data] = whole.ctypes.data + rounded
            self._starts = sorted(self._stops)
        lent = whole[:size]
        weakref.finalize(lent, free.append, whole).atexit = False
        return lent.data

    def close(self) -> None:
        """Lend nothing any more; what is lent is freed when it comes back."""
        self._most = 0
        self._free.clear()

    def holds(self, pointer: int) -> bool:
        """Whether an address is in it. `is_pinned` takes ten times as long."""
        before = bisect_right(self._starts, pointer) - 1
        return before >= 0 and pointer < self._stops[self._starts[before]]


class Event:
    """A mark in a Stream that others wait for."""

    def __init__(self) -> None:
        self.handle = call(rt.cudaEventCreateWithFlags, rt.cudaEventDisableTiming)
        self.close = weakref.finalize(self, _free, rt.cudaEventDestroy, self.handle)

    def record(self, stream: "Stream") -> None:
        call(rt.cudaEventRecord, self.handle, stream.handle)

    def wait(self) -> None:
        call(rt.cudaEventSynchronize, self.handle)


class Stream:
    """Work in order. It does not wait for the default stream."""

    def __init__(self) -> None:
        self.handle = call(rt.cudaStreamCreateWithFlags, rt.cudaStreamNonBlocking)
        self.number = int(self.handle)
        self.close = weakref.finalize(self, _free, rt.cudaStreamDestroy, self.handle)

    def upload(self, device: int, host: int, size: int) -> None:
        """Copy `size` bytes from host to device, both addresses; returns at once if the host memory is pinned."""
        call(rt.cudaMemcpyAsync, device, host, size, UP, self.handle)

    def download(self, host: int, device: int, size: int) -> None:
        """Copy `size` bytes from device to host, both addresses; returns at once if the host memory is pinned."""
        call(rt.cudaMemcpyAsync, host, device, size, DOWN, self.handle)

    def launch(self, graph: "Graph") -> None:
        call(rt.cudaGraphLaunch, graph.handle, self.handle)

    def wait_for(self, event: Event) -> None:
        """What comes later in this stream starts after the event."""
        call(rt.cudaStreamWaitEvent, self.handle, event.handle, 0)

    def is_over(self) -> bool:
        """Whether nothing runs or waits in it any more; also where that failed, which `wait` tells."""
        return bool(rt.cudaStreamQuery(self.handle)[0] != NOT_READY)

    def wait(self) -> None:
        call(rt.cudaStreamSynchronize, self.handle)


class Graph:
    """What a Stream was given while it was captured, launched again as one."""

    def __init__(self, captured: Any):
        self.handle = call(rt.cudaGraphInstantiate, captured, 0)
        self.close = weakref.finalize(self, _free, rt.cudaGraphExecDestroy, self.handle)


@contextmanager
def capture(stream: Stream) -> Iterator[list[Graph]]:
    """Record what the body gives to the stream instead of running it; the list holds the Graph afterwards."""
    graphs: list[Graph] = []
    call(rt.cudaStreamBeginCapture, stream.handle, rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    try:
        yield graphs
    except BaseException:
        rt.cudaStreamEndCapture(stream.handle)
        raise
    captured = call(rt.cudaStreamEndCapture, stream.handle)
    try:
        graphs.append(Graph(captured))
    finally:
        call(rt.cudaGraphDestroy, captured)


def is_pinned(pointer: int) -> bool:
    """Whether a host address is page-locked, so that the device can read it directly."""
    error, attributes = rt.cudaPointerGetAttributes(pointer)
    return bool(error == SUCCESS and attributes.type == rt.cudaMemoryType.cudaMemoryTypeHost)


def device_name() -> tuple[str, str]:
    """Name and compute capability of device 0, "NVIDIA H100 80GB HBM3" and "9.0" say."""
    properties = call(rt.cudaGetDeviceProperties, 0)
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return name.rstrip("\0"), f"{properties.major}.{properties.minor}"
