"""The built-in calibration set: reproducible, varied, and nothing in its images cut off or illegible."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from sab_hf.calibration import builtin as builtin_set
from sab_hf.calibration.builtin import builtin_sample, builtin_samples
from sab_hf.calibration.samples import parse_sample


def parts_of(sample: list, kind: str) -> list:
    return [part[kind] for message in sample for part in message["content"] if part["type"] == kind]


def fingerprint(sample: list) -> tuple:
    return tuple(parts_of(sample, "text")), tuple((image.size, image.tobytes()) for image in parts_of(sample, "image"))


def test_builtin_samples_are_a_function_of_seed_and_index():
    random.seed(1)
    first = [fingerprint(sample) for sample in builtin_samples(24, 3)]
    random.seed(2)
    assert [fingerprint(sample) for sample in builtin_samples(40, 3)][:24] == first
    assert fingerprint(builtin_sample(3, 17)) == first[17]
    assert fingerprint(builtin_sample(4, 17)) != first[17]


@pytest.mark.parametrize("with_images", [True, False])
def test_builtin_samples_are_all_different(with_images):
    samples = builtin_samples(1024, 0, with_images=with_images)
    assert len({fingerprint(sample) for sample in samples}) == 1024


def test_builtin_samples_have_images_in_three_of_four():
    samples = builtin_samples(64, 0)
    assert [len(parts_of(sample, "image")) for sample in samples] == [1, 1, 1, 0] * 16
    assert not any(parts_of(sample, "image") for sample in builtin_samples(64, 0, with_images=False))


@given(seed=st.integers(0, 50), index=st.integers(0, 400), with_images=st.booleans())
@settings(max_examples=150, deadline=None)
def test_builtin_sample_is_a_conversation_that_ends_with_an_answer(seed, index, with_images):
    sample = builtin_sample(seed, index, with_images=with_images)
    assert parse_sample(sample, "here").messages == sample
    roles = [message["role"] for message in sample]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert not any(part["type"] == "image" for message in sample[1::2] for part in message["content"])
    for text in parts_of(sample, "text"):
        assert text.strip() == text and text  # noqa: PT018
        assert not any(mark in text for mark in ("{", "}")) or "json" in text.lower() or '"' in text or "`" in text
        assert "None" not in text.replace("None.", "").replace("None of them.", "")
    for image in parts_of(sample, "image"):
        assert image.mode == "RGB"
        assert 224 <= max(image.size) <= 448
        assert min(image.size) >= 112


@pytest.mark.parametrize("drawer", sorted(set(builtin_set._DRAWERS), key=lambda drawer: drawer.__name__))
def test_builtin_drawers_write_legible_text_within_the_image(drawer, monkeypatch):
    written, original = [], ImageDraw.ImageDraw.text

    def recording(pen, xy, text, *args, **kwargs):
        box = pen.textbbox(xy, text, font=kwargs["font"], anchor=kwargs.get("anchor", "la"))
        written.append((text, box, pen._image.size, kwargs["font"].size))
        return original(pen, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", recording)
    missing = ImageFont.load_default(20).getmask("\u4e00")
    for seed in range(12):
        written.clear()
        image, turns = drawer(random.Random(seed))
        assert len({question for question, _ in turns}) >= 4
        for text, (left, top, right, bottom), (width, height), size in written:
            where = f"{text!r} in {image.size}, seed {seed}"
            assert left >= 0 and top >= 0 and right <= width and bottom <= height, where  # noqa: PT018
            assert size * image.width / width >= 8, where
            assert text.isascii(), where
            for letter in set(text) - {" "}:
                assert bytes(ImageFont.load_default(20).getmask(letter)) != bytes(missing), where


@pytest.mark.parametrize("drawer", sorted(set(builtin_set._DRAWERS), key=lambda drawer: drawer.__name__))
def test_builtin_drawers_fill_the_image(drawer):
    for seed in range(5):
        image, _ = drawer(random.Random(seed))
        assert isinstance(image, Image.Image)
        assert len(image.getcolors(1 << 20)) >= 2


def answer_to(turns: list, start: str) -> str:
    return next(answer for question, answer in turns if question.startswith(start))


def test_builtin_arithmetic_is_right():
    for seed in range(300):
        for question, answer in builtin_set.tasks.arithmetic(random.Random(seed)):
            if answer.count("=") == 1 and question.startswith(("What is", "Compute", "Divide")):
                left, right = answer.replace("×", "*").split("=")
                assert eval(left) == int(right), (question, answer)


def test_builtin_code_gives_what_it_says():
    for seed in range(100):
        turns = builtin_set.tasks.code(random.Random(seed))
        text = "".join(question + answer for question, answer in turns)
        source = text.split("```python\n")[1].split("```")[0]
        question, answer = turns[-1]
        call = question.split("`")[1]
        scope: dict = {}
        exec(source, scope)
        assert answer.rstrip(".").split()[-1] == str(eval(call, scope)), (question, answer)


def test_builtin_receipts_add_up():
    for seed in range(30):
        _, turns = builtin_set.documents.receipt(random.Random(seed))
        prices = [float(line.split(": ")[1]) for line in answer_to(turns, "Read all items").splitlines()]
        total = float(answer_to(turns, "What is the total").lstrip("$EURGBP "))
        assert total == pytest.approx(sum(prices))


def test_builtin_pies_add_up_to_the_whole():
    for seed in range(60):
        _, turns = builtin_set.charts.pie(random.Random(seed))
        shares = [int(item.split(": ")[1].rstrip("%. ")) for item in answer_to(turns, "List all slices").split("; ")]
        assert sum(shares) == 100
        assert len(set(shares)) == len(shares)
