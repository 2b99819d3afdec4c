"""Splits, exact copies and contradictions, whatever the images are."""

import hashlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing.rows import Rows, rank_key
from preprocessing.table import Arranged, arrange
from shared.datasets import SPLITS
from shared.errors import Refused

LABELS = ("a", "b", "c")
some = settings(max_examples=25, deadline=None, database=None)


def rows_of(contents: list[int], labels: list[int], splits: list[int] | None = None, seed: int = 0) -> Rows:
    rows = Rows([f"{i:04}" for i in range(len(contents))], np.array(labels, np.int32),
                np.array(splits or [0] * len(contents), np.int8))
    rows.sha256 = [hashlib.sha256(str(c).encode()).hexdigest() for c in contents]
    rows.keys[:] = [rank_key(seed, digest) for digest in rows.sha256]
    return rows


def split_of(arranged: Arranged) -> dict[int, str]:
    return {int(i): split for split in SPLITS for i in arranged.sources[split]}


# Per class at least 12 images of distinct content, then copies of any of them within their class.
@st.composite
def datasets(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    counts = draw(st.lists(st.integers(12, 40), min_size=3, max_size=3))
    contents = list(range(sum(counts)))
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    for copied in draw(st.lists(st.sampled_from(contents), max_size=10)):
        contents.append(copied)
        labels.append(labels[copied])
    return contents, labels


fractions = st.floats(0.01, 0.4)


@some
@given(datasets(), fractions, fractions, st.integers(0, 2**31 - 1))
def test_splits_share_no_content_and_every_class_is_in_each(
        data: tuple[list[int], list[int]], validation: float, test: float, seed: int) -> None:
    contents, labels = data
    arranged = arrange(pd, rows_of(contents, labels, seed=seed), LABELS, validation, test)
    inside = {split: {contents[i] for i in arranged.sources[split]} for split in SPLITS}
    assert not inside["train"] & inside["validation"]
    assert not inside["train"] & inside["test"]
    assert not inside["validation"] & inside["test"]
    assert set().union(*inside.values()) == set(contents)
    for split in SPLITS:
        assert set(arranged.labels[split]) == {0, 1, 2}
        assert [labels[i] for i in arranged.sources[split]] == list(arranged.labels[split])
    assert arranged.duplicates["images"] == len(contents) - len(set(contents))
    assert arranged.duplicates["removed"] == len(contents) - sum(len(s) for s in arranged.sources.values())


@some
@given(st.lists(st.integers(10, 60), min_size=3, max_size=3), fractions, fractions)
def test_every_class_is_cut_by_the_fractions(counts: list[int], validation: float, test: float) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    arranged = arrange(pd, rows_of(list(range(len(labels))), labels), LABELS, validation, test)
    for label, count in enumerate(counts):
        for split, fraction in (("validation", validation), ("test", test)):
            assert abs((arranged.labels[split] == label).sum() - max(count * fraction, 1)) <= 1


@some
@given(st.permutations(range(45)), st.integers(0, 100))
def test_the_order_of_the_source_does_not_matter(order: list[int], seed: int) -> None:
    plain = arrange(pd, rows_of(list(range(45)), [i % 3 for i in range(45)], seed=seed), LABELS, 0.2, 0.2)
    shuffled = arrange(pd, rows_of(order, [i % 3 for i in order], seed=seed), LABELS, 0.2, 0.2)
    for split in SPLITS:
        assert [order[i] for i in shuffled.sources[split]] == list(plain.sources[split])


def test_more_images_leave_the_ranks_of_the_others_as_they_are() -> None:
    few, many = (arrange(pd, rows_of(list(range(n)), [i % 3 for i in range(n)]), LABELS, 0.1, 0.1) for n in (300, 330))
    before, after = split_of(few), split_of(many)
    assert sum(before[i] != after[i] for i in before) < 30


def test_another_seed_cuts_otherwise() -> None:
    one, two = (split_of(arrange(pd, rows_of(list(range(90)), [i % 3 for i in range(90)], seed=s), LABELS, 0.2, 0.2))
                for s in (0, 1))
    assert one != two


def test_an_early_row_may_be_of_any_class() -> None:
    arranged = arrange(pd, rows_of(list(range(300)), [i % 3 for i in range(300)]), LABELS, 0.1, 0.1)
    assert set(arranged.labels["train"][:20]) == {0, 1, 2}


def test_copies_inside_one_given_split_stay_as_they_were_published() -> None:
    contents = [*range(30), 0, 29]
    splits = [0] * 10 + [1] * 10 + [2] * 10 + [0, 2]
    labels = [0, 1] * 5 + [0, 1] * 5 + [0, 1] * 5 + [0, 1]
    arranged = arrange(pd, rows_of(contents, labels, splits), ("a", "b"), 0.1, 0.1)
    assert {s: len(arranged.sources[s]) for s in SPLITS} == {"train": 11, "validation": 10, "test": 11}
    assert arranged.duplicates == {"images": 2, "removed": 0, "examples": ["0030", "0031"]}


def test_a_contradiction_is_dropped_from_every_split() -> None:
    contents = [*range(24), 0, 0]
    arranged = arrange(pd, rows_of(contents, [i % 2 for i in range(24)] + [1, 0]), ("a", "b"), 0.1, 0.1)
    assert arranged.conflicts["images"] == 3
    assert [c["label"] for c in arranged.conflicts["examples"]] == ["a", "b", "a"]
    assert not {0, 24, 25} & set(split_of(arranged))


def test_a_class_that_only_the_test_split_has_is_refused() -> None:
    rows = rows_of(list(range(12)), [0, 1] * 4 + [0, 1, 2, 2], [0] * 8 + [2] * 4)
    with pytest.raises(Refused, match="'c' has 0"):
        arrange(pd, rows, LABELS, 0.1, 0.1)


def test_fractions_that_leave_nothing_are_refused() -> None:
    with pytest.raises(Refused, match="validation 0.5 and test 0.5 leave nothing"):
        arrange(pd, rows_of(list(range(12)), [0, 1, 2] * 4), LABELS, 0.5, 0.5)


def test_two_contents_of_one_rank_are_refused() -> None:
    rows = rows_of(list(range(24)), [i % 2 for i in range(24)])
    rows.keys[7] = rows.keys[3]
    with pytest.raises(Refused, match="0007 and another image have the same rank by chance: choose another seed"):
        arrange(pd, rows, ("a", "b"), 0.1, 0.1)


def test_a_cut_does_not_go_through_copies() -> None:
    contents = [i // 2 for i in range(60)]
    arranged = arrange(pd, rows_of(contents, [(i // 2) % 2 for i in range(60)]), ("a", "b"), 0.2, 0.2)
    assert {s: len(arranged.sources[s]) for s in SPLITS} == {"train": 36, "validation": 12, "test": 12}
    assert arranged.duplicates["images"] == 30
    assert arranged.duplicates["removed"] == 0
