"""TensorRT plans on the GPU: 8.6, 10 and 11, which name their tensors alike.

A batch is padded up to a bucket. Each bucket has a CUDA graph of its computation, captured when it is first asked for.
Images go up from page-locked memory and scores come down into it; what is larger than the largest bucket goes in pieces
through two lanes, so that the copies of one run beside the computation of the other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt

from shared.errors import Damaged
from shared.runtimes import Session, check_batch, check_signature, cuda
from shared.runtimes.plan import Header, here, read

LOGGER = trt.Logger(trt.Logger.WARNING)


def buckets_up_to(most: int) -> list[int]:
    """1, 8, 64, then doubling up to `most`: below 64 images a GPU takes about as long for few as for many."""
    steps = [1, 8, 64]
    while steps[-1] < most:
        steps.append(2 * steps[-1])
    return [*(n for n in steps if n < most), most]


class TensorRTSession(Session):
    """A plan as a Session. A batch from `pinned` is read where it lies; any other is copied into page-locked memory."""

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
        self._lanes = [_Lane(self._engine, self.batches[-1])]
        self._results = cuda.Pinned((self.batches[-1], self._lanes[0].classes), np.float32)

    def pinned(self, count: int) -> np.ndarray:
        """A new page-locked uint8 [count, size, size, 3], which `run` reads without copying it first."""
        return cuda.Pinned((count, self._size, self._size, 3), np.uint8).array

    def stage(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Copied once, into page-locked memory, as far as they fit there."""
        count = sum(map(len, parts))
        if count > self.batches[-1]:
            return super().stage(parts)
        return np.concatenate(parts, out=self._lanes[0].staged[:count])

    def run(self, batch: np.ndarray) -> np.ndarray:
        """uint8 [N, size, size, 3] -> float32 [N, classes]. Raises ValueError for another dtype or shape."""
        check_batch(batch, self._size)
        count, most = len(batch), self.batches[-1]
        if count > most and len(self._lanes) == 1:
            self._lanes.append(_Lane(self._engine, most))
        direct = batch.flags.c_contiguous and cuda.is_pinned(batch.ctypes.data)
        if count > len(self._results.array):
            self._results = cuda.Pinned((count, self._lanes[0].classes), np.float32)
        scores = self._results.array
        for number, start in enumerate(range(0, count, most)):
            piece, lane = batch[start:start + most], self._lanes[number % len(self._lanes)]
            bucket = next(n for n in self.batches if n >= len(piece))
            lane.begin(piece, direct, bucket, scores[start:start + len(piece)])
        for lane in self._lanes:
            lane.wait()
        return scores[:count].copy()

    def close(self) -> None:
        """Free the GPU's memory. A closed session runs nothing."""
        for lane in self.__dict__.pop("_lanes", []):
            lane.close()
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


class _Lane:
    """A stream with its buffers and the graphs of the buckets that were asked for. One piece at a time."""

    def __init__(self, engine: Any, most: int):
        (self._input,), (self._output,) = tensors(engine)
        shape = tuple(engine.get_tensor_shape(self._input))[1:]
        self.classes = int(engine.get_tensor_shape(self._output)[1])
        self._engine, self._image_bytes = engine, int(np.prod(shape))
        self._stream = cuda.Stream()
        self._scratch = cuda.Memory(scratch_size(engine))
        self._images, self._scores = cuda.Memory(most * self._image_bytes), cuda.Memory(4 * most * self.classes)
        self._staging = cuda.Pinned((most, *shape), np.uint8)
        self.staged = self._staging.array
        self._graphs: dict[int, tuple[Any, cuda.Graph]] = {}  # with its context, whose state it was captured in

    def begin(self, images: np.ndarray, direct: bool, bucket: int, scores: np.ndarray) -> None:
        """Send images up, compute, and fetch their scores into page-locked float32 [N, classes]; `wait` for all that.

        With `direct` the images are page-locked and stay as they are until then. Any others are staged, which waits
        for what the lane has begun; page-locked ones do not, and the GPU always has the next piece at hand.
        """
        if bucket not in self._graphs:
            self._graphs[bucket] = self._captured(bucket)
        if not direct:
            self.wait()
            self.staged[:len(images)] = images
        source = images.ctypes.data if direct else self._staging.pointer
        self._stream.upload(self._images.pointer, source, len(images) * self._image_bytes)
        self._stream.launch(self._graphs[bucket][1])
        self._stream.download(scores.ctypes.data, self._scores.pointer, scores.nbytes)

    def wait(self) -> None:
        """Until everything that was begun is done."""
        self._stream.wait()

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
