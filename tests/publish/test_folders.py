"""Saving into folders: complete or not there, other files stay, and what a kill leaves behind is put right by the next save."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from processes import forked

from sab_hf.publish import folders
from sab_hf.publish.folders import atomic_folder, check_target, write_file
from sab_hf.publish.locate import check_name

CONFIG = json.dumps({"quantization_config": {"quant_method": "sab"}})
OLD = {
    "config.json": CONFIG,
    "model-00001-of-00002.safetensors": "old 1",
    "model-00002-of-00002.safetensors": "old 2",
    "model.safetensors.index.json": "old",
    "README.md": "old",
    "chat_template.jinja": "old",
    "plots/bits_vision.svg": "old",
}
NEW = {
    "config.json": f"{CONFIG}\n",
    "model.safetensors": "new",
    "README.md": "new",
    "tokenizer.json": "new",
    "plots/bits_language.svg": "new",
}
THEIRS = {
    ".git/HEAD": "ref: refs/heads/main",
    "notes.txt": "mine",
    "adapter_model.safetensors": "mine",
    "plots/holiday.svg": "mine",
    "runs/1/model.safetensors": "mine",
    ".sab_hf.txt": "mine",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def read(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*") if file.is_file()}


def save(folder: Path, files: dict[str, str] = NEW) -> None:
    with atomic_folder(folder) as partial:
        write(partial, files)


def age(above: Path) -> None:
    """Make hidden folders look as if they had been there for a while."""
    for folder in above.rglob(".*"):
        if folder.is_dir():
            os.utime(folder, (1e9, 1e9))


def test_other_files_in_the_folder_of_a_checkpoint_stay(tmp_path):
    path = write(tmp_path / "saved", OLD | THEIRS)
    (path / "linked").symlink_to("notes.txt")
    save(path)
    assert read(path) == NEW | THEIRS | {"linked": "mine"}
    assert (path / "linked").is_symlink()
    save(path, OLD)
    assert read(path) == OLD | THEIRS | {"linked": "mine"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("kind", ["new", "empty", "linked", "deep", "here"])
def test_places_to_save_to(tmp_path, monkeypatch, kind):
    path = tmp_path / ("a/b/c" if kind == "deep" else "saved")
    if kind in ("empty", "here"):
        path.mkdir()
    if kind == "linked":
        write(tmp_path / "elsewhere", OLD | THEIRS)
        path.symlink_to("elsewhere")
    if kind == "here":
        monkeypatch.chdir(path)
    save(Path(".") if kind == "here" else path)
    assert read(path) == (NEW | THEIRS if kind == "linked" else NEW)
    assert path.is_symlink() == (kind == "linked")


def test_a_link_in_place_of_a_file_is_replaced_and_not_followed(tmp_path):
    path = write(tmp_path / "saved", OLD)
    (tmp_path / "outside").write_text("mine")
    (path / "README.md").unlink()
    (path / "README.md").symlink_to(tmp_path / "outside")
    save(path)
    assert read(path) == NEW
    assert (tmp_path / "outside").read_text() == "mine"


@pytest.mark.parametrize(
    "obstacle", ["a folder in place of a file", "a link in place of a folder", "a file in place of a folder"]
)
def test_a_checkpoint_that_cannot_take_its_place_is_kept_and_named(tmp_path, obstacle):
    old = {name: text for name, text in OLD.items() if not name.startswith("plots")}
    path = write(tmp_path / "saved", old)
    if obstacle == "a folder in place of a file":
        write(path, {"tokenizer.json/mine.txt": "mine"})
    elif obstacle == "a link in place of a folder":
        write(tmp_path / "outside", {"bits_vision.svg": "mine"})
        (path / "plots").symlink_to(tmp_path / "outside")
    else:
        write(path, {"plots": "mine"})
    before = read(tmp_path)
    with pytest.raises(
        OSError, match=r"could not be written, and is as before .* the new checkpoint is complete in `(.*)`"
    ) as error:
        save(path)
    kept = Path(str(error.value).rpartition("complete in `")[2].rstrip("`"))
    assert read(kept) == NEW
    left = {name: text for name, text in read(tmp_path).items() if ".complete/" not in name}
    assert left == before


@pytest.mark.parametrize("step", range(1, 13))
def test_an_exchange_that_fails_anywhere_is_undone(tmp_path, monkeypatch, step):
    path = write(tmp_path / "saved", OLD | THEIRS)
    move, done = folders._move, []

    def fail_once(source, target):
        done.append(source)
        if len(done) == step:
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(folders, "_move", fail_once)
    with pytest.raises(KeyboardInterrupt):
        save(path)
    assert read(path) == OLD | THEIRS
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def save_killed(path: Path, steps: int) -> None:
    """Save, and be killed after so many steps of the exchange; -1: before the first of them, while files are written."""
    move = folders._move

    def killed(source, target):
        nonlocal steps
        if steps == 0:
            os._exit(9)
        steps -= 1
        move(source, target)

    folders._move = killed
    with folders.atomic_folder(path) as partial:
        write(partial, NEW)
        if steps < 0:
            os._exit(9)


def test_what_a_kill_leaves_is_put_right_by_the_next_save(tmp_path, caplog):
    """Killed while it writes (-1), before the first step, between two, and between the last two."""
    for steps in (-1, 0, 4, 11):
        path = write(tmp_path / str(steps), OLD | THEIRS)
        done = forked(lambda path=path, steps=steps: save_killed(path, steps))
        assert done.returncode == 9, done.stderr
        hidden = [entry.name for entry in path.iterdir() if entry.name.startswith(".sab_hf.") and entry.is_dir()]
        assert len(hidden) == (1 if steps < 0 else 2)
        if steps > 0:
            with pytest.raises(
                FileNotFoundError, match=r"no config\.json\. A save to it was cut off: the old model is in `.*old`"
            ):
                check_name(path)
        age(path)
        caplog.clear()
        check_target(path)
        assert read(path) == OLD | THEIRS
        assert ("the model that was there before is put back" in caplog.text) == (steps > 0)
        save(path)
        assert read(path) == NEW | THEIRS


def test_new_folders_of_killed_saves_are_removed_and_those_in_use_are_not(tmp_path, caplog):
    stale, other = tmp_path / ".saved.abcd1234.partial", tmp_path / ".saved.more.abcd1234.partial"
    stale.mkdir()
    other.mkdir()
    age(tmp_path)
    with atomic_folder(tmp_path / "saved") as partial:
        os.utime(partial, (1e9, 1e9))
        check_target(tmp_path / "saved")
        assert partial.is_dir()
        assert "is in use, or left from a save that was killed" in caplog.text
        assert not stale.exists()
        write(partial, NEW)
    assert other.is_dir()  # of another target
    assert read(tmp_path / "saved") == NEW


def test_names_in_what_is_left_lead_nowhere_else(tmp_path):
    path = tmp_path / "saved"
    write(tmp_path, {"precious.txt": "mine"})
    names = {"old": [], "new": ["../precious.txt"]}
    write(path, {".sab_hf.abcd1234.old/names.json": json.dumps(names), "model.safetensors": "new"})
    age(path)
    with pytest.raises(ValueError, match=r"names\.json is damaged \(a name leads out of the folder\)"):
        check_target(path)
    assert (tmp_path / "precious.txt").is_file()


@pytest.mark.parametrize(
    "config", ["no JSON", "[]", "5", '{"quantization_config": []}', '{"quantization_config": 3}', "\ud800"]
)
def test_a_config_of_another_form_is_not_ours(tmp_path, config):
    path = write(tmp_path / "saved", {"model.safetensors": "mine"})
    (path / "config.json").write_bytes(config.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="that sab_hf did not pack, so it is not replaced"):
        check_target(path)


def test_a_target_is_tried_before_the_work(tmp_path, monkeypatch):
    """What cannot be renamed into, as some mounts, shows at once."""

    def fail(*args, **kwargs):
        raise OSError(16, "Device or resource busy")

    write(tmp_path / "saved", OLD)
    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(Path, "replace", fail)
    for name in ("saved", "new", "deep/new"):
        with pytest.raises(OSError, match=r"cannot be written .*busy.*choose another folder"):
            check_target(tmp_path / name)
    monkeypatch.undo()
    assert read(tmp_path) == {f"saved/{name}": text for name, text in OLD.items()}
    with pytest.raises(OSError, match=r"cannot be written .*long"):
        check_target(tmp_path / ("x" * 250))


def test_files_are_written_in_one_step_and_not_through_links(tmp_path):
    (tmp_path / "outside.txt").write_text("mine")
    (tmp_path / "card.md").symlink_to("outside.txt")
    write_file(tmp_path / "card.md", "new")
    assert (tmp_path / "outside.txt").read_text() == "mine"
    assert (tmp_path / "card.md").read_text() == "new"
    (tmp_path / "far").mkdir()
    (tmp_path / "plots").symlink_to("far")
    with pytest.raises(OSError, match="is a link, and files are not written through it"):
        write_file(tmp_path / "plots" / "a.svg", "new")
    assert list((tmp_path / "far").iterdir()) == []
