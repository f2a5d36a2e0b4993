"""The generated world, the way its model was trained, and the model that is shipped with it."""

import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from tiny_vlm import score, train, world  # noqa: E402

CHECKPOINT = EXAMPLES / "tiny_vlm" / "checkpoint"


def test_samples_depend_on_the_seed_only():
    one, two, other = (world.samples(33, seed) for seed in (5, 5, 6))
    assert [s.turns for s in one] == [s.turns for s in two]
    assert [s.turns for s in one] != [s.turns for s in other]
    for a, b in zip(one, two, strict=True):
        assert (a.image is None) == (b.image is None) == (a.skill in world.TEXT_SKILLS)
        if a.image is not None:
            assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    assert [s.turns for s in world.samples(11, 5)] == [s.turns for s in one[:11]]


def test_sample_rejects_an_unknown_skill():
    with pytest.raises(ValueError, match=r"must be one of color.*got 'smell'"):
        world.sample(random.Random(0), "smell")


def nearest_color(pixels):
    """Return the name of the palette's colour nearest to a pixel, None where none is near: [96, 96] of names."""
    names = np.array([*world.COLORS, None], dtype=object)
    distance = np.abs(pixels[..., None, :].astype(int) - np.array(list(world.COLORS.values()))).sum(-1)
    return names[np.where(distance.min(-1) < 110, distance.argmin(-1), len(world.COLORS))]


def test_chart_answers_are_the_heights_of_the_drawn_bars():
    checked = 0
    for sample in world.samples(60, "heights", ("chart",)):
        question, answer = sample.turns[0]
        if not (found := re.fullmatch(r"What is the value of the (\w+) bar\?", question)):
            continue
        rows = (nearest_color(np.asarray(sample.image)) == found[1]).sum(1)
        assert round((rows > 3).sum() / world.BAR_UNIT) == int(answer)
        checked += 1
    assert checked > 20


def test_scene_answers_are_what_the_pixels_show():
    for sample in world.samples(120, "pixels", ("color", "position", "exists")):
        colors = nearest_color(np.asarray(sample.image))
        question, answer = sample.turns[0]
        if sample.skill == "color":
            assert (colors == answer).sum() > 25
        elif sample.skill == "exists" and answer == "yes":
            assert (colors == question.split()[3]).sum() > 25
        elif found := re.search(r"the (\w+) object", question):  # the only one of its colour: where its pixels are
            y, x = (int(axis.mean()) // world.CELL for axis in np.nonzero(colors == found[1]))
            assert world.POSITIONS[y][x] == answer


def test_text_answers_are_right():
    for sample in world.samples(150, "text", world.TEXT_SKILLS):
        question, answer = sample.turns[0]
        if sample.skill == "arithmetic":
            a, sign, b = re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", question).groups()
            assert int(answer) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        elif sample.skill == "copy":
            assert question.split()[-1] == answer
            assert 4 <= len(answer) <= 8
        else:
            who = re.search(r"does (\w+) (?:live|eat)\?", question)[1]
            assert re.search(rf"{who} (?:lives in|eats) (\w+)\.", question)[1] == answer


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def test_training_preprocessing_is_the_processor_s(processor):
    for skill in ("count", "read", "recall"):
        sample = world.sample(random.Random(3), skill, turns=3)
        sample.turns.append(("Grüß 你好?", "¡ça!"))  # bytes that are no letters by themselves
        text = processor.apply_chat_template(sample.messages(), tokenize=False)
        images = None if sample.image is None else [sample.image]
        inputs = processor(text=[text], images=images, return_tensors="pt")
        ids, answers = train.encode(sample, max_length=1000)
        assert inputs["input_ids"][0].tolist() == ids
        said = processor.batch_decode([[i for i, answer in zip(ids, answers, strict=True) if answer]])[0]
        assert said == "".join(f"{answer}<end>" for _, answer in sample.turns)
        if images:
            pixels = train.normalize(torch.from_numpy(np.array(sample.image))[None])
            torch.testing.assert_close(inputs["pixel_values"], pixels, rtol=0, atol=1e-6)


def test_training_loss_is_the_model_s(model):
    pixels, ids, answers = train.Batches(1, batch_size=8, seed=1)[0]
    ids = ids.long()
    with torch.no_grad():
        losses, counts = train.compute_losses(model, pixels, ids, answers)
        for rows, loss, count in zip((slice(0, 7), slice(7, 8)), losses, counts, strict=True):
            values = train.normalize(pixels) if rows.start == 0 else None
            mask = (ids[rows] != train.PAD).long()
            logits = model(input_ids=ids[rows], attention_mask=mask, pixel_values=values).logits[:, :-1]
            chosen = answers[rows, 1:]
            reference = torch.nn.functional.cross_entropy(logits[chosen], ids[rows, 1:][chosen], reduction="sum")
            assert chosen.sum() == count
            torch.testing.assert_close(loss, reference, rtol=1e-4, atol=1e-3)


def test_a_taken_tower_stays_as_it_is_in_training(model):
    small = train.build_model("small", seed=0)
    train.take_tower(small, CHECKPOINT)
    projector = small.model.multi_modal_projector.linear_1.weight.detach().clone()
    trainer = train.Trainer(small, learning_rate=1e-3, num_steps=1, compile=False)
    trainer.step(0, train.Batches(1, batch_size=2, seed=1)[0])
    for name, tensor in model.model.vision_tower.state_dict().items():
        assert torch.equal(small.model.vision_tower.state_dict()[name], tensor), name
    assert not torch.equal(small.model.multi_modal_projector.linear_1.weight, projector)


def test_shipped_tokenizer_holds_no_padding_or_truncation(processor):
    state = processor.tokenizer.backend_tokenizer
    assert state.padding is None
    assert state.truncation is None


def test_shipped_checkpoint_answers(model, processor):
    result = score.evaluate(model, processor, world.samples(110, "test"))
    assert result.visual >= 0.85, f"\n{result}"
    assert result.text >= 0.9, f"\n{result}"
    assert result.mean_nll < 0.2, f"\n{result}"
