"""Scorers of answers, against the definitions in the papers and against brute force."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sab_hf.evaluate.scorers import anls, edit_distance, exact_match, normalize, relaxed_accuracy


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("Red", ["red"], 1),
        ("the red box.", ["a red, box"], 1),
        ("1,000", ["1000"], 1),
        ("3.5", ["35"], 0),
        ("-5", ["5"], 0),
        ("t-shirt", ["t shirt"], 1),
        ("no", ["yes", "No!"], 1),
        ("", ["A"], 0),
        ("A", ["a"], 1),
        ("?", ["!"], 0),
        ("dog", [], 0),
    ],
)
def test_exact_match(answer, accepted, right):
    assert exact_match(answer, accepted) == right


@given(st.text(max_size=20))
def test_normalize_is_stable_and_matches_itself(text):
    assert exact_match(text, [text]) == 1
    assert normalize(normalize(text)) == normalize(text)


@functools.cache
def _distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(_distance(a[1:], b) + 1, _distance(a, b[1:]) + 1, _distance(a[1:], b[1:]) + (a[0] != b[0]))


@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_edit_distance_is_the_recursive_definition(a, b):
    assert edit_distance(a, b) == _distance(a, b)


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("Coca Cola", ["coca cola"], 1.0),
        ("coca cole", ["coca cola"], 1 - 1 / 9),
        ("cola", ["coca cola"], 0.0),  # 5 edits of 9 characters: above the threshold of a half
        ("ab", ["ac"], 0.0),  # exactly a half counts nothing
        ("cat", ["dog", "cats"], 0.75),
        ("", [""], 1.0),
        ("x", [], 0.0),
    ],
)
def test_anls(answer, accepted, score):
    assert anls(answer, accepted) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("104", ["100"], 1),
        ("105.1", ["100"], 0),
        ("-97", ["-100"], 1),
        ("0", ["0.0"], 1),
        ("0.01", ["0"], 0),
        ("52%", ["0.5"], 1),
        ("1,020", ["1000"], 1),
        ("Blue", ["blue"], 1),
        ("100 apples", ["100"], 0),
    ],
)
def test_relaxed_accuracy(answer, accepted, right):
    assert relaxed_accuracy(answer, accepted) == right
