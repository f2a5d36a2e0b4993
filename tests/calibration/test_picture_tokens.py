"""Fewer tokens of a calibration picture: tiles and pixels of processors that can be set, errors of those that cannot."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_processor import IMAGE_TOKENS, make_config, make_processor, make_tokenizer

import sab_hf
from sab_hf.calibration import IMAGE, prepare_calibration
from sab_hf.calibration.chat import ChatEncoder
from sab_hf.calibration.picture_tokens import tile_settings, with_image_tokens

IMAGE_ID, SIDE = 5, 16


class AnySize:
    """A processor that makes a token of each 16 x 16 pixels of a picture."""

    image_token, chat_template = "<image>", None

    def __init__(self):
        self.tokenizer, self.image_processor = make_tokenizer(pad_token="<pad>"), SimpleNamespace()

    def __call__(self, text, images=None, **_):
        pictures = [] if images is None else images
        counts = [(image.width // SIDE) * (image.height // SIDE) for image in pictures]
        ids = [IMAGE_ID] * sum(counts) + [9] * len(text[0])
        pixels = {"pixel_values": torch.zeros(1, 3, SIDE, SIDE)} if counts else {}
        return {"input_ids": torch.tensor([ids])} | pixels


def any_size():
    return AnySize(), SimpleNamespace(vision_config=None, image_token_id=IMAGE_ID)


def picture(side: int):
    parts = [{"type": "image", "image": Image.new("RGB", (side, side))}, {"type": "text", "text": "What?"}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (
            {"do_image_splitting": True, "size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
            [{"size": {"longest_edge": edge}} for edge in (1536, 1024, 512)],
        ),
        ({"do_image_splitting": True, "size": {"longest_edge": 980, "shortest_edge": 378}}, [{"do_image_splitting": False}]),
        ({"do_image_splitting": False, "size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}, []),
        ({"max_patches": 4, "min_patches": 2}, [{"max_patches": 3}, {"max_patches": 2}]),
        ({"max_image_tiles": 3}, [{"max_image_tiles": 2}, {"max_image_tiles": 1}]),
        ({"do_pan_and_scan": None, "size": {"height": 896, "width": 896}}, []),
    ],
)  # fmt: skip
def test_settings_of_tiles_go_from_many_to_few(attributes, expected):
    assert tile_settings(SimpleNamespace(**attributes)) == expected


@pytest.mark.parametrize("most", [300, 60])
def test_pictures_of_any_size_are_shrunk(most, caplog):
    processor, config = any_size()
    with caplog.at_level("INFO", "sab_hf"):
        found = prepare_calibration(
            [picture(1000), picture(100)], processor, config, num_samples=2, max_length=9000, image_tokens=most
        )
    counts = sorted(int((batch.modality == IMAGE).sum()) for batch in found.batches)
    assert counts[0] == 36  # a small one stays as it is: 6 x 6 tokens
    assert most / 2 < counts[1] <= most
    told = int(re.search(r"at most (\d+) tokens each in place of", caplog.text).group(1))
    assert counts[1] <= told <= most


def test_what_is_few_enough_is_not_changed(caplog):
    processor, config = any_size()
    encoder = ChatEncoder(processor)
    assert with_image_tokens(encoder, config, 9999, strict=True) is encoder
    assert not caplog.records


def test_processor_of_one_number_of_tokens():
    processor = make_processor()
    config, encoder = make_config(processor), ChatEncoder(processor)
    assert with_image_tokens(encoder, config, IMAGE_TOKENS - 1, strict=False) is encoder
    with pytest.raises(
        ValueError, match=f"must be at least {IMAGE_TOKENS} with LlavaProcessor.*got {IMAGE_TOKENS - 1}"
    ):
        with_image_tokens(encoder, config, IMAGE_TOKENS - 1, strict=True)


def test_without_pictures_it_must_be_left_out():
    encoder = ChatEncoder(make_tokenizer())
    config = SimpleNamespace(text_config=None)
    assert with_image_tokens(encoder, config, 8, strict=False) is encoder
    with pytest.raises(ValueError, match="`image_tokens` must be left out"):
        with_image_tokens(encoder, config, 8, strict=True)
    with pytest.raises(ValueError, match="`image_tokens` must be left out for processed batches"):
        prepare_calibration([{"input_ids": torch.ones(1, 4, dtype=torch.long)}], None, config, image_tokens=8)


@pytest.mark.parametrize("value", [0, -3, 1.5, "64", True])
def test_field_is_checked(value):
    with pytest.raises(ValueError, match="`image_tokens` must be an integer of at least 1"):
        sab_hf.SABQuantizationConfig(image_tokens=value)
