"""What the folders of a source mean: one folder a class, splits on top, or a CSV manifest."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median

from shared.errors import Refused
from shared.images import measure
from shared.tree import Member, Tree, is_clutter, read

EXPECTED = ("expected one folder a class with its images, if wanted below train/, validation/ and test/, "
            "or a CSV manifest with the columns path,label[,split]")
SPLIT_NAMES = {"train": 0, "training": 0, "validation": 1, "val": 1, "valid": 1, "test": 2, "testing": 2}
MANIFESTS = ("manifest.csv", "labels.csv")
SIZES = (32, 64, 128, 224)
SAMPLE = 512
Columns = tuple[list[Member], list[str], list[int]]  # the images, their labels, their splits


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
    files = [m for m in tree.members if not is_clutter(m.path)]
    if not files:
        raise Refused(f"the source holds no files: {EXPECTED}", "bad_dataset")
    skip = len(_wrapper(files))
    manifest = _manifest([m for m in files if m.path.find("/", skip) < 0 and _is_csv(m.path)])
    images = _from_csv(tree, manifest, files, skip) if manifest else None
    return _layout(*(images if images is not None else _from_folders(files, skip)))


def _is_csv(path: str) -> bool:
    return path.lower().endswith(".csv")


def _wrapper(files: list[Member]) -> str:
    """The one folder, with its slash, that everything lies in, if it is neither a split nor a class; else empty."""
    top, slash, _ = files[0].path.partition("/")
    root = top + slash
    if not slash or top in SPLIT_NAMES or not all(m.path.startswith(root) for m in files):
        return ""
    # A folder that holds images only is a class, not a wrapper.
    return root if any(m.path.find("/", len(root)) > 0 or _is_csv(m.path) for m in files) else ""


def _manifest(csvs: list[Member]) -> Member | None:
    for member in csvs:
        if member.path.rsplit("/", 1)[-1].lower() in MANIFESTS:
            return member
    return csvs[0] if len(csvs) == 1 else None


def _from_folders(files: list[Member], skip: int) -> Columns:
    """The images by the names of their folders. Files beside the class folders are no images of any class.

    The first `skip` characters of every path are the wrapping folder.
    """
    tops = [m.path[skip:end] if (end := m.path.find("/", skip)) > 0 else "" for m in files]
    folders = {top for top in tops if top}
    if not folders:
        raise Refused(f"the source has {len(files)} files and no folders, such as {files[0].path[skip:]!r}: the labels "
                      f"are missing; {EXPECTED}", "bad_dataset")
    if not all(folder.lower() in SPLIT_NAMES for folder in folders):
        _refuse_splits_among(folders, [m.path[skip:] for m in files])
        labels = [top for top in tops if top]
        return [m for m, top in zip(files, tops, strict=True) if top], labels, [0] * len(labels)
    if not any(m.path.count("/", skip) > 1 for m in files):
        flat = next(m.path for m in files if "/" in m.path[skip:])
        raise Refused(f"the images lie directly in the splits' folders, such as {flat!r}: the labels are missing; "
                      f"{EXPECTED}", "bad_dataset")
    members = [m for m in files if m.path.count("/", skip) > 1]
    parts = [m.path[skip:].split("/", 2) for m in members]
    return members, [label for _, label, _ in parts], [SPLIT_NAMES[top.lower()] for top, _, _ in parts]


def _refuse_splits_among(folders: set[str], paths: Sequence[str]) -> None:
    """Refuse folders of which some hold the classes of splits and others are no splits: what is a class here?

    A folder `train` with folders in it may be a class; with `test`, or seg_train with seg_test, beside it it is none.
    """
    splits = {top: SPLIT_NAMES[word] for top in folders
              if (word := next((w for w in re.split("[^a-z]+", top.lower()) if w in SPLIT_NAMES), ""))}
    holders = splits.keys() & {path.split("/", 1)[0] for path in paths if path.count("/") > 1}
    if holders and len(set(splits.values())) > 1:
        others = sorted(folder for folder in folders if folder.lower() not in SPLIT_NAMES)
        raise Refused(f"{' and '.join(sorted(holders))} hold folders, as splits do, and {others[0]!r} is no split: "
                      f"take it out, or call it as one of these is called: {', '.join(SPLIT_NAMES)}", "bad_dataset")


def _from_csv(tree: Tree, manifest: Member, files: list[Member], skip: int) -> Columns | None:
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
        return _csv_rows(name, table, columns, {m.path[skip:]: m for m in files})
    except (UnicodeDecodeError, csv.Error) as e:
        raise Refused(f"{name} can't be read as CSV in UTF-8 ({e})", "bad_dataset") from None


def _csv_rows(name: str, table: Iterable[list[str]], columns: list[str],
              known: dict[str, Member]) -> Columns:
    members: list[Member] = []
    labels: list[str] = []
    splits: list[int] = []
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
        if path not in known:  # as Windows writes it
            path = path.replace("\\", "/")
        if path not in known:
            absent.append(path)
            continue
        members.append(known[path])
        labels.append(label)
        splits.append(SPLIT_NAMES[split])
    if absent:
        raise Refused(f"{name} names {len(absent)} files that are not there, such as {absent[0]!r}: expected paths "
                      "relative to the CSV file", "bad_dataset")
    return members, labels, splits


def _layout(members: list[Member], names: list[str], splits: list[int]) -> Layout:
    labels = tuple(sorted(set(names)))
    if len(labels) < 2:
        found = f"1 class, {labels[0]!r}, with {len(names)} files" if labels else "no images"
        raise Refused(f"found {found}: a classifier needs at least 2 classes; {EXPECTED}", "bad_dataset")
    code = {label: i for i, label in enumerate(labels)}
    return Layout(labels, members, [code[name] for name in names], splits)


def pick_size(tree: Tree, layout: Layout) -> int:
    """The one of SIZES that is nearest to the median shorter side of about SAMPLE images, spread over the source."""
    sides = []
    for i in range(0, len(layout.members), max(len(layout.members) // SAMPLE, 1)):
        with suppress(Refused, OSError):
            sides.append(min(measure(read(tree.kind, tree.folder, tree.fd, layout.members[i]))))
    return min(SIZES, key=lambda size: abs(size - median(sides))) if sides else SIZES[0]
