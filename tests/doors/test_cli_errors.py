"""The command `sab-hf` in the hands of somebody careless: clear errors, right exit codes, nothing half written, nothing lost."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest.mock import patch

import huggingface_hub
import pytest
import torch
from helpers import QUICK_OPTIONS, file_bytes
from processes import as_main, forked

import sab_hf
from sab_hf.cli import main
from sab_hf.publish import save as hub_module


@pytest.fixture
def offline(monkeypatch):
    """No network: names that are no folders fail at once. Old clients keep sessions, which remember it."""
    forget = getattr(huggingface_hub.utils, "reset_sessions", lambda: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    forget()
    yield
    monkeypatch.undo()
    forget()


def fails(capsys, *argv: str | Path) -> str:
    """Run a command that must fail with exit code 1; return its message."""
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    assert (code, captured.out) == (1, "")
    found = re.search(rf"^sab-hf {argv[0]}: error: (.*)", captured.err, re.MULTILINE | re.DOTALL)
    assert found, captured.err
    return found[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- before anything heavy is imported

WRONG = {
    ("chat", "packed", "--image", "no.png"): "there is no picture `no.png`",
    ("chat", "packed", "--image", "text.png"): "`text.png` is no picture",
    ("chat", "empty"): "the folder `empty` holds no checkpoint",
    ("eval", "packed", "--original", "./no"): "there is no folder `./no`",
    ("eval", "packed", "--output", "no/a.json"): "there is no folder `no`",
    ("eval", "packed", "--data", "no.jsonl"): "`data` must be 'builtin', a Hub dataset id",
    ("eval", "packed", "--tasks", "a", "--include-path", "no"): "there is no folder `no`",
    ("quantize", "packed"): "name the folder to write",
    ("quantize", "dense", "full"): "exists and is no checkpoint",
    ("quantize", "./no", "out"): "there is no folder `./no`",
    ("quantize", "packed", "out", "--set", "bist=2"): "did you mean `bits`?",
    ("quantize", "packed", "out", "--preset", "bset"): "did you mean `best`?",
    ("quantize", "dense", "out", "--calibration", "./no.jsonl"): "`calibration` must be 'builtin'",
    ("quantize", "packed", "out"): "is quantized already, with 'sab'",
    ("dequantize", "dense", "out"): "`dense` holds dense weights",
    ("inspect", "dense"): "`dense` holds dense weights",
    ("export", "gguf", "packed", "text.png"): "exists, and an export replaces nothing",
    ("export", "gguf", "packed", "out", "--like", "no.gguf"): "there is no file `no.gguf`",
    ("dequantize", "packed", "full"): "exists and is not empty",
    ("card", "no"): "there is no folder `no`",
    ("card", "packed", "--evaluation", "no.json"): "there is no file `no.json`",
    ("inspect", "./no"): "there is no folder `./no`",
    ("serve", "./no"): "there is no folder `./no`",
    ("run", "no_program"): "'no_program' is no file, no command of an installed package, and no module",
    (): "usage: sab-hf",
}


def test_what_is_wrong_is_said_before_anything_heavy_is_imported(packed_dir, tmp_path):
    for name in ("empty", "full", "dense"):
        (tmp_path / name).mkdir()
    (tmp_path / "dense" / "config.json").write_text("{}")
    (tmp_path / "packed").symlink_to(packed_dir)
    for name in ("text.png", "full/text"):
        (tmp_path / name).write_text("text")
    script = """
        import contextlib, io, json, sys
        import sab_hf_command

        said = []
        for argv in json.loads(sys.argv[1]):
            sys.argv[1:] = argv
            with contextlib.redirect_stderr(io.StringIO()) as err:
                try:
                    code = sab_hf_command.main()
                except SystemExit as stop:
                    code = stop.code
            heavy = {"torch", "transformers", "huggingface_hub", "sab_hf"} & sys.modules.keys()
            said.append([code, sorted(heavy), " ".join(err.getvalue().split())])
        print(json.dumps(said))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), json.dumps(list(WRONG))]
    environment = os.environ | {"PYTHONPATH": str(Path(sab_hf.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    for (argv, words), (code, heavy, err) in zip(WRONG.items(), json.loads(done.stdout), strict=True):
        assert words in err, argv
        assert (code in (1, 2), heavy) == (True, []), argv
    assert not (tmp_path / "out").exists()


# ---- names


@pytest.mark.parametrize("command", ["inspect", "chat", "eval", "dequantize", "quantize"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "there is no folder `./nowhere`"),
        ("nowhere", "there is no folder `nowhere` here, and it could not be read from the Hub"),
        ("a file", "`a file` is a file; name the folder"),
        ("empty", "the folder `empty` holds no checkpoint: it has no config.json"),
    ],
)
def test_wrong_names_are_told_apart(capsys, tmp_path, monkeypatch, offline, command, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("a file")
    (tmp_path / "empty").mkdir()
    more = {"chat": ["--prompt", "Hello"], "dequantize": ["out"], "quantize": ["out"]}
    assert message in fails(capsys, command, name, *more.get(command, []))
    assert {path.name for path in tmp_path.iterdir()} == {"a file", "empty"}


@pytest.mark.parametrize("command", ["inspect", "dequantize", "card"])
def test_dense_checkpoint_is_named_as_such(capsys, vlm_dir, tmp_path, command):
    more = {"dequantize": [tmp_path / "out"]}
    message = fails(capsys, command, vlm_dir, *more.get(command, []))
    assert f"`{vlm_dir}` holds dense weights, and a checkpoint packed by sab_hf is required" in message
    assert list(tmp_path.iterdir()) == []


def test_packed_checkpoint_is_not_quantized_again(capsys, saved, tmp_path):
    message = fails(capsys, "quantize", saved, tmp_path / "out")
    assert message.startswith(f"`{saved}` is quantized already, with 'sab'; name the dense original")


def test_error_without_a_message_is_named(capsys, saved, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError

    monkeypatch.setattr("sab_hf.publish.inspect.inspect", fail)
    assert fails(capsys, "inspect", saved) == "RuntimeError\n"


def test_card_needs_a_folder(capsys, tmp_path, saved):
    assert "there is no folder `me/somewhere`" in fails(capsys, "card", "me/somewhere")
    (tmp_path / "notes.json").write_text('{"data": "and nothing else"}')
    message = fails(capsys, "card", saved, "--evaluation", tmp_path / "notes.json")
    assert "must be a file that `sab-hf eval --output` wrote" in message


def test_picture_is_looked_for_before_the_model_is_loaded(capsys, saved, monkeypatch):
    monkeypatch.setattr("sab_hf.commands.chat.load_model", None)
    message = fails(capsys, "chat", saved, "--image", "nowhere.png", "--prompt", "What is it?")
    assert "there is no picture `nowhere.png`" in message
    message = fails(capsys, "chat", saved, "--image", saved / "config.json", "--prompt", "What is it?")
    assert "is no picture that Pillow can read" in message


def test_evaluation_speaks_of_its_data(capsys, saved):
    assert fails(capsys, "eval", saved, "--data", "nowhere.jsonl").startswith("`data` must be")


def test_evaluation_is_not_run_for_a_file_that_cannot_be_written(capsys, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("sab_hf.evaluate.evaluate", None)
    message = fails(capsys, "eval", saved, "--output", tmp_path / "no" / "evaluation.json")
    assert f"there is no folder `{tmp_path / 'no'}`" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_device_that_is_not_there_is_named(capsys, vlm_dir, tmp_path):
    message = fails(capsys, "quantize", vlm_dir, tmp_path / "out", "--device-map", "cuda")
    assert "sees no CUDA device here" in message


@pytest.mark.parametrize("verify", [[], ["--verify"]])
@pytest.mark.parametrize(
    ("name", "message"),
    [("model.safetensors", "model.safetensors is damaged or cut off"), ("config.json", "it is no JSON")],
)
def test_damaged_files_are_named(capsys, saved, tmp_path, verify, name, message):
    path = tmp_path / "cut"
    shutil.copytree(saved, path)
    (path / name).write_bytes((path / name).read_bytes()[:100])
    found = fails(capsys, "inspect", path, *verify)
    assert message in found
    assert "download or quantize it again" in found


# ---- where to write


@pytest.mark.parametrize("target", ["file", "letters", "the original", "below a file"])
def test_quantize_refuses_its_target_before_it_reads_the_model(capsys, vlm_dir, tmp_path, monkeypatch, target):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_my_aunt.txt").write_text("Dear aunt")
    shutil.copytree(vlm_dir, tmp_path / "the original")
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)  # nothing is read
    before = contents(tmp_path)
    output = tmp_path / ("file/out" if target == "below a file" else target)
    message = fails(capsys, "quantize", tmp_path / "the original", output)
    assert "is not replaced; choose another folder" in message or "is no folder that can be written" in message
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "output", ["dense", "packed", "packed/", "linked", "./packed", "packed/../packed", "other", "file"]
)
def test_dequantize_replaces_nothing(capsys, saved, vlm_dir, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sab_hf.commands.dequantize.load_model", None)
    shutil.copytree(vlm_dir, "dense")
    shutil.copytree(saved, "packed")
    shutil.copytree(saved, "other")
    Path("file").write_text("a file")
    Path("linked").symlink_to("packed")
    before = contents(tmp_path)
    message = fails(capsys, "dequantize", "packed", output)
    assert "exists and is not empty, and a dense checkpoint replaces nothing; choose another folder" in message
    assert contents(tmp_path) == before


@pytest.mark.parametrize("output", ["questions.jsonl", "model.safetensors", "config.json", "linked", "folder"])
def test_evaluation_replaces_no_other_file(capsys, saved, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sab_hf.evaluate.compare.evaluate", None)
    Path("questions.jsonl").write_text('{"question": "?", "answer": "!"}')
    Path("folder").mkdir()
    Path("linked").symlink_to("questions.jsonl")
    for name in ("model.safetensors", "config.json"):
        shutil.copy(saved / name, name)
    before = contents(tmp_path)
    message = fails(capsys, "eval", saved, "--data", "questions.jsonl", "--output", output)
    assert f"--output {output}" in message
    assert "name another" in message
    assert contents(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs resource limits")
@pytest.mark.parametrize("command", ["quantize", "dequantize"])
def test_a_full_disk_leaves_nothing(command, saved, vlm_dir, questions, tmp_path):
    """A limit on the size of files stands for it."""
    arguments = {
        "quantize": [vlm_dir, tmp_path / "out" / "folder", "--calibration", questions, *QUICK_OPTIONS],
        "dequantize": [saved, tmp_path / "out" / "folder"],
    }[command]
    (tmp_path / "out").mkdir()
    limit = min(file_bytes(saved), file_bytes(vlm_dir)) // 2

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.exit(main([command, *map(str, arguments)]))

    done = forked(run)
    assert done.returncode == 1, done.stderr
    assert f"error: `{tmp_path / 'out' / 'folder'}` could not be written, and nothing was left there" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def interruptible():
    """Have Ctrl-C raise, as in a terminal; a shell's job in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_nothing(capsys, vlm_dir, questions, tmp_path, monkeypatch, interruptible, number, code):
    def stop(*args, **kwargs):
        signal.raise_signal(number)

    monkeypatch.setattr(hub_module, "html_report", stop)  # the last thing that is written
    (tmp_path / "out").mkdir()
    argv = ["quantize", vlm_dir, tmp_path / "out" / "folder", "--calibration", questions, *QUICK_OPTIONS]
    assert main([str(argument) for argument in argv]) == code
    said = capsys.readouterr().err
    assert f"sab-hf quantize: {'interrupted' if code == 130 else 'terminated'}" in said
    assert "nothing of it was kept" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_a_second_interruption_does_not_disturb_the_first(capfd, saved, monkeypatch, interruptible):
    removed = []

    def stop(*args, **kwargs):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            removed.append("what is half written")

    monkeypatch.setattr("sab_hf.publish.inspect.inspect", stop)
    assert main(["inspect", str(saved)]) == 130
    assert removed
    said = capfd.readouterr().err
    assert "once more ends at once" in said
    assert said.endswith("sab-hf inspect: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_third_interruption_ends_at_once(saved):
    def run() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def stop(*args, **kwargs):
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                sys.stderr.write("not reached")

        with patch("sab_hf.publish.inspect.inspect", stop):
            main(["inspect", str(saved)])

    done = forked(run)
    assert done.returncode == 130
    assert "not reached" not in done.stderr


def test_a_reader_that_has_enough_is_no_error(saved, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = forked(as_main("sab_hf.cli", "inspect", saved, folder=tmp_path), stdout=writer)
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


# ---- publishing


def test_publishing_needs_a_login_and_a_possible_name_before_work_is_done(capsys, vlm_dir, hub, monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)  # nothing is read
    assert "Repo id must" in fails(capsys, "quantize", vlm_dir, "me/no good name", "--push")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere")
    assert "hf auth login" in fails(capsys, "quantize", vlm_dir, "me/tiny", "--push")
    assert hub.repos == {}


def test_a_checkpoint_that_could_not_be_published_is_kept(capsys, vlm_dir, questions, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hub.refused = "commit"
    assert main(["quantize", str(vlm_dir), "me/tiny", "--push", "--calibration", questions, *QUICK_OPTIONS]) == 1
    said = capsys.readouterr().err
    assert "no quota" in said
    kept = Path(re.search(r"complete in (\S+)\.", said)[1])
    assert hub.files("me/tiny") == {}
    hub.refused = None
    assert main(["card", str(kept), "--push", "--repo-id", "me/tiny"]) == 0
    assert hub.files("me/tiny")["model.safetensors"] == (kept / "model.safetensors").read_bytes()


def test_nothing_is_kept_of_what_was_published(capsys, vlm_dir, questions, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["quantize", str(vlm_dir), "me/tiny", "--push-to-hub", "--calibration", questions, *QUICK_OPTIONS]) == 0
    assert "model.safetensors" in hub.files("me/tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
