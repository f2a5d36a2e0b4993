"""Pictures of every form and depth are read right, and what cannot be read is an error with sample and reason."""

import base64
import io
import os
import warnings
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
import torch
from PIL import Image, features

from sab_hf.calibration.pictures import open_picture
from sab_hf.calibration.samples import load_media, parse_sample

RAMP = np.linspace(0, 65535, 40 * 30).reshape(30, 40)


def opened(value, folder=None):
    return open_picture(value, folder, None, allow_urls=False)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
PNG = encoded(NOISE)


# Depth.


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RAMP.astype(np.uint16)),
        Image.fromarray(RAMP.astype(np.int32)),
        Image.fromarray((RAMP / 257).astype(np.float32)),
        Image.fromarray((RAMP / 65535).astype(np.float32)),
        Image.fromarray((RAMP / 257).astype(np.int32)),
    ],
    ids=["16 bits", "16 bits in 32", "float to 255", "float to 1", "8 bits in 32"],
)
def test_grey_pictures_of_every_depth_are_scaled_to_8_bits(image):
    found = np.asarray(opened(image)).astype(float)
    assert found.shape == (30, 40, 3)
    assert abs(found - (RAMP / 257)[..., None]).max() <= 1


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_files_of_16_bits_are_scaled(tmp_path, kind):
    dark = np.full((4, 4), 200, dtype=np.uint16)  # all below 256: still 16 bits
    Image.fromarray(dark).save(tmp_path / f"dark.{kind}")
    assert np.asarray(opened(str(tmp_path / f"dark.{kind}"))).max() == 1
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / f"ramp.{kind}")
    assert abs(np.asarray(opened(tmp_path / f"ramp.{kind}"))[..., 0] - RAMP / 257).max() <= 1


def test_arrays_of_16_bits_are_scaled_and_others_pass():
    assert abs(opened(RAMP.astype(np.uint16)).astype(float) - RAMP / 257).max() <= 0.51
    assert abs(opened(torch.from_numpy(RAMP.astype(np.uint16))).astype(float) - RAMP / 257).max() <= 0.51
    bytes_, floats = np.zeros((3, 8, 8), dtype=np.uint8), torch.rand(3, 8, 8)
    assert opened(bytes_) is bytes_
    assert opened(floats) is floats
    with pytest.raises(ValueError, match=r"integers must have values from 0 to 255, got 0 to 300"):
        opened(np.array([[0, 300]]))


@pytest.mark.parametrize("values", [[[-1, 5]], [[0, 70000]]])
def test_pictures_of_other_ranges_are_refused(values):
    with pytest.raises(ValueError, match=r"values go from .* which is neither 8 nor 16 bits"):
        opened(Image.fromarray(np.array(values, dtype=np.int32)))
    with pytest.raises(ValueError, match="neither 8 nor 16 bits"):
        opened(Image.fromarray(np.array([[0.5, np.nan]], dtype=np.float32)))


# Forms.


@pytest.mark.parametrize(
    "part",
    [
        {"image": "data:image/png;base64," + base64.b64encode(PNG).decode()},
        {"image": "data:image;base64," + base64.b64encode(PNG).decode()},
        {"image": "data:;base64," + base64.urlsafe_b64encode(PNG).decode().rstrip("=")},
        {"image": "data:image/png," + quote_from_bytes(PNG)},
        {"base64": base64.b64encode(PNG).decode()},
        {"base64": "data:image/png;base64," + base64.b64encode(PNG).decode()},
        {"image": base64.b64encode(PNG).decode()},
        {"url": base64.encodebytes(PNG).decode()},
        {"image": PNG},
    ],
    ids=["data", "without type", "urlsafe", "percent", "key", "key with data URL", "bare", "bare with lines", "bytes"],
)
def test_pictures_in_the_text_are_read(part):
    sample = parse_sample([{"role": "user", "content": [{"type": "image", **part}]}], "sample 0")
    (found,) = load_media(sample, None)[0]["content"]
    assert np.array_equal(np.asarray(found["image"]), np.asarray(NOISE))


def test_bare_base64_of_a_jpeg_is_no_path():
    text = base64.b64encode(encoded(NOISE, "jpeg")).decode()
    assert text.startswith("/9j/")
    assert opened(text).size == NOISE.size


def test_file_urls_are_read(tmp_path):
    NOISE.save(tmp_path / "a picture.png")
    assert opened((tmp_path / "a picture.png").as_uri()).size == NOISE.size
    with pytest.raises(ValueError, match="must name a file of this machine, got the host str 'elsewhere'"):
        opened("file://elsewhere/a.png")


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:image/png,", "", "/nowhere/", "file:///"])
def test_messages_are_short(head):
    wrong = head + base64.b64encode(np.random.default_rng(0).bytes(500_000)).decode()
    sample = parse_sample([{"role": "user", "content": [{"type": "image", "image": wrong}]}], "data.jsonl, row 3")
    with pytest.raises(ValueError, match=r"^data\.jsonl, row 3: cannot read the image") as error:
        load_media(sample, None)
    assert len(str(error.value)) < 600


# Files that are none, too large, or damaged.


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_devices_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name in (tmp_path / "pipe.png", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match=r"cannot read the image .* \(it is no regular file\)"):
            opened(str(name))


def test_pictures_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for size in ((40, 30), (90, 90)):  # Pillow warns of the first and raises for the second
        Image.new("RGB", size).save(tmp_path / "large.png")
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            with pytest.raises(ValueError, match=r"cannot read the image '.*large.png' \(.*1000|exceeds limit"):
                opened(str(tmp_path / "large.png"))
    with pytest.raises(ValueError, match=r"it has 1,200 pixels, and at most 1,000 are read"):
        opened(Image.new("RGB", (40, 30)))


DAMAGED = [kind for kind in ("png", "jpeg", "gif", "tiff", "webp", "avif", "icns", "dds", "bmp", "ppm", "ico", "jpeg2000", "tga")
           if kind not in ("webp", "avif") or features.check(kind)]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow, of each broken field
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_of_every_format_are_errors_with_the_sample(kind):
    """Whatever a decoder does with a damaged file, what comes out is a picture or an error that names the sample."""
    try:
        whole = encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    random, messages = np.random.default_rng(0), []
    for i in range(40):
        broken = bytearray(whole[: random.integers(4, len(whole))] if i % 2 else whole)
        for place in random.integers(0, min(len(broken), 200), 6):
            broken[place] = random.integers(0, 256)
        sample = parse_sample({"image": {"bytes": bytes(broken)}, "text": "?"}, "data.jsonl, row 9")
        try:
            load_media(sample, None)
        except ValueError as error:
            messages.append(str(error))
    assert messages
    assert all(text.startswith("data.jsonl, row 9: cannot read the image") and len(text) < 600 for text in messages)
