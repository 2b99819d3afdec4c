"""Orders to delete: carried out whole, by whoever comes, or taken back."""

import threading
from pathlib import Path

import pytest

from shared import deletions
from shared.artifacts import write_json
from shared.deletions import _written
from shared.errors import Unavailable


@pytest.fixture
def there(root: Path) -> list[str]:
    for folder in ("models/m-1", "variants/m-1/onnx-fp32"):
        (root / folder).mkdir(parents=True)
        (root / folder / "data").write_bytes(b"bytes")
    (root / "cards").mkdir()
    (root / "cards/m-1.json").write_text("{}")
    return ["models/m-1", "variants/m-1", "cards/m-1.json"]


def orders(root: Path) -> list[str]:
    return [path.suffix for path in (root / "jobs/.deletions").iterdir()]


def test_what_a_keeper_had_begun_when_it_died_is_finished(root: Path, there: list[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(root / "jobs/.deletions/0a.begun", ["never/was", *there])
    rename, done = deletions.os.rename, []

    def dies(old: Path, new: Path) -> None:
        if len(done) == 2:  # what never was, the first target
            raise KeyboardInterrupt
        done.append(old)
        rename(old, new)

    monkeypatch.setattr(deletions.os, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        deletions.carry_out(root)
    monkeypatch.undo()
    assert (orders(root), (root / there[0]).exists(), (root / there[2]).exists()) == ([".begun"], False, True)
    deletions.carry_out(root)
    assert orders(root) == []
    assert not any((root / target).exists() for target in there)


def test_an_order_that_fails_is_kept_and_keeps_no_other_waiting(root: Path, there: list[str],
                                                                caplog: pytest.LogCaptureFixture) -> None:
    (root / "jobs/.deletions").mkdir(parents=True)
    (root / "jobs/.deletions/0a.begun").write_text("no JSON")
    write_json(root / "jobs/.deletions/0b.begun", there)
    told: set[str] = set()
    for _ in range(3):
        deletions.carry_out(root, told)
    assert orders(root) == [".begun"]
    assert caplog.text.count("0a.begun can't be carried out yet") == 1
    assert list((root / ".staging").iterdir()) == []
    assert not any((root / target).exists() for target in there)


def test_who_gave_it_waits_for_its_end_and_is_told_while_it_does_not_come(root: Path, there: list[str],
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletions, "BEGUN_S", 0.1)
    folder, stop = root / "jobs/.deletions", threading.Event()

    def begins_and_dies() -> None:
        while not stop.wait(0.01):
            for order in folder.glob("[0-9a-f]*.json"):
                order.rename(order.with_suffix(".begun"))

    thread = threading.Thread(target=begins_and_dies)
    thread.start()
    with pytest.raises(Unavailable, match="the keeper can't finish it yet"):
        deletions.delete(root, None, there)
    stop.set()
    thread.join()
    deletions.carry_out(root)
    assert not any((root / target).exists() for target in there)


def test_what_nobody_waits_for_any_more_is_not_carried_out(root: Path, there: list[str]) -> None:
    order = root / "jobs/.deletions/0a.json"
    with _written(order, there):
        pass  # who gave it died: its lock is free
    assert order.exists()
    deletions.carry_out(root)
    assert not order.exists()
    assert all((root / target).exists() for target in there)
    with _written(order, there):
        deletions.carry_out(root)
    assert not any((root / target).exists() for target in there)
