"""TensorRT plans on the GPU: 8.6, 10 and 11, which name their tensors alike.

A batch is padded up to a bucket. Each bucket has a CUDA graph of its computation, captured when it is first asked for.
Images go up from page-locked memory and scores come down into it. There are two lanes, so that the copies of one batch
run beside the computation of the other; what is larger than the largest bucket goes through them in pieces.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt

from shared.errors import Damaged
from shared.runtimes import Begun, Session, check_batch, check_signature, cuda
from shared.runtimes.plan import Header, here, read

LOGGER = trt.Logger(trt.Logger.WARNING)
ROOM = 128 << 20  # bytes of page-locked memory for what arrives
DIRECT = 64 << 10  # bytes: to ask whether they are page-locked takes longer than to copy fewer


def buckets_up_to(most: int) -> list[int]:
    """1, 8, 64, then doubling up to `most`: below 64 images a GPU takes about as long for few as for many."""
    steps = [1, 8, 64]
    while steps[-1] < most:
        steps.append(2 * steps[-1])
    return [*(n for n in steps if n < most), most]


class TensorRTSession(Session):
    """A plan as a Session. Images from `pinned` or `room` are read where they lie; others are copied into page-locked
    memory first. What computes one batch lets the copies of another run beside it.
    """

    ahead = 2

    def __init__(self, path: Path, onnx_sha256: str | None = None):
        """Open the plan file at `path`, which must be built from the ONNX file of that hash where one is given.

        Raises:
            Unfit: the plan is missing, or was built for another GPU, TensorRT version or ONNX file.
            Damaged: its bytes are not those that were written, or TensorRT refuses them, or its signature is another.
        """
        self.header, plan = read(path, here(), onnx_sha256)
        self.device = self.header.host.gpu
        self._engine = deserialize(path, plan)
        self._size = _image_size(path, self._engine, self.header)
        self.batches = buckets_up_to(self.header.batches[2])
        self._pool = cuda.Pool(ROOM)
        self._lanes = [_Lane(self._engine, self.batches[-1], self._pool)]  # the other once it is asked for

    def pinned(self, count: int) -> np.ndarray:
        """A new page-locked uint8 [count, size, size, 3]."""
        return cuda.Pinned((count, self._size, self._size, 3), np.uint8).array

    def room(self, size: int) -> memoryview:
        """Page-locked bytes, as long as there are some."""
        return self._pool.take(size)

    def begin(self, parts: Sequence[np.ndarray]) -> Begun:
        """uint8 [N, size, size, 3] each. Raises ValueError for another dtype or shape."""
        for part in parts:
            check_batch(part, self._size)
        lane = next((lane for lane in self._lanes if not lane.under_way), None)
        if lane is None:
            lane = _Lane(self._engine, self.batches[-1], self._pool)
            self._lanes.append(lane)
        count = sum(map(len, parts))
        lane.begin(parts, count, next(n for n in self.batches if n >= count))
        return lane

    def run(self, batch: np.ndarray) -> np.ndarray:
        """uint8 [N, size, size, 3] -> float32 [N, classes]. Raises ValueError for another dtype or shape."""
        most, begun, scores = self.batches[-1], deque[Begun](), list[np.ndarray]()
        try:
            for start in range(0, max(len(batch), 1), most):
                if len(begun) == self.ahead:
                    scores.append(begun.popleft().scores())
                begun.append(self.begin([batch[start:start + most]]))
        finally:
            scores += [last.scores() for last in begun]
        return scores[0] if len(scores) == 1 else np.concatenate(scores)

    def close(self) -> None:
        """Free the GPU's memory, and what is page-locked. A closed session runs nothing."""
        for lane in self.__dict__.pop("_lanes", []):
            lane.close()
        self._pool.close()
        self.__dict__.pop("_engine", None)


def deserialize(path: Path, plan: bytes) -> Any:
    """An ICudaEngine. Raises Damaged when TensorRT refuses the bytes."""
    engine = trt.Runtime(LOGGER).deserialize_cuda_engine(plan)
    if engine is None:
        raise Damaged(f"{path.name} is refused by TensorRT {trt.__version__}; it is built anew from its ONNX file")
    return engine


def tensors(engine: Any) -> tuple[list[str], list[str]]:
    """Names of an engine's inputs and of its outputs."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    return inputs, [name for name in names if name not in inputs]


def context_in(engine: Any, memory: cuda.Memory, stream: cuda.Stream) -> Any:
    """An IExecutionContext that computes in `memory`, of at least `scratch_size(engine)` bytes."""
    match trt.__version__.partition(".")[0]:
        case "8":
            context = engine.create_execution_context_without_device_memory()
            context.device_memory = memory.pointer
        case _:
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            context.set_device_memory(memory.pointer, memory.size)
    # Only an engine's first context has the profile by itself.
    if not context.set_optimization_profile_async(0, stream.number):
        raise cuda.CudaError("TensorRT could not give a context its profile; its log above says why")
    stream.wait()
    return context


def scratch_size(engine: Any) -> int:
    """Bytes that a context needs beside the weights, at the largest batch."""
    size = engine.device_memory_size if trt.__version__.startswith("8.") else engine.device_memory_size_v2
    return int(size)


def _image_size(path: Path, engine: Any, header: Header) -> int:
    def seen(name: str) -> tuple[str, list[int]]:
        dtype = {trt.DataType.UINT8: "uint8", trt.DataType.FLOAT: "float32"}.get(engine.get_tensor_dtype(name))
        return dtype or str(engine.get_tensor_dtype(name)), list(engine.get_tensor_shape(name))

    inputs, outputs = tensors(engine)
    size = check_signature(path, [seen(name) for name in inputs], [seen(name) for name in outputs])
    built = tuple(shape[0] for shape in engine.get_tensor_profile_shape(inputs[0], 0))
    if built != header.batches:
        raise Damaged(f"{path.name} takes batches of {built}, its header says {header.batches}; build it anew")
    return size


class _Lane(Begun):
    """A stream with its buffers and the graphs of the buckets that were asked for. One batch at a time."""

    def __init__(self, engine: Any, most: int, pool: cuda.Pool):
        (self._input,), (self._output,) = tensors(engine)
        shape, classes = tuple(engine.get_tensor_shape(self._input))[1:], int(engine.get_tensor_shape(self._output)[1])
        self._engine, self._image_bytes = engine, int(np.prod(shape))
        self._stream, self._pool = cuda.Stream(), pool
        self._scratch = cuda.Memory(scratch_size(engine))
        self._images, self._scores = cuda.Memory(most * self._image_bytes), cuda.Memory(4 * most * classes)
        self._staging = cuda.Pinned((most, *shape), np.uint8)
        self._staged, self._results = self._staging.array, cuda.Pinned((most, classes), np.float32)
        self._found, self._classes = self._results.array, classes
        self._graphs: dict[int, tuple[Any, cuda.Graph]] = {}  # with its context, whose state it was captured in
        self._parts: Sequence[np.ndarray] = ()  # of the batch that is under way
        self._count = 0

    @property
    def under_way(self) -> bool:
        return self._count > 0

    def begin(self, parts: Sequence[np.ndarray], count: int, bucket: int) -> None:
        """Send `count` images up, compute, and fetch their scores."""
        if bucket not in self._graphs:
            self._graphs[bucket] = self._captured(bucket)
        self._parts = parts  # as long as they may be read
        sent = at = 0
        for part in parts:
            if part.nbytes >= DIRECT and part.flags.c_contiguous and self._is_locked(pointer := part.ctypes.data):
                self._send(self._staging.pointer + sent * self._image_bytes, sent, at)
                self._send(pointer, at, at + len(part))
                sent = at + len(part)
            else:
                self._staged[at:at + len(part)] = part
            at += len(part)
        self._send(self._staging.pointer + sent * self._image_bytes, sent, at)
        self._stream.launch(self._graphs[bucket][1])
        self._stream.download(self._results.pointer, self._scores.pointer, 4 * count * self._classes)
        self._count = count

    def is_over(self) -> bool:
        return self._stream.is_over()

    def scores(self) -> np.ndarray:
        count, self._count = self._count, 0
        self._stream.wait()
        self._parts = ()
        return self._found[:count].copy()

    def _is_locked(self, pointer: int) -> bool:
        return self._pool.holds(pointer) or cuda.is_pinned(pointer)

    def _send(self, host: int, start: int, stop: int) -> None:
        """What lies there as the images from `start` on, before `stop`."""
        if start < stop:
            self._stream.upload(self._images.pointer + start * self._image_bytes, host,
                                (stop - start) * self._image_bytes)

    def close(self) -> None:
        self._stream.wait()
        for _, graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._stream.close()
        for memory in (self._scratch, self._images, self._scores):
            memory.close()

    def _captured(self, bucket: int) -> tuple[Any, cuda.Graph]:
        """The computation of a bucket as a graph.

        Each graph has a context of its own: one whose shapes change after a capture leaves the graph undefined. The
        contexts share the lane's scratch memory, since a stream runs one at a time.
        """
        context = context_in(self._engine, self._scratch, self._stream)
        shape = (bucket, *tuple(self._engine.get_tensor_shape(self._input))[1:])
        if not context.set_input_shape(self._input, shape):
            raise ValueError(f"TensorRT refuses a batch of {shape}")
        context.set_tensor_address(self._input, self._images.pointer)
        context.set_tensor_address(self._output, self._scores.pointer)
        self._compute(context)  # the first run of a shape sets up what may not be set up while capturing
        self._stream.wait()
        with cuda.capture(self._stream) as graphs:
            self._compute(context)
        return context, graphs[0]

    def _compute(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.number):
            raise cuda.CudaError("TensorRT could not start the computation; its log above says why")
