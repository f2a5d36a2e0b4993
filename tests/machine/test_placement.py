"""Weights in RAM, on disk or on an accelerator give the same model; blocks come and go as they were."""

from __future__ import annotations

import errno
import os

import accelerate
import pytest
import torch
from helpers import BLOCKS, CPU, PARTS, V5, build_llava, load, logits
from torch import nn

import sab_hf
from sab_hf.machine import placement
from sab_hf.machine.clock import StageClock
from sab_hf.machine.placement import Placement, read_parameter
from sab_hf.machine.store import StateStore
from sab_hf.passes.capture import BlockInputs


def with_blocks(first: str, second: str) -> dict[str, str]:
    return {**dict.fromkeys(PARTS, "cpu"), f"{BLOCKS}.0": first, f"{BLOCKS}.1": second}


def same(a: nn.Module, b: nn.Module) -> bool:
    state = b.state_dict()
    return a.state_dict().keys() == state.keys() and all(torch.equal(t, state[n]) for n, t in a.state_dict().items())


@pytest.fixture(scope="module")
def refined_dir(vlm_dir, make_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("refined")
    load(vlm_dir, quantization_config=make_config(refine_steps=2)).save_pretrained(path)
    return path


MAPS = {"blocks": CPU | {BLOCKS: "disk"}, "one block": with_blocks("cpu", "disk")}
if V5:  # 4.57.6 cannot save a model of renamed modules while some are offloaded, quantized or not
    MAPS |= {"vision": CPU | {PARTS[0]: "disk"}, "all": {**dict.fromkeys(CPU, "disk"), "lm_head": "cpu"}}


@pytest.mark.parametrize("device_map", MAPS)
def test_model_from_disk_is_the_model_from_memory(vlm_dir, make_config, refined_dir, inputs, tmp_path, device_map):
    config = make_config(refine_steps=2)
    model = load(vlm_dir, quantization_config=config, device_map=MAPS[device_map], offload_folder=tmp_path / "offload")
    assert not any(p.is_meta for name, p in model.named_parameters() if name.startswith(BLOCKS))
    expected = load(refined_dir)
    assert torch.equal(logits(model, inputs), logits(expected, inputs))
    model.save_pretrained(tmp_path / "saved")
    assert same(load(tmp_path / "saved"), expected)


def test_model_kept_in_ram_behind_hooks_gives_its_dense_weights_up(
    vlm_dir, make_config, processor, refined_dir, inputs
):
    model = load(vlm_dir)
    accelerate.cpu_offload(model, execution_device="cpu")
    held = model.get_submodule(f"{BLOCKS}.0.mlp.up_proj")._hf_hook.weights_map.dataset
    sab_hf.quantize(model, processor, None, make_config(refine_steps=2))
    assert torch.equal(logits(model, inputs), logits(load(refined_dir), inputs))
    assert not [name for name in held if name.startswith(BLOCKS) and "_proj" in name]


def test_nan_in_an_offloaded_weight_is_named(make_config, processor, tmp_path):
    model = build_llava(attention_bias=True)
    with torch.no_grad():
        model.get_parameter(f"{BLOCKS}.1.mlp.up_proj.weight")[2, 3] = float("nan")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj` holds NaN"):
        load(tmp_path, quantization_config=make_config(), device_map=MAPS["blocks"], offload_folder=tmp_path / "o")


def test_weights_that_cannot_be_loaded_are_named(model, processor, make_config):
    model.get_submodule(f"{BLOCKS}.1").to("meta")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn.* has no values .*device_map"):
        sab_hf.quantize(model, processor, None, make_config())


def test_unknown_compute_device_is_refused(model, processor, make_config):
    with pytest.raises(ValueError, match=r"`compute_device` must be a device of this machine.* got 'cuda:99'"):
        sab_hf.quantize(model, processor, None, make_config(compute_device="cuda:99"))


def test_meta_is_no_compute_device(model, processor, make_config):
    with pytest.raises(ValueError, match=r"`compute_device` must be a device of this machine.* got 'meta'"):
        sab_hf.quantize(model, processor, None, make_config(compute_device="meta"))


@pytest.mark.parametrize("offloaded", [False, True])
def test_passing_visit_leaves_everything_as_it_was(model, offloaded):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if offloaded:
        accelerate.cpu_offload(model, execution_device="cpu")
    where = {name: p.is_meta for name, p in model.named_parameters()}
    placement = Placement(model)
    with placement.visit(f"{BLOCKS}.1") as block:
        assert not any(p.is_meta for p in block.parameters())
    assert {name: p.is_meta for name, p in model.named_parameters()} == where
    assert all(torch.equal(read_parameter(model, name), values) for name, values in before.items())


def test_visit_that_finds_no_memory_leaves_everything_as_it_was(model, monkeypatch):
    accelerate.cpu_offload(model, execution_device="cpu")
    block = model.get_submodule(f"{BLOCKS}.1")
    hooked = [part for part in block.modules() if hasattr(part, "_hf_hook")]
    load_tensors, left = placement._materialise, 3

    def run_out(*arguments, **options):
        nonlocal left
        left -= 1
        if not left:
            raise torch.OutOfMemoryError
        load_tensors(*arguments, **options)

    monkeypatch.setattr(placement, "_materialise", run_out)
    with pytest.raises(torch.OutOfMemoryError), Placement(model).visit(f"{BLOCKS}.1"):
        pass
    assert [part for part in block.modules() if hasattr(part, "_hf_hook")] == hooked
    assert all(p.is_meta for p in block.parameters())


@pytest.mark.parametrize(("device", "read"), [("cuda:1", torch.device("cuda:1")), ("cpu", None)])
def test_peak_memory_is_that_of_the_compute_device(monkeypatch, device, read):
    asked = []

    def ask(device=None):
        asked.append(device)
        return 2**20

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, ask)
    clock = StageClock(device=torch.device(device))
    with clock.measure("fit"):
        pass
    assert asked == [read] * 4
    assert clock.stages["fit"].peak_gpu_mib == 1


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["cpu", "cuda", "blocks"])
def test_compute_device_changes_nothing_but_rounding(vlm_dir, make_config, inputs, tmp_path, device_map):
    """Rounding of 1e-4 turns up to a tenth of the signs of this random model, and no error of a fit by more than 6 %."""
    settings = {"significance": "none"}  # the gradient map draws tokens, other ones on each device
    places = MAPS.get(device_map, device_map)
    model = load(vlm_dir, quantization_config=make_config(**settings), device_map=places, offload_folder=tmp_path)
    expected = load(vlm_dir, quantization_config=make_config(**settings, compute_device="cpu"), device_map="cpu")
    errors = [[fit.error for fit in m.hf_quantizer.record.fits] for m in (model, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.15)
    device = next(model.parameters()).device
    assert logits(model, {name: value.to(device) for name, value in inputs.items()}).isfinite().all()


# ---- hidden states


def test_limits_on_memory_send_hidden_states_to_disk_and_change_nothing(
    vlm_dir, make_config, refined_dir, tmp_path, monkeypatch
):
    seen = []
    close = BlockInputs.close

    def spy(inputs):
        used = inputs.workspace.store.used
        before = dict(used)
        close(inputs)
        seen.append((before, dict(used), os.listdir(tmp_path)))

    monkeypatch.setattr(BlockInputs, "close", spy)
    config = make_config(refine_steps=2, cache_ram_gib=2e-5, offload_dir=tmp_path)
    assert same(load(vlm_dir, quantization_config=config), load(refined_dir))
    (used, after, folders), *_ = seen
    assert after == {"ram": 0, "disk": 0}
    assert used["ram"] <= 2e-5 * 2**30
    assert used["disk"] > used["ram"] > 0
    assert len(folders) == 1
    assert os.listdir(tmp_path) == []


def test_full_disk_for_hidden_states_is_a_clear_error(vlm_dir, make_config, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match=r"cannot keep .* of hidden states in .*No space left.*`offload_dir`") as caught:
        load(vlm_dir, quantization_config=make_config(cache_ram_gib=0.0, offload_dir=tmp_path))
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_store_keeps_values_and_shared_arguments(tmp_path):
    store = StateStore(torch.device("cpu"), ram_limit=100, folder=tmp_path)
    shared, mask = {"a": torch.arange(4)}, torch.ones(2, 2, dtype=torch.bool)
    seen = {}
    first, second = store.put_all(((shared, mask), {"mask": mask, "other": shared}), seen)
    assert first[0] is second["other"]
    assert first[1] is second["mask"]
    assert store.used == {"ram": 36, "disk": 0}
    old = store.put(torch.randn(5, 7, dtype=torch.float32).bfloat16())
    assert store.used == {"ram": 36, "disk": 70}
    new = torch.randn(5, 7).bfloat16()
    assert torch.equal(store.replace(old, new), new)
    assert store.replace(old, new).data_ptr() == old.data_ptr()
    store.close()


def test_whole_model_visits_the_compute_device_where_it_fits(monkeypatch):
    model = build_llava()
    size = sum(p.nbytes for p in model.parameters())
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    whole = Placement(model)
    whole.device = torch.device("meta")  # a device that has no model of it yet
    for room, there in ((2 * size, True), (2 * size - 1, False)):
        monkeypatch.setattr(placement, "free_memory", lambda _, room=room: room)
        with whole.visit_whole():
            assert {p.is_meta for p in model.parameters()} == {there}
        for name, p in model.named_parameters():
            kept, address, values = before[name]
            assert p is kept
            assert p.data_ptr() == address
            assert torch.equal(p, values)


def test_model_that_hooks_load_does_not_fit_whole(monkeypatch):
    model = build_llava()
    monkeypatch.setattr(placement, "free_memory", lambda _: 2**50)
    assert placement.fits_whole(model, torch.device("meta"))
    accelerate.cpu_offload(model, execution_device="cpu")
    assert not placement.fits_whole(model, torch.device("meta"))
