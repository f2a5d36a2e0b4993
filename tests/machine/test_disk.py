"""Room on disks is looked at before the work."""

from __future__ import annotations

import collections

import pytest

from sab_hf.machine import disk
from sab_hf.machine.disk import Need, check_disk

GIB = 2**30
Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture
def ten_gib_free(monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage(100 * GIB, 90 * GIB, 10 * GIB))


def test_too_little_room_names_setting_place_and_sizes(ten_gib_free, tmp_path):
    with pytest.raises(OSError, match=r"12\.00 GiB will be written to a disk that has 10\.00 GiB free") as error:
        check_disk([Need("checkpoint_dir", tmp_path / "not yet" / "there", 12 * GIB)])
    assert "`checkpoint_dir`" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert not (tmp_path / "not yet").exists()


def test_needs_on_one_disk_add_up(ten_gib_free, tmp_path):
    check_disk([Need("the output folder", tmp_path / "a", 6 * GIB)])
    with pytest.raises(OSError, match=r"`the output folder`.*`offload_dir`"):
        check_disk([Need("the output folder", tmp_path / "a", 6 * GIB), Need("offload_dir", None, 6 * GIB)])


def test_what_a_run_that_goes_on_has_written_is_not_needed_again(ten_gib_free, tmp_path):
    (tmp_path / "model.layers.0.safetensors").write_bytes(bytes(1 << 20))
    need = Need("checkpoint_dir", tmp_path, 10 * GIB + 1, resumes=True)
    check_disk([need])
    with pytest.raises(OSError, match="checkpoint_dir"):
        check_disk([need._replace(resumes=False)])
