"""ONNX -> TensorRT plan, on the GPU it is for. The precision is in the ONNX file already."""

import logging
import os
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import tensorrt as trt

from optimization import refitting
from shared import gpu
from shared.artifacts import locked, sha256, write_bytes
from shared.errors import Damaged, LannerError
from shared.runtimes import Session
from shared.runtimes.plan import Header, Host, Unfit, here, path_of, read, save, slug
from shared.runtimes.tensorrt import LOGGER, TensorRTSession

log = logging.getLogger("lanner.optimization")
WORKSPACE = 2 << 30  # bytes that a kernel may use beside its inputs and outputs while it is chosen
Progress = Callable[[str, int, int], None]  # (phase, step, of); may raise, which ends the build


def silent(phase: str, step: int, of: int) -> None:
    """Progress that nobody wants."""


def ensure(engines: Path, onnx: Path, precision: str, batches: tuple[int, int, int], check: Callable[[Session], None],
           progress: Progress = silent, refit: bool = False) -> tuple[Path, Header]:
    """The plan file of an ONNX file for this host: the one that stands, or a new one once `check` has let it pass.

    refit: new ones are made so that they can be refitted, and of such a one with the same graph, if there is one.

    Raises:
        Unfit: there is no TensorRT or no GPU here.
        Damaged: the engine can't be built, or `check` refuses its Session; what stood before stands still.
    """
    host, digest, refit = here(), sha256(onnx), refit and precision in refitting.PRECISIONS
    path = path_of(engines, onnx, host)
    try:
        header, _ = read(path, host, digest)
        if (header.batches, header.refit) == (batches, refit):
            return path, header
    except (Unfit, Damaged):
        pass

    def stand(plan: bytes) -> tuple[Path, Header]:
        header = Header(digest, precision, host, next((g.driver for g in gpu.find()), ""), batches, refit)
        fresh = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
        try:
            save(fresh, header, plan)
            with closing(TensorRTSession(fresh, digest)) as session:
                check(session)
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)
        return path, header

    model = onnx.read_bytes()
    graph = refitting.graph_of(model) if refit else ""
    if graph and (plan := refitting.refitted(engines, graph, model, host, batches)):
        try:
            return stand(plan)
        except LannerError as e:
            log.warning("the refitted engine is refused and built anew: %s", e)
    built = stand(build_plan(model, precision, batches, timing_cache(engines, host), progress, refit))
    if graph:
        refitting.note(engines, graph, path, host)
    return built


def build_plan(onnx: bytes, precision: str, batches: tuple[int, int, int], timing: Path, progress: Progress = silent,
               refittable: bool = False) -> bytes:
    """A plan for this process's GPU, for batches from the least to the largest, fastest at the usual one.

    timing: a file of kernel timings, read and added to; what was timed once is not timed again. It is good for one
    GPU model and TensorRT version: `timing_cache` names it. From TensorRT 10 on, `progress` hears of each phase as it
    goes; 8.6 can't be asked or stopped while it builds.

    Raises:
        Damaged: TensorRT can't read the graph, or can't build it.
        Exception: whatever `progress` raised.
    """
    builder = trt.Builder(LOGGER)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means float32: the fp16 engine is the one for speed
    flags = 0
    match trt.__version__.partition(".")[0]:
        case "8":
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
            for flag in {"fp32": (), "fp16": ("FP16",), "int8": ("FP16", "INT8")}[precision]:
                config.set_flag(getattr(trt.BuilderFlag, flag))
            # A runner has a context for each size of batch, all of the one profile; from 10 on that needs no word.
            config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
            # Its own kernels alone, as from 10 on: cuBLAS and cuDNN need not be installed.
            config.set_tactic_sources(1 << int(trt.TacticSource.EDGE_MASK_CONVOLUTIONS)
                                      | 1 << int(trt.TacticSource.JIT_CONVOLUTIONS))
        case "9" | "10":
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        case _:
            pass  # 11 is strongly typed and has no flag for it
    if refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, LOGGER)
    if not parser.parse(onnx):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise Damaged(f"TensorRT {trt.__version__} can't read the ONNX graph: {reasons}", "export_failed")
    images = network.get_input(0)
    profile = builder.create_optimization_profile()
    profile.set_shape(images.name, *((n, *tuple(images.shape)[1:]) for n in batches))
    config.add_optimization_profile(profile)
    monitor = watch(config, progress)
    progress("building", 0, 1)
    with locked(timing.with_suffix(".lock")):
        load_timings(config, timing)
        plan = builder.build_serialized_network(network, config)
        if plan is not None:
            write_bytes(timing, bytes(config.get_timing_cache().serialize()))
    if monitor and monitor.error:
        raise monitor.error
    progress("building", 1, 1)
    if plan is None:
        raise Damaged(f"TensorRT {trt.__version__} can't build the {precision} engine; its log says why",
                      "export_failed")
    return bytes(plan)


def timing_cache(engines: Path, host: Host) -> Path:
    """Where the kernel timings of a GPU model and TensorRT version are kept."""
    return engines / "timings" / f"{slug(host)}.cache"


def load_timings(config: Any, path: Path) -> None:
    """Give the builder what was timed before; what TensorRT refuses is left out and overwritten after the build."""
    known = path.read_bytes() if path.exists() else b""
    try:
        cache = config.create_timing_cache(known)
        if cache is not None and config.set_timing_cache(cache, False):
            return
    except (RuntimeError, TypeError, ValueError):
        pass
    config.set_timing_cache(config.create_timing_cache(b""), False)


def watch(config: Any, progress: Progress) -> Any:
    """A progress monitor given to the builder, where TensorRT has one; None where it has not."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):
        """Passes the outermost phase on. Called from the builder's threads, through which nothing may be raised."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phase, self.step, self.of = "", 0, 1
            self.error: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.phase, self.step, self.of = phase_name, 0, num_steps

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.phase:
                self.step = step + 1
            if self.error is None:
                try:
                    progress(self.phase, self.step, self.of)
                except BaseException as e:
                    self.error = e
            return self.error is None

    config.progress_monitor = monitor = Monitor()
    return monitor
