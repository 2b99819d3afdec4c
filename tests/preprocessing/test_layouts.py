"""What the folders of a source mean."""

from collections.abc import Callable
from pathlib import Path

import pytest

from preprocessing.layouts import Layout, read_layout
from shared.errors import Refused
from shared.tree import Member, Tree, scan


def layout_of(*paths: str) -> Layout:
    return read_layout(Tree("folder", sorted(Member(p) for p in paths), folder="/nowhere"))


def listed(layout: Layout) -> set[tuple[str, str, int]]:
    return {(m.path, layout.labels[c], s) for m, c, s in zip(layout.members, layout.codes, layout.splits, strict=True)}


def test_one_folder_a_class() -> None:
    layout = layout_of("dog/1.jpg", "cat/2.png", "cat/deeper/3.webp")
    assert layout.labels == ("cat", "dog")
    assert listed(layout) == {("dog/1.jpg", "dog", 0), ("cat/2.png", "cat", 0), ("cat/deeper/3.webp", "cat", 0)}


def test_one_wrapping_folder_is_looked_through() -> None:
    assert listed(layout_of("pets/cat/1.jpg", "pets/dog/2.jpg", "pets/README.md")) == {
        ("pets/cat/1.jpg", "cat", 0), ("pets/dog/2.jpg", "dog", 0)}


@pytest.mark.parametrize("wrapper", ["", "pets/"])
@pytest.mark.parametrize("validation", ["validation", "val", "valid", "Val"])
def test_splits_on_top(wrapper: str, validation: str) -> None:
    layout = layout_of(*(f"{wrapper}{s}/{c}/1.jpg" for s in ("train", validation, "test") for c in ("cat", "dog")))
    assert layout.labels == ("cat", "dog")
    assert sorted(layout.splits) == [0, 0, 1, 1, 2, 2]


def test_a_class_may_be_called_train_beside_others() -> None:
    assert layout_of("train/1.jpg", "bus/2.jpg", "car/3.jpg").labels == ("bus", "car", "train")


def test_splits_beside_what_is_none_are_refused() -> None:
    paths = [f"{split}/{label}/1.jpg" for split in ("train", "test") for label in ("cat", "dog")]
    with pytest.raises(Refused, match="'extras' is no split: take it out") as e:
        layout_of(*paths, "extras/1.jpg")
    assert e.value.code == "bad_dataset"
    assert layout_of("train/ice/1.jpg", "bus/2.jpg", "car/3.jpg").labels == ("bus", "car", "train")


@pytest.mark.parametrize(("tops", "flat"), [
    (("seg_train", "seg_test"), "seg_pred"), (("seg_train", "seg_test"), ""), (("train",), "test_images"),
    (("Training", "Test-set"), "")])
def test_folders_that_only_look_like_splits_do_not_become_classes(tops: tuple[str, ...], flat: str) -> None:
    paths = [f"{top}/{label}/1.jpg" for top in tops for label in ("cat", "dog")]
    with pytest.raises(Refused, match="is no split: take it out, or call it"):
        layout_of(*paths, *([f"{flat}/1.jpg"] if flat else []))


def test_training_and_testing_are_splits() -> None:
    layout = layout_of(*(f"{split}/{label}/1.jpg" for split in ("Training", "Testing") for label in ("cat", "dog")))
    assert (layout.labels, sorted(layout.splits)) == (("cat", "dog"), [0, 0, 2, 2])


def test_clutter_is_no_image() -> None:
    layout = layout_of("cat/1.jpg", "dog/2.jpg", "cat/.DS_Store", "__MACOSX/cat/._1.jpg", "dog/Thumbs.db", ".git/x")
    assert {m.path for m in layout.members} == {"cat/1.jpg", "dog/2.jpg"}


@pytest.mark.parametrize(("paths", "found"), [
    ([], "holds no files"),
    ([".DS_Store"], "holds no files"),
    (["1.jpg", "2.jpg"], "2 files and no folders, such as '1.jpg': the labels are missing"),
    (["images/1.jpg", "images/2.jpg"], "1 class, 'images', with 2 files"),
    (["pets/cat/1.jpg", "pets/cat/2.jpg"], "1 class, 'cat', with 2 files"),
    (["train/1.jpg", "test/2.jpg"], "directly in the splits' folders, such as 'test/2.jpg'"),
])
def test_what_can_not_work_says_what_was_found_and_what_is_expected(paths: list[str], found: str) -> None:
    with pytest.raises(Refused, match=f"{found}.*expected one folder a class") as e:
        layout_of(*paths)
    assert e.value.code == "bad_dataset"


@pytest.fixture
def with_csv(tmp_path: Path) -> Callable[..., Layout]:
    def write(text: str | bytes, name: str = "manifest.csv") -> Layout:
        for file in ("a/1.jpg", "b/2.jpg", "3.jpg"):
            (tmp_path / "set" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / file).write_bytes(b"")
        (tmp_path / "set" / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return read_layout(scan(str(tmp_path / "set"), str(tmp_path)))

    return write


@pytest.mark.parametrize("name", ["manifest.csv", "labels.csv", "mine.csv"])
def test_a_manifest_decides_labels(with_csv: Callable[..., Layout], name: str) -> None:
    layout = with_csv("path,label\na/1.jpg,cat\n./3.jpg,dog\n", name)
    assert listed(layout) == {("a/1.jpg", "cat", 0), ("3.jpg", "dog", 0)}


def test_a_manifest_s_columns_may_be_in_any_order(with_csv: Callable[..., Layout]) -> None:
    layout = with_csv('\ufeffSplit, Label ,size,Path\n'
                      'test,"cat, black",9,a/1.jpg\n\nval,dog,9,b/2.jpg\ntrain,dog,9,3.jpg\n')
    assert listed(layout) == {("a/1.jpg", "cat, black", 2), ("b/2.jpg", "dog", 1), ("3.jpg", "dog", 0)}


def test_a_csv_that_is_no_manifest_leaves_the_folders_in_force(with_csv: Callable[..., Layout]) -> None:
    assert with_csv("height,weight\n1,2\n", "animals.csv").labels == ("a", "b")


@pytest.mark.parametrize(("text", "found"), [
    ("file,class\na/1.jpg,cat\n", "columns file, class: expected path,label"),
    ("", r"columns \(none\)"),
    ("path,label\na/1.jpg,cat\na/9.jpg,dog\n../b/2.jpg,dog\n", "names 2 files that are not there, such as 'a/9.jpg'"),
    ("path,label\na/1.jpg,cat\nb/2.jpg,\n", "line 3 has no label"),
    ("path,label\na/1.jpg,cat\nb/2.jpg\n", "line 3 has no label"),
    ("path,label,split\na/1.jpg,cat,holdout\n", "line 2 has the split 'holdout'"),
    ("path,label\na/1.jpg,cat\nb/2.jpg,cat\n", "1 class, 'cat', with 2 files"),
    ('path,label\n"a/1.jpg,cat\n', "can't be read as CSV"),
])
def test_a_manifest_that_can_not_work_is_refused(with_csv: Callable[..., Layout], text: str, found: str) -> None:
    with pytest.raises(Refused, match=found) as e:
        with_csv(text)
    assert e.value.code == "bad_dataset"


def test_a_manifest_in_another_encoding_is_refused(with_csv: Callable[..., Layout]) -> None:
    with pytest.raises(Refused, match="can't be read as CSV in UTF-8"):
        with_csv("path,label\na/1.jpg,käse\n".encode("latin1"))


def test_links_out_of_the_imports_are_refused(tmp_path: Path) -> None:
    imports = tmp_path / "imports"
    (imports / "pets" / "cat").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (imports / "pets" / "cat" / "1.jpg").symlink_to(tmp_path / "secret")
    with pytest.raises(Refused, match="is a link to"):
        scan(str(imports / "pets"), str(imports))


def test_links_to_folders_are_refused_and_links_to_files_inside_are_read(tmp_path: Path) -> None:
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    (tmp_path / "shared.jpg").write_text("x")
    (tmp_path / "pets" / "cat" / "1.jpg").symlink_to(tmp_path / "shared.jpg")
    assert [m.path for m in scan(str(tmp_path / "pets"), str(tmp_path)).members] == ["cat/1.jpg"]
    (tmp_path / "pets" / "loop").symlink_to(tmp_path / "pets")
    with pytest.raises(Refused, match="is a link to"):
        scan(str(tmp_path / "pets"), str(tmp_path))
