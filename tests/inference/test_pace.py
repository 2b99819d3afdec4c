"""What nobody waits for gives way to live images, and comes to its end nevertheless."""

import time
from pathlib import Path

import numpy as np

from inference.memory import Memory
from inference.metrics import Meters
from inference.pace import Pace
from shared.runtimes import FEW, open_session

from .conftest import publish_variant


def test_it_rests_until_no_image_runs_and_comes_to_its_turn_where_they_never_cease() -> None:
    looks = iter([True, True, False])
    pace = Pace(lambda: next(looks))
    time.sleep(0.3)  # the work of a piece: so long it rests at most
    pace.rest()
    assert list(looks) == []
    always = Pace(lambda: True)
    began = time.monotonic()
    time.sleep(0.05)
    always.rest()
    assert time.monotonic() - began >= 0.1


def test_a_variant_that_loads_gives_way_between_a_few_images(root: Path) -> None:
    publish_variant(root, "m-1")
    rests: list[None] = []
    session, _ = open_session(root, "m-1", "onnx-fp32", between=lambda: rests.append(None))
    session.close()
    assert len(rests) == 16 // FEW  # images of the golden batch
    memory = Memory(root, Meters(), cores=1)
    try:
        first = memory.get(("m-1", "onnx-fp32"))
        first.predictor._count += 1  # an image that never ceases to run
        publish_variant(root, "m-2", weights=np.eye(3)[::-1] * 0.05)
        assert memory.get(("m-2", "onnx-fp32")).spec == first.spec
        first.predictor._count -= 1
    finally:
        memory.close()
