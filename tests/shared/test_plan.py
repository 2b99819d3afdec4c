"""A plan file is read by the host it was built for alone, and only whole: no GPU is needed to refuse it."""

import dataclasses

import pytest

from shared.errors import Damaged
from shared.runtimes.plan import MAGIC, Header, Host, Unfit, path_of, read, save

HERE = Host("11.4.0", "NVIDIA H100 80GB HBM3", "9.0")
HEADER = Header("ab" * 32, "fp16", HERE, "580.65", (1, 64, 1024))
PLAN = bytes(range(256)) * 8


@pytest.fixture
def path(tmp_path):
    save(tmp_path / "a.plan", HEADER, PLAN)
    return tmp_path / "a.plan"


def test_a_plan_comes_back_with_its_header(path):
    assert read(path, HERE) == (HEADER, PLAN)
    assert read(path, HERE, "ab" * 32) == (HEADER, PLAN)


@pytest.mark.parametrize(("field", "value", "words"), [
    ("capability", "12.0", "compute capability 9.0, here it is 12.0"),
    ("gpu", "NVIDIA L4", "GPU NVIDIA H100 80GB HBM3, here it is NVIDIA L4"),
    ("tensorrt", "10.9.0", "TensorRT 11.4.0, here it is 10.9.0"),
])
def test_a_plan_for_another_host_is_refused_and_the_sentence_says_which(path, field, value, words):
    with pytest.raises(Unfit, match=words):
        read(path, dataclasses.replace(HERE, **{field: value}))


def test_a_plan_of_another_onnx_file_is_refused(path):
    with pytest.raises(Unfit, match="built for ONNX file abab"):
        read(path, HERE, "cd" * 32)


def test_another_driver_alone_is_no_reason_to_refuse(path):
    save(path, dataclasses.replace(HEADER, driver="999.1"), PLAN)
    assert read(path, HERE)[0].driver == "999.1"


def test_a_missing_plan_is_told_from_a_damaged_one(tmp_path):
    with pytest.raises(Unfit, match="no engine was built for NVIDIA H100") as caught:
        read(tmp_path / "none.plan", HERE)
    assert caught.value.code == "plan_missing"


def test_a_plan_cut_anywhere_is_refused(path):
    whole = path.read_bytes()
    for kept in [*range(0, 420, 7), len(whole) - len(PLAN), len(whole) - 1]:
        path.write_bytes(whole[:kept])
        with pytest.raises(Damaged, match="it is built anew from its ONNX file"):
            read(path, HERE)


@pytest.mark.parametrize("at", [0, len(MAGIC) + 3, len(MAGIC) + 6, -1], ids=["magic", "length", "header", "plan"])
def test_a_flipped_byte_is_refused(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(Damaged, match="it is built anew from its ONNX file"):
        read(path, HERE)


def test_a_longer_file_is_refused(path):
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(Damaged, match="2049 bytes of plan, expected 2048"):
        read(path, HERE)


def test_plans_of_other_files_and_hosts_have_other_names(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    hosts = [HERE, *(dataclasses.replace(HERE, **{f: "1.2"}) for f in ("tensorrt", "gpu", "capability"))]
    names = {path_of(tmp_path, tmp_path / name, host).name for name in ("a", "b") for host in hosts}
    assert len(names) == 8
    assert all(name.replace(".", "").replace("-", "").isalnum() for name in names)
