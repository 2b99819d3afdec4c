"""What the folders of a source mean: one folder a class, splits on top, or a CSV manifest."""

import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median

from preprocessing.tree import Member, Tree, read
from shared.errors import Refused
from shared.images import measure

EXPECTED = ("expected one folder a class with its images, if wanted below train/, validation/ and test/, "
            "or a CSV manifest with the columns path,label[,split]")
SPLIT_NAMES = {"train": 0, "validation": 1, "val": 1, "valid": 1, "test": 2}
MANIFESTS = ("manifest.csv", "labels.csv")
SIZES = (32, 64, 128, 224)
SAMPLE = 512
Placed = tuple[list[str], Member]  # a file and its path's parts below the wrapping folder
Labelled = tuple[Member, str, int]  # an image, its label, its split


@dataclass
class Layout:
    """labels: the classes' names in order. members, codes, splits: per image its file, its class and its split."""

    labels: tuple[str, ...] = ()
    members: list[Member] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    splits: list[int] = field(default_factory=list)


def read_layout(tree: Tree) -> Layout:
    """Find the layout of a source and list its images.

    Raises:
        Refused: (bad_dataset) with what was found and what is expected.
    """
    files = [(m.path.split("/"), m) for m in tree.members if not _is_clutter(m.path)]
    if not files:
        raise Refused(f"the source holds no files: {EXPECTED}", "bad_dataset")
    tops = {parts[0] for parts, _ in files}
    if len(tops) == 1 and min(len(parts) for parts, _ in files) > 1 and tops.isdisjoint(SPLIT_NAMES):
        inner = [(parts[1:], m) for parts, m in files]
        # A folder that holds images only is a class, not a wrapper.
        if any(len(parts) > 1 or _is_csv(parts) for parts, _ in inner):
            files = inner
    manifest = _manifest([(parts, m) for parts, m in files if _is_csv(parts)])
    rows = _from_csv(tree, manifest, files) if manifest else None
    return _layout(rows if rows is not None else _from_folders(files))


def _is_clutter(path: str) -> bool:
    rooted = f"/{path}"
    return "/." in rooted or "/__MACOSX/" in rooted or rooted.endswith(("/Thumbs.db", "/desktop.ini"))


def _is_csv(parts: list[str]) -> bool:
    return len(parts) == 1 and parts[0].lower().endswith(".csv")


def _manifest(csvs: list[Placed]) -> Member | None:
    for parts, member in csvs:
        if parts[0].lower() in MANIFESTS:
            return member
    return csvs[0][1] if len(csvs) == 1 else None


def _from_folders(files: list[Placed]) -> Iterator[Labelled]:
    """The images by the names of their folders. Files beside the class folders are no images of any class."""
    deep = [(parts, m) for parts, m in files if len(parts) > 1]
    if not deep:
        raise Refused(f"the source has {len(files)} files and no folders, such as {files[0][0][-1]!r}: the labels are "
                      f"missing; {EXPECTED}", "bad_dataset")
    if all(parts[0].lower() in SPLIT_NAMES for parts, _ in deep):
        flat = [m.path for parts, m in deep if len(parts) == 2]
        if len(flat) == len(deep):
            raise Refused(f"the images lie directly in the splits' folders, such as {flat[0]!r}: the labels are "
                          f"missing; {EXPECTED}", "bad_dataset")
        return ((m, parts[1], SPLIT_NAMES[parts[0].lower()]) for parts, m in deep if len(parts) > 2)
    return ((m, parts[0], 0) for parts, m in deep)


def _from_csv(tree: Tree, manifest: Member, files: list[Placed]) -> list[Labelled] | None:
    """The images that a manifest names; None when a CSV of another name has other columns: it is something else."""
    name = manifest.path
    try:
        text = read(tree.kind, tree.folder, tree.fd, manifest).decode("utf-8-sig")
        table = csv.reader(io.StringIO(text), strict=True)
        columns = [c.strip().lower() for c in next(table, [])]
        if "path" not in columns or "label" not in columns:
            if name.rsplit("/", 1)[-1].lower() not in MANIFESTS:
                return None
            raise Refused(f"{name} has the columns {', '.join(columns) or '(none)'}: expected path,label and if wanted "
                          "split, in its first line", "bad_dataset")
        known = {"/".join(parts): m for parts, m in files}
        return list(_csv_rows(name, table, columns, known))
    except (UnicodeDecodeError, csv.Error) as e:
        raise Refused(f"{name} can't be read as CSV in UTF-8 ({e})", "bad_dataset") from None


def _csv_rows(name: str, table: Iterable[list[str]], columns: list[str],
              known: dict[str, Member]) -> Iterator[Labelled]:
    absent: list[str] = []
    for number, row in enumerate(table, 2):
        if not row:
            continue
        values = dict(zip(columns, (value.strip() for value in row), strict=False))
        path = "/".join(p for p in values.get("path", "").split("/") if p not in ("", "."))
        label, split = values.get("label", ""), values.get("split", "train").lower()
        if not label:
            raise Refused(f"{name} line {number} has no label: expected path,label[,split]", "bad_dataset")
        if split not in SPLIT_NAMES:
            raise Refused(f"{name} line {number} has the split {split!r}: expected train, validation or test",
                          "bad_dataset")
        if path not in known:
            absent.append(path)
            continue
        yield known[path], label, SPLIT_NAMES[split]
    if absent:
        raise Refused(f"{name} names {len(absent)} files that are not there, such as {absent[0]!r}: expected paths "
                      "relative to the CSV file", "bad_dataset")


def _layout(images: Iterable[Labelled]) -> Layout:
    listed = list(images)
    labels = tuple(sorted({label for _, label, _ in listed}))
    if len(labels) < 2:
        found = f"1 class, {labels[0]!r}, with {len(listed)} files" if labels else "no images"
        raise Refused(f"found {found}: a classifier needs at least 2 classes; {EXPECTED}", "bad_dataset")
    code = {label: i for i, label in enumerate(labels)}
    return Layout(labels, [m for m, _, _ in listed], [code[label] for _, label, _ in listed], [s for _, _, s in listed])


def pick_size(tree: Tree, layout: Layout) -> int:
    """The one of SIZES that is nearest to the median shorter side of about SAMPLE images, spread over the source."""
    sides = []
    for i in range(0, len(layout.members), max(len(layout.members) // SAMPLE, 1)):
        with suppress(Refused, OSError):
            sides.append(min(measure(read(tree.kind, tree.folder, tree.fd, layout.members[i]))))
    return min(SIZES, key=lambda size: abs(size - median(sides))) if sides else SIZES[0]
