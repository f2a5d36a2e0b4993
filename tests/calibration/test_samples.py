"""Samples and where they come from: what is accepted, and that every error names place, key and remedy."""

import base64
import io
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sab_hf.calibration.origins import read_samples, shuffled_order
from sab_hf.calibration.samples import load_media, parse_sample


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def save_picture(path: Path, tone: int = 90) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (20, 10), (tone, 0, 0)).save(path)
    return path


def questions(samples) -> list[str]:
    return [sample.messages[0]["content"][-1]["text"] for sample in samples]


def read(source, seed: int = 0, limit: int = 100) -> list:
    return list(read_samples(source, seed=seed, limit=limit))


def images_of(sample) -> list:
    return [part["image"] for m in load_media(sample, None) for part in m["content"] if part["type"] == "image"]


# One sample.


BAD_SAMPLES = {
    "no known key": (
        {"picture": 1, "caption": "x"},
        r"one of the keys .* is required, got the keys \['caption', 'picture'\]",
    ),
    "messages of a wrong type": ({"messages": "hello"}, "key 'messages' must be a list .*, got str 'hello'"),
    "no messages": ({"messages": []}, r"key 'messages' must be a list of at least one chat message, got list \[\]"),
    "not a sample": (3, "the sample must be a list of at least one chat message, got int 3"),
    "message of a wrong type": ({"messages": ["hello"]}, r"messages\[0\] must be a dict with 'role' and 'content'"),
    "no role": ({"messages": [{"content": "x"}]}, r"messages\[0\]: key 'role' must be a string .*, got NoneType"),
    "no content": ([{"role": "user"}], r"messages\[0\]: key 'content' must be a string or a list of parts"),
    "unknown part": (
        [{"role": "user", "content": [{"type": "picture"}]}],
        r"messages\[0\]\.content\[0\]: key 'type' must be 'text', 'image', 'video' or 'audio', got str 'picture'",
    ),
    "text part without text": (
        [{"role": "user", "content": [{"type": "text"}]}],
        r"messages\[0\]\.content\[0\]: key 'text' must be a string",
    ),
    "part of a wrong type": ([{"role": "user", "content": [7]}], r"messages\[0\]\.content\[0\] must be a dict"),
    "video without a file": (
        [{"role": "user", "content": [{"type": "video"}]}],
        r"key 'video' is required in a part of type 'video', got the keys \['type'\]",
    ),
    "image part without image": (
        [{"role": "user", "content": [{"type": "image"}]}],
        "one image for each image part without one: 1 required, got 0",
    ),
    "more images than parts": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": ["a", "b"]},
        "one image for each image part without one: 1 required, got 2",
    ),
    "images of a wrong type": ({"text": "x", "images": "a.png"}, "key 'images' must be a list .*, got str 'a.png'"),
    "question of a wrong type": ({"question": 5}, "key 'question' must be a string, got int 5"),
    "answer of a wrong type": ({"text": "x", "answer": ["a"]}, r"key 'answer' must be a string, got list \['a'\]"),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_parse_sample_names_place_and_key_of_what_is_wrong(case):
    row, message = BAD_SAMPLES[case]
    with pytest.raises(ValueError, match=message) as error:
        parse_sample(row, "sample 4")
    assert str(error.value).startswith("sample 4: ")
    assert 'A sample is one of\n  - a list of chat messages: [{"role": "user"' in str(error.value)


def test_parse_sample_accepts_every_way_to_name_an_image(tmp_path):
    path = save_picture(tmp_path / "a.png")
    data = path.read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    parts = [{"image": str(path)}, {"path": str(path)}, {"url": url}, {"image": Image.open(path)}]
    parts += [{"image": {"bytes": data, "path": None}}, {"image": {"bytes": None, "path": str(path)}}, {"image": path}]
    parts += [{"image": Image.open(path).convert("RGBA")}, {"image": None, "path": str(path)}]  # None: Arrow's filling
    content = [{"type": "image"} | part for part in parts]
    content.append({"type": "image_url", "image_url": {"url": url}})
    images = images_of(parse_sample([{"role": "user", "content": content}], "sample 0"))
    assert len(images) == 10
    assert all(image.mode == "RGB" and image.getpixel((3, 3)) == (90, 0, 0) for image in images)


def test_parse_sample_ignores_keys_without_a_value():
    sample = parse_sample({"question": "What?", "answer": None, "image": None, "messages": None}, "sample 0")
    assert sample.messages == [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]


def test_load_media_resolves_video_and_audio_from_the_folder(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"frames")
    sound = np.zeros(8, dtype=np.float32)
    content = [{"type": "video", "path": "v.mp4"}, {"type": "audio", "audio": sound}]
    sample = parse_sample([{"role": "user", "content": content}], "row 1", tmp_path)
    video, audio = load_media(sample, None)[0]["content"]
    assert video == {"type": "video", "video": str(tmp_path / "v.mp4")}
    assert audio["audio"] is sound
    gone = parse_sample([{"role": "user", "content": [{"type": "audio", "path": "a.wav"}]}], "row 1", tmp_path)
    with pytest.raises(ValueError, match=r"row 1: cannot read '.*a\.wav'"):
        load_media(gone, None)


def test_load_media_turns_photographs_upright():
    photo, buffer = Image.new("RGB", (20, 10)), io.BytesIO()
    exif = photo.getexif()
    exif[0x0112] = 6  # orientation: a quarter turn
    photo.save(buffer, "jpeg", exif=exif)
    (image,) = images_of(parse_sample({"image": {"bytes": buffer.getvalue()}, "text": "?"}, "sample 0"))
    assert image.size == (10, 20)


@pytest.mark.parametrize(
    ("image", "message"),
    [("no.png", "cannot read the image '.*no.png'"), (3.5, "an image must be a PIL image, .* got float 3.5")],
)
def test_load_media_names_an_unreadable_image(tmp_path, image, message):
    sample = parse_sample({"image": image, "text": "?"}, "data.jsonl, row 7", tmp_path)
    with pytest.raises(ValueError, match=f"data.jsonl, row 7: {message}"):
        load_media(sample, None)


# Files and folders.


def test_read_samples_reads_a_jsonl_file_with_paths_relative_to_it(tmp_path):
    save_picture(tmp_path / "pictures" / "a.png", 10)
    save_picture(tmp_path / "b.png", 20)
    file = write_rows(
        tmp_path / "data.jsonl",
        [
            {"image": "pictures/a.png", "question": "one"},
            {
                "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "two"}]}],
                "images": ["b.png"],
            },
            "",
            {"text": "three"},
        ],
    )
    for source in (file, str(file), tmp_path):
        samples = sorted(read(source), key=lambda sample: sample.where)
        assert [sample.where for sample in samples] == [f"{file}, row {n}" for n in (1, 2, 4)]
        assert questions(samples) == ["one", "two", "three"]
        assert [image.getpixel((0, 0))[0] for sample in samples for image in images_of(sample)] == [10, 20]


def test_read_samples_accepts_a_byte_order_mark(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "première"}\n', encoding="utf-8-sig")
    assert questions(read(tmp_path)) == ["première"]


def test_read_samples_reads_a_folder_of_images_with_metadata(tmp_path):
    save_picture(tmp_path / "a.png")
    write_rows(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "A red picture"}])
    (sample,) = read(tmp_path)
    assert len(images_of(sample)) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": ', r"row 3: each row must be one JSON value, got '\{\"text\":'"),
        ({"messages": [{"role": "user", "content": 1}]}, r"row 3: messages\[0\]: key 'content'"),
        ({"imgae": "a.png"}, r"row 3: one of the keys .* got the keys \['imgae'\]"),
    ],
)
def test_read_samples_names_file_and_row_of_a_bad_line(tmp_path, row, message):
    file = write_rows(tmp_path / "data.jsonl", [{"text": "fine"}, "", row])
    with pytest.raises(ValueError, match=message) as error:
        read(file)
    assert str(file) in str(error.value)


def test_read_samples_names_file_row_and_path_of_an_unreadable_image(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    file = write_rows(tmp_path / "data.jsonl", [{"image": "broken.png", "text": "?"}])
    (sample,) = read(file)
    with pytest.raises(ValueError, match=r"data\.jsonl, row 1: cannot read the image '.*broken\.png'"):
        load_media(sample, None)


def test_read_samples_says_what_a_name_may_be(tmp_path):
    for name in ("buitlin", "./missing", "missing.jsonl", str(tmp_path / "missing")):
        with pytest.raises(ValueError, match=r"must be 'builtin', a Hub dataset id .*got") as error:
            read(name)
        assert repr(name) in str(error.value)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"must be a \.jsonl file or a folder, got the file .*notes\.txt"):
        read(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"must hold at least one row"):
        read(write_rows(tmp_path / "empty.jsonl", []))


def test_read_samples_says_what_a_folder_must_hold(tmp_path):
    with pytest.raises(ValueError, match=r"calibration folder .* must hold \*\.jsonl files, or a dataset"):
        read(tmp_path)


# Datasets.


ROWS = [{"question": f"question {i}", "answer": "yes"} for i in range(12)]


def test_read_samples_takes_datasets_in_memory_and_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # after each stream
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(test=dataset).save_to_disk(tmp_path / "split")
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "train.parquet")
    expected = {row["question"] for row in ROWS}
    for source in (
        dataset,
        tmp_path / "saved",
        tmp_path / "split",
        tmp_path / "parquet",
        dataset.to_iterable_dataset(),
    ):
        samples = read(source)
        assert set(questions(samples)) == expected
        assert questions(samples) == questions(read(source))
        assert questions(samples) != questions(read(source, seed=5))


def test_read_samples_opens_the_images_of_a_dataset(tmp_path):
    path = save_picture(tmp_path / "a.png")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict({"image": [str(path)], "text": ["?"]}, features=features)
    for source in (dataset, dataset.cast_column("image", datasets.Image(decode=False))):
        (sample,) = read(source)
        assert images_of(sample)[0].getpixel((0, 0)) == (90, 0, 0)


@pytest.mark.parametrize(
    ("name", "config", "split"),
    [("org/name", None, None), ("org/name:small", "small", None), ("org/name:small:test", "small", "test")],
)
def test_read_samples_streams_a_hub_dataset(monkeypatch, name, config, split):
    asked = {}

    def load_dataset(repository, config_name, *, split, streaming):
        asked.update(repository=repository, config=config_name, split=split, streaming=streaming)
        stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
        return stream if split else datasets.IterableDatasetDict(validation=stream.take(2), train=stream)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read(name)) == len(ROWS)
    assert asked == {"repository": "org/name", "config": config, "split": split, "streaming": True}


def test_read_samples_explains_a_hub_dataset_that_cannot_be_loaded(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"cannot load the calibration dataset 'org/name' .*no network.*'builtin' needs"
    ):
        read("org/name")


# Collections and order.


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "must hold at least one sample, got an empty list"),
        (iter([]), "must hold at least one sample, got an empty list"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset().take(0), "got an empty stream"),
        ([{"role": "user", "content": "x"}], "got one conversation .* put it into a list"),
        (datasets.DatasetDict(train=[]), r"one split of a dataset, got a DatasetDict with the keys \['train'\]"),
        (5, "must be a name, a path or a list of samples, got int 5"),
    ],
)
def test_read_samples_names_what_is_no_collection_of_samples(source, message):
    with pytest.raises(ValueError, match=message):
        read(source)


def test_read_samples_checks_the_first_sample_first():
    rows = [{"wrong": 1}, *ROWS]
    assert shuffled_order(len(rows), 0)[0] != 0
    for source in (rows, iter(rows), datasets.Dataset.from_list(rows).to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"^sample 0: one of the keys"):
            next(read_samples(source, seed=0, limit=100))


def test_read_samples_names_the_number_of_a_later_sample():
    with pytest.raises(ValueError, match=r"^sample 2: one of the keys .* got the keys \['wrong'\]"):
        read([*ROWS[:2], {"wrong": 1}, *ROWS])


@given(count=st.integers(1, 40), seed=st.integers(0, 5), limit=st.integers(1, 50))
def test_read_samples_draws_without_repetition(count, seed, limit):
    drawn = questions(read([f"text {i}" for i in range(count)], seed=seed, limit=limit))
    assert len(drawn) == len(set(drawn)) == min(count, limit)
    assert drawn == [f"text {i}" for i in shuffled_order(count, seed)[:limit]]


# What is left out, what is no text, what is too much.


@pytest.mark.parametrize(
    "value",
    [Image.new("RGB", (4, 4)), "cat.png", "pictures/a cat.JPG", {"bytes": b"x", "path": None}, [Image.new("L", (2, 2))],
     b"\x89PNG", "clip.mp4"],
)  # fmt: skip
def test_parse_sample_notes_media_that_no_form_has(value):
    assert parse_sample({"img": value, "question": "What?"}, "row 1").unread == ("img",)
    assert parse_sample({"img": value, "image": "a.png", "question": "What?", "id": 7}, "row 1").unread == ("img",)


def test_parse_sample_notes_columns_of_video_and_audio():
    row = {"video": object(), "audios": [object()], "question": "What?", "videos": None}
    assert parse_sample(row, "row 1").unread == ("video", "audios")


def test_parse_sample_takes_no_other_column_for_media():
    row = {"question": "Is it a.png", "answer": "a.png", "label": 3, "id": "17", "note": "see page.html", "tags": ["a"]}
    assert parse_sample(row, "row 1").unread == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\xff\xfe\x00{', r"row 2: the file must be text in UTF-8, and byte 0 of this row is not"),
        ('{"text": "a"}\n'.encode("utf-16"), r"row 1: the file must be text in UTF-8.* UTF-16"),
        (b'{"text": "a"}\n' + b"\x00\x01\x02\n", r"row 2: each row must be one JSON value"),
        (b"[" * 100_000, r"row 1: each row must be one JSON value"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", r"row 1: each row must be one JSON value"),
    ],
    ids=["binary", "UTF-16", "control characters", "deep", "long number"],
)
def test_read_samples_names_the_row_that_is_no_text(tmp_path, content, message):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.jsonl, {message}") as error:
        read(tmp_path / "data.jsonl")
    assert len(str(error.value)) < 1000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_read_samples_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match=r"the calibration file .*data\.jsonl cannot be read: it is no regular file"):
        read(tmp_path)


def test_parse_sample_refuses_ten_megabytes_of_text():
    with pytest.raises(
        ValueError, match=r"^row 5: a sample must have at most 2,000,000 characters of text, got 10,000,000"
    ):
        parse_sample("x" * 10_000_000, "row 5")


def test_read_samples_cuts_a_text_that_is_no_name():
    with pytest.raises(ValueError, match="must be 'builtin', a Hub dataset id") as error:
        read("some text " * 100_000)
    assert len(str(error.value)) < 600


def test_load_media_asks_before_it_fetches():
    for kind in ("image", "video", "audio"):
        content = [{"type": kind, kind: "https://example.com/file"}]
        sample = parse_sample([{"role": "user", "content": content}], "data.jsonl, row 2")
        with pytest.raises(ValueError, match=r"data\.jsonl, row 2: .*URLs are not fetched unless .*`allow_urls=True`"):
            load_media(sample, None)
