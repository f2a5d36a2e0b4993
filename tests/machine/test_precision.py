"""A run on a CPU that is slow in half precision computes in float32, and leaves a model of the dtype that it found."""

from __future__ import annotations

import pytest
import torch
from helpers import build_llama

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.machine import precision
from sab_hf.machine.precision import faster_dtype, held_in
from sab_hf.packed.linear import SABLinear

CPU = torch.device("cpu")
IDS = torch.randint(3, 250, (8, 24), generator=torch.Generator().manual_seed(0))
TEXT = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in IDS.split(2)]
QUICK = {"num_samples": 8, "alternations": 1, "distil_steps": 2}


@pytest.fixture
def slow_in_half(monkeypatch):
    monkeypatch.setattr(precision, "_gain", lambda *_: 4.0)


def quantized(dtype, **changes):
    model = build_llama().to(dtype)
    record = sab_hf.quantize(model, None, TEXT, SABQuantizationConfig(**QUICK | changes))
    return model, record


def test_tensors_are_back_as_they_were():
    model = build_llama().to(torch.bfloat16)
    model.register_buffer("wide", torch.rand(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with held_in(model, torch.float32):
        assert model.dtype == torch.float32
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    after = model.state_dict()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )
    assert model.wide.dtype == torch.float32


def test_run_in_float32_leaves_the_dtype_of_the_checkpoint(slow_in_half):
    model, record = quantized(torch.bfloat16)
    assert record.predicted.dtype == torch.float32
    assert "in float32" in str(record.predicted)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}
    packed = [module for module in model.modules() if isinstance(module, SABLinear)]
    assert packed
    assert {module.dtype for module in packed} == {torch.bfloat16}
    again = build_llama().to(torch.bfloat16).float()
    sab_hf.quantize(again, None, TEXT, SABQuantizationConfig(**QUICK))
    for name, tensor in again.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(model.state_dict()[name].dtype)), name
    assert model(torch.ones(1, 3, dtype=torch.long)).logits.dtype == torch.bfloat16


def test_more_memory_than_there_is_is_not_taken(slow_in_half, monkeypatch):
    monkeypatch.setattr("sab_hf.make.preflight.Estimate.fits", property(lambda self: not self.widened))
    _, record = quantized(torch.bfloat16, distil_steps=0)
    assert record.predicted.dtype == torch.bfloat16


def test_dtype_is_that_of_the_model_where_float32_is_no_faster(monkeypatch):
    model = build_llama()
    assert faster_dtype(model, CPU) == torch.float32
    half = build_llama().to(torch.float16)
    for gain, expected in ((1.1, torch.float16), (3.0, torch.float32)):
        monkeypatch.setattr(precision, "_gain", lambda *_, gain=gain: gain)
        assert faster_dtype(half, CPU) == expected
    assert faster_dtype(half, torch.device("cuda")) == torch.float16


def test_run_that_goes_on_keeps_its_dtype(slow_in_half, monkeypatch, tmp_path):
    first, _ = quantized(torch.bfloat16, checkpoint_dir=str(tmp_path))
    monkeypatch.setattr(precision, "_gain", lambda *_: 1.0)
    again, record = quantized(torch.bfloat16, checkpoint_dir=str(tmp_path))
    assert record.predicted.dtype == torch.bfloat16
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == {
        name: tensor.dtype for name, tensor in first.state_dict().items()
    }
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert any(path.stem == "dtype" for path in tmp_path.iterdir())


def test_step_is_kept_only_where_there_is_a_choice(tmp_path):
    quantized(torch.float32, checkpoint_dir=str(tmp_path))
    assert not any(path.stem == "dtype" for path in tmp_path.iterdir())
