"""What must hold of an engine on the GPU it was built on. benchmarks/tensorrt_gpu.py runs the same checks.

Each takes an empty folder, the ONNX file, its plan file, the precision and an open TensorRTSession of the plan.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from onnx import load as load_proto
from onnx import numpy_helper

from optimization import refitting
from optimization.engine import ensure
from shared.artifacts import sha256
from shared.errors import Damaged
from shared.runtimes import TOLERANCE, compare_golden, cuda, run_in_chunks
from shared.runtimes.onnx import OnnxSession
from shared.runtimes.plan import Unfit, here, path_of, read, save
from shared.runtimes.tensorrt import ROOM, TensorRTSession, buckets_up_to


def pixels(session: Any, count: int) -> np.ndarray:
    shape = session.pinned(1).shape[1:]
    return np.random.default_rng(3).integers(0, 256, (count, *shape), dtype=np.uint8)


def answers_as_its_onnx_file_does(folder: Path, onnx: Path, plan: Path, precision: str, session: Any) -> None:
    images = pixels(session, 256)
    expected = run_in_chunks(OnnxSession(onnx), images)
    worst = float(np.abs(run_in_chunks(session, images) - expected).max())
    assert worst <= TOLERANCE[precision], worst


def batches_of_every_size_answer_as_single_images_do(folder: Path, onnx: Path, plan: Path, precision: str,
                                                     session: Any) -> None:
    most = buckets_up_to(session.header.batches[2])[-1]
    images = pixels(session, 3 * most + 17)
    some = np.linspace(0, len(images) - 1, 64).astype(int)
    singles = np.concatenate([session.run(images[i:i + 1]) for i in some])
    assert len(np.unique(singles, axis=0)) > 16
    whole = session.run(images)
    assert whole.shape == (len(images), singles.shape[1])
    assert np.abs(whole[some] - singles).max() <= TOLERANCE[precision]
    pinned = session.pinned(len(images))
    pinned[:] = images
    assert np.array_equal(session.run(pinned), whole)
    for count in (1, 2, 7, 8, 9, 63, 64, 65, 200, most - 1, most, most + 1, 2 * most + 1, 1):
        got = session.run(images[:count])
        assert np.abs(got - whole[:count]).max() <= TOLERANCE[precision], count
    assert np.array_equal(session.run(images[:64:2, :, ::-1]), session.run(images[:64:2, :, ::-1].copy()))


def two_batches_under_way_answer_as_one_after_the_other(folder: Path, onnx: Path, plan: Path, precision: str,
                                                         session: Any) -> None:
    """From plain and page-locked memory in turns; what was lent is lent again once nothing refers to it."""
    images, rng = pixels(session, 1200), np.random.default_rng(5)
    expected = session.run(images[:600]), session.run(images[600:])
    size, addresses = images[0].nbytes, set[int]()
    for _ in range(30):
        begun = []
        for half in (images[:600], images[600:]):
            cuts = [0, *sorted(rng.integers(1, 600, 4).tolist()), 600]
            parts = [half[start:stop] for start, stop in pairwise(cuts) if start < stop]
            for number in range(0, len(parts), 2):
                lent = np.frombuffer(session.room(7 + parts[number].nbytes)[7:], np.uint8).reshape(parts[number].shape)
                lent[:] = parts[number]
                parts[number] = lent
                addresses.add(lent.ctypes.data)
            begun.append(session.begin(parts))
        while not begun[1].is_over():
            pass
        for one, scores in zip(begun, expected, strict=True):
            assert np.abs(one.scores() - scores).max() <= TOLERANCE[precision]
        del begun, parts, lent
    assert len(addresses) < 30, len(addresses)
    assert all(cuda.is_pinned(address) for address in addresses)
    held = [session.room(ROOM >> 2) for _ in range(4)]
    plain = np.frombuffer(held[-1], np.uint8)[:300 * size].reshape(300, *images.shape[1:])
    assert not cuda.is_pinned(plain.ctypes.data)  # others have a part
    plain[:] = images[:300]
    assert np.abs(session.run(plain) - expected[0][:300]).max() <= TOLERANCE[precision]


def refusal(error: type[Exception], call: Callable[[], object]) -> str:
    """What `call` says when it is refused."""
    try:
        call()
    except error as e:
        return str(e)
    raise AssertionError(f"expected {error.__name__}, and nothing was raised")


def refuses(path: Path, error: type[Exception], words: str) -> None:
    said = refusal(error, lambda: TensorRTSession(path))
    assert words in said, said


def a_plan_for_another_gpu_or_version_or_file_is_refused(folder: Path, onnx: Path, plan: Path, precision: str,
                                                         session: Any) -> None:
    header, data = read(plan, here())
    fake = folder / "fake.plan"
    for field, value, words in (("capability", "12.0", "compute capability 12.0"), ("gpu", "Another", "GPU Another"),
                                ("tensorrt", "9.9.9", "TensorRT 9.9.9")):
        save(fake, dataclasses.replace(header, host=dataclasses.replace(header.host, **{field: value})), data)
        refuses(fake, Unfit, words)
    another = hashlib.sha256(b"another").hexdigest()
    assert "ONNX file" in refusal(Unfit, lambda: TensorRTSession(plan, another))


def a_truncated_or_changed_plan_is_refused(folder: Path, onnx: Path, plan: Path, precision: str, session: Any) -> None:
    whole = plan.read_bytes()
    for kept in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (folder / "short.plan").write_bytes(whole[:kept])
        refuses(folder / "short.plan", Damaged, "built anew")
    (folder / "flipped.plan").write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    refuses(folder / "flipped.plan", Damaged, "built anew")
    save(folder / "nonsense.plan", session.header, b"no plan at all")
    refuses(folder / "nonsense.plan", Damaged, "refused by TensorRT")


def an_engine_that_fails_its_golden_batch_never_stands(folder: Path, onnx: Path, plan: Path, precision: str,
                                                       session: Any) -> None:
    """Planted: a golden batch with the classes exchanged. What stood before, a damaged plan, is not replaced."""
    engines = folder / "engines"
    images = pixels(session, 32)
    planted = np.roll(session.run(images), 1, axis=1)
    timings = engines / "timings"
    timings.mkdir(parents=True)
    for cache in (plan.parent / "timings").glob("*.cache"):
        (timings / cache.name).write_bytes(cache.read_bytes())
    stands = path_of(engines, onnx, here())
    stands.write_bytes(b"damaged")
    said = refusal(Damaged, lambda: ensure(
        engines, onnx, precision, session.header.batches,
        lambda fresh: compare_golden(planted, fresh.run(images), precision, "planted")))
    assert "golden batch is off" in said, said
    assert stands.read_bytes() == b"damaged"
    path, header = ensure(engines, onnx, precision, session.header.batches, lambda fresh: None)
    assert (path, header.onnx_sha256) == (stands, sha256(onnx))
    made = path.stat().st_mtime_ns
    assert ensure(engines, onnx, precision, session.header.batches, lambda fresh: None)[0].stat().st_mtime_ns == made


def a_refitted_engine_answers_as_its_own_onnx_file_does(folder: Path, onnx: Path, plan: Path, precision: str,
                                                        session: Any) -> None:
    """That of a network with other weights, from the engine of this one, and nothing is chosen. int8 is built anew."""
    engines, other, steps = folder / "engines", folder / "other.onnx", list[str]()
    shutil.copytree(plan.parent / "timings", engines / "timings")
    proto = load_proto(onnx)
    for weight in proto.graph.initializer:
        if weight.data_type in refitting.WEIGHTS:
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float16(1.125), weight.name))
    other.write_bytes(proto.SerializeToString())

    def ensured(model: Path) -> Path:
        steps.clear()
        return ensure(engines, model, precision, session.header.batches, lambda fresh: None,
                      lambda phase, step, of: steps.append(phase), refit=True)[0]

    ensured(onnx)
    assert steps
    refitted = ensured(other)
    assert bool(steps) == (precision == "int8")
    images = pixels(session, 64)
    with closing(TensorRTSession(refitted)) as found:
        worst = float(np.abs(run_in_chunks(found, images) - run_in_chunks(OnnxSession(other), images)).max())
    assert worst <= TOLERANCE[precision], worst


CHECKS = [answers_as_its_onnx_file_does, batches_of_every_size_answer_as_single_images_do,
          two_batches_under_way_answer_as_one_after_the_other,
          a_plan_for_another_gpu_or_version_or_file_is_refused, a_truncated_or_changed_plan_is_refused,
          an_engine_that_fails_its_golden_batch_never_stands, a_refitted_engine_answers_as_its_own_onnx_file_does]
