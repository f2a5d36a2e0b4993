"""Looking into a checkpoint by its headers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import file_bytes, file_entries, load
from safetensors.torch import load_file, save_file

import sab_hf
from sab_hf.publish.inspect import inspect


def test_inspection_says_what_the_loaded_model_says(packed_dir):
    found, loaded = inspect(packed_dir), sab_hf.report(load(packed_dir))
    assert found.report == loaded
    assert found.report.total_bytes == file_bytes(packed_dir)
    assert found.num_tensors == len(file_entries(packed_dir))
    assert (found.format_version, found.num_files, found.checksums) == (1, 1, "present, not checked")
    assert json.loads(json.dumps(found.to_dict()))["bits"] == loaded.bits
    assert f"{loaded.bits:.3f} bits per binarized weight" in str(found)


def test_weights_are_not_read(packed_dir, tmp_path):
    """Zeroed weights pass headers only: they were not read; with `verify` they are."""
    shutil.copytree(packed_dir, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    save_file({name: tensor.zero_() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    assert inspect(tmp_path / "copy").num_files == 1
    with pytest.raises(ValueError, match="checksums differ for"):
        inspect(tmp_path / "copy", verify=True)


def test_verified_checkpoint_says_so(packed_dir):
    assert inspect(packed_dir, verify=True).checksums == "verified"


def test_weights_of_an_adapter_in_the_folder_are_not_the_model_s(packed_dir, tmp_path):
    shutil.copytree(packed_dir, tmp_path / "copy")
    save_file(
        {"base_model.model.q_proj.lora_A.weight": torch.zeros(4, 40)}, tmp_path / "copy/adapter_model.safetensors"
    )
    assert inspect(tmp_path / "copy", verify=True).report == inspect(packed_dir).report


def test_missing_packed_tensor_is_named(damage):
    path = damage(tensors=lambda tensors: tensors.pop("language_model.model.layers.0.mlp.down_proj.signs"))
    with pytest.raises(ValueError, match=r"lacks packed tensors: 1 in all, first `.*down_proj\.signs`"):
        inspect(path)


def test_missing_dense_tensor_does_not_add_up(damage):
    path = damage(tensors=lambda tensors: tensors.pop("language_model.model.norm.weight"))
    with pytest.raises(ValueError, match=r"hold [\d,]+ dense weights, the model of the config has [\d,]+"):
        inspect(path)


def test_dense_checkpoint_is_refused(vlm_dir):
    with pytest.raises(ValueError, match="holds dense weights, and a checkpoint packed by sab_hf is required"):
        inspect(vlm_dir)


def test_newer_format_is_refused(damage):
    path = damage(config=lambda config: config.update(format_version=99, checksums=None))
    with pytest.raises(ValueError, match="format version 99"):
        inspect(path)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder `.*nowhere`"):
        inspect(tmp_path / "nowhere")
