"""The prediction made before a run is what the run then needs."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import gc
import multiprocessing
import sys
import types
from pathlib import Path

import pytest
import shapes
import torch
from accelerate import cpu_offload
from helpers import build_llava
from PIL import Image
from transformers import AutoModelForImageTextToText

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.machine.rates import Machine
from sab_hf.machine.workspace import Workspace
from sab_hf.make import preflight
from sab_hf.make.distil import distil_window
from sab_hf.make.plan import make_plan
from sab_hf.make.preflight import check_room, estimate_on
from sab_hf.make.settings import IMAGE_TOKENS_CPU, image_tokens

MIB, GIB = 2**20, 2**30


def small_model(hidden: int, intermediate: int):
    shape = dataclasses.replace(
        shapes.SHAPES["tiny"], hidden=hidden, intermediate=intermediate, heads=hidden // 64, kv_heads=hidden // 64
    )
    model = shapes.build(shape, 2, torch.device("cpu"), torch.float32)
    return model, shapes.batches(model, shape, 8, 4)


def config(given: list, **changes) -> SABQuantizationConfig:
    settings = {"num_samples": 8, "alternations": 1, "refine_steps": 1, "distil_steps": 0} | changes
    return SABQuantizationConfig(calibration=given, **settings)


def resident(key: str) -> int:
    """Return bytes that this process has, or had at most since the mark was reset, in RAM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _measure(sender) -> None:
    torch.set_num_threads(1)
    model, given = small_model(64, 160)
    sab_hf.quantize(model, None, None, config(given))  # what is imported and allocated once
    for hidden, intermediate in ((256, 704), (448, 1216)):
        model, given = small_model(hidden, intermediate)
        predicted = sab_hf.estimate(model, None, None, config(given)).peak_ram
        weights = sum(p.nbytes for p in model.parameters())
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        before = resident("VmRSS") - weights
        sab_hf.quantize(model, None, None, config(given))
        sender.send((predicted, resident("VmHWM") - before))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_predicted_peak_is_the_measured_one():
    """Peak resident memory above what a fresh process had, for two widths."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_measure, args=(sender,))
    process.start()
    sender.close()
    found = [receiver.recv() for _ in range(2)]
    process.join()
    for predicted, measured in found:
        assert 0.75 * measured < predicted < 1.34 * measured, f"{predicted / MIB:.0f} MiB, was {measured / MIB:.0f} MiB"


@pytest.mark.parametrize(
    ("shape", "layers", "free", "samples", "batch", "measured"),
    [("7b", 28, 139, 64, 4, 57.0), ("72b", 2, 16, 32, 2, 21.9)],
)
def test_peak_of_distillation_is_what_an_h200_measured(shape, layers, free, samples, batch, measured):
    """`benchmarks/several_gpus.py`, 2026-11-30; the second where 16 GiB are said to be free, so in windows of one block."""
    shape = shapes.SHAPES[shape]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shapes.config(shape, layers), dtype=torch.bfloat16)
    given = shapes.batches(model, shape, samples, batch)
    options = config(given, num_samples=samples, distil_steps=20, significance="none", budget="uniform")
    machine = Machine(torch.device("cuda:0"), "H200", free * GIB, 100 * GIB, {"device": 50 * GIB, "ram": 50 * GIB})
    predicted = estimate_on(machine, model, make_plan(model, options, None, given), options)
    assert predicted.memory()["distillation"][0] / GIB == pytest.approx(measured, rel=0.05)


def test_weights_on_the_device_are_counted_once(monkeypatch):
    model, given = small_model(64, 160)
    options = config(given, distil_steps=4)
    plan = make_plan(model, options, None, given)
    machine = Machine(torch.device("cuda:0"), "a GPU", 8 * GIB, 8 * GIB, {"device": 0.0, "ram": 8 * GIB})
    from_ram = estimate_on(machine, model, plan, options).working
    monkeypatch.setattr(preflight, "weight_places", lambda model: dict.fromkeys(model.parameters(), "cuda"))
    on_device = estimate_on(machine, model, plan, options).working
    block = model.get_submodule(plan.roles.blocks[0])
    inside = sum(p.nbytes for name in plan.roles.blocks for p in model.get_submodule(name).parameters())
    beside = sum(p.nbytes for p in model.parameters()) - inside
    assert from_ram["capture"] - on_device["capture"] == beside + sum(p.nbytes for p in block.parameters())
    matrices = sum(p.nbytes for name in plan.roles.blocks for p in model.get_submodule(name).parameters() if p.ndim > 1)
    assert from_ram["distillation"] - on_device["distillation"] == beside + matrices


@pytest.mark.parametrize(
    "place", [lambda model: model.to("meta"), lambda model: cpu_offload(model, torch.device("cpu"))]
)
def test_weights_to_be_loaded_count_as_those_that_are_there(place):
    """A dry run says what the run says, by stage: on a CPU of a model to be loaded and of an offloaded one, on a GPU too."""
    model, given = small_model(64, 160)
    options = config(given, refine_steps=None, distil_steps=1)
    elsewhere = place(copy.deepcopy(model))
    dry, plan = sab_hf.estimate(elsewhere, None, None, options), make_plan(elsewhere, options)
    machine = Machine(torch.device("cuda:0"), "a GPU", 8 * GIB, 8 * GIB, {"device": 0.0, "ram": 8 * GIB})
    on_gpu = (estimate_on(machine, each, plan, options).memory() for each in (elsewhere, model))
    assert next(on_gpu) == next(on_gpu)
    run = sab_hf.quantize(model, None, None, options).predicted
    assert "distillation" in run.memory()
    assert dry.memory() == run.memory()


def test_model_held_in_float32_needs_what_one_in_float32_needs(monkeypatch):
    """The dense weights that distillation gives up are then those in float32."""
    monkeypatch.setattr(preflight, "faster_dtype", lambda model, device: torch.float32)
    model, given = small_model(64, 160)
    options = config(given, distil_steps=1)
    whole = sab_hf.estimate(model, None, None, options)
    half = sab_hf.estimate(model.to(torch.bfloat16), None, None, options)
    assert half.widened == half.weights / 2
    assert half.memory() == whole.memory()


def test_room_is_checked_without_measuring_rates(monkeypatch):
    model, given = small_model(64, 160)
    settings = config(given)
    monkeypatch.setattr("sab_hf.machine.rates._measured", None)
    check_room(model, make_plan(model, settings), settings)
    with pytest.raises(TypeError, match="not callable"):
        sab_hf.estimate(model, None, None, settings)


def test_estimate_counts_weights_packed_bytes_and_states():
    model, given = small_model(64, 160)
    estimate = sab_hf.estimate(model, None, None, config(given))
    tokens = sum(batch["input_ids"].numel() for batch in given)
    assert estimate.weights == sum(p.nbytes for p in model.parameters())
    assert estimate.states["ram"] > 2 * tokens * 64 * 4
    assert estimate.states["disk"] == 0
    assert {"sensitivity", "capture", "fit", "refinement"} <= estimate.seconds.keys()
    assert 0 < estimate.peak_device <= estimate.peak_ram
    assert "RAM peak" in str(estimate)
    sab_hf.quantize(model, None, None, config(given))
    assert estimate.packed == sum(module.stored_bytes for module in sab_hf.report(model).modules)


def test_states_of_written_samples_are_counted(monkeypatch):
    """What enters a window and what is wanted after it, and masks and positions; a run without training writes none."""
    used, predicted, untrained = [], [], []

    def note(model, plan, window, weights, inputs, *others):
        used.append(inputs[0].workspace.store.used["ram"])
        return distil_window(model, plan, window, weights, inputs, *others)

    monkeypatch.setattr("sab_hf.make.binarize.distil_window", note)
    for written in (0, 8):
        model, given = small_model(64, 160)
        options = config(
            given, significance="none", budget="uniform", refine_steps=0, distil_steps=1, written_samples=written
        )
        plan, machine = make_plan(model, options), Machine.here(Workspace.of(model, options))
        untrained.append(estimate_on(machine, model, preflight._without_training(plan), options).states)
        predicted.append(sab_hf.quantize(model, None, None, options).predicted.states["ram"])
    more = used[1] - used[0]
    assert 0 < more < predicted[1] - predicted[0] < 3 * more
    assert untrained[0] == untrained[1]


def test_estimate_follows_the_settings():
    model, given = small_model(64, 160)
    whole = sab_hf.estimate(model, None, None, config(given))
    on_disk = sab_hf.estimate(model, None, None, config(given, cache_ram_gib=0.0))
    assert on_disk.states == {"device": 0.0, "ram": 0.0, "disk": whole.states["ram"]}
    plain = {"significance": "paper", "budget": "uniform", "refine_loss": "balanced"}
    unmeasured = sab_hf.estimate(model, None, None, config(given, **plain))
    assert "sensitivity" in whole.working.keys() - unmeasured.working.keys()
    assert unmeasured.states["ram"] < whole.states["ram"]
    unrefined = sab_hf.estimate(model, None, None, config(given, refine_steps=0, **plain))
    assert "refinement" not in unrefined.working
    assert unrefined.states["ram"] < unmeasured.states["ram"]
    half = sab_hf.estimate(model, None, None, config(given, sensitivity_samples=4))
    assert unmeasured.states["ram"] <= half.states["ram"] < whole.states["ram"]
    more = sab_hf.estimate(model, None, None, config(given, bits=4.0))
    assert more.working["fit"] > whole.working["fit"]


def test_line_is_logged_before_work_starts(caplog, monkeypatch):
    model, given = small_model(64, 160)
    monkeypatch.setattr("sab_hf.make.binarize.BlockInputs", None)
    with caplog.at_level("INFO", "sab_hf"), pytest.raises(TypeError):
        sab_hf.quantize(model, None, None, config(given))
    assert "estimate: " in caplog.text
    assert "RAM peak" in caplog.text


def test_warning_says_with_which_setting_the_run_fits(caplog, monkeypatch):
    from sab_hf.machine import rates
    from sab_hf.make.preflight import log_estimate

    model, given = small_model(64, 160)

    def with_free(size: float) -> sab_hf.make.preflight.Estimate:
        monkeypatch.setattr(rates.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=size))
        return sab_hf.estimate(model, None, None, config(given, cache_ram_gib=1.0))

    whole = with_free(1e12)
    log_estimate(whole)
    assert "may be needed" not in caplog.text
    needed = whole.needed["RAM"]
    short = with_free(0.99 * needed)
    assert not short.fits
    assert short.to_dict()["fits"] is False
    log_estimate(short)
    said = caplog.records[-1]
    assert said.levelname == "WARNING"
    assert "GiB may be needed; with batch_size=1 it fits" in said.getMessage()
    nothing = with_free(1.0)
    assert "use a machine with more" in nothing.advice
    assert "cache_ram_gib=0" in nothing.advice
    assert nothing.advice in nothing.table()


def test_measured_stands_beside_predicted():
    model, given = small_model(64, 160)
    record = sab_hf.quantize(model, None, None, config(given))
    assert record.predicted.seconds.keys() == record.stages.stages.keys()
    for name in record.stages.stages:
        assert name in record.compared()
    assert f"quantizing took {record.seconds:.0f} s, " in str(sab_hf.report(model))


def test_progress_is_told_to_a_function():
    model, given = small_model(64, 160)
    moments = []
    sab_hf.quantize(model, None, None, config(given, progress=moments.append))
    shares = [moment.share for moment in moments]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    model, given = small_model(64, 160)
    with pytest.raises(KeyboardInterrupt):
        sab_hf.quantize(model, None, None, config(given, progress=interrupt))


def interrupt(moment) -> None:
    raise KeyboardInterrupt


def test_experts_have_moments_of_their_own():
    """Each expert sees other tokens, so none shares an accumulator with its neighbour."""
    from family_zoo import FAMILIES

    from sab_hf.anatomy.roles import find_roles
    from sab_hf.anatomy.selection import language_linears
    from sab_hf.make.preflight import _Block, weight_places

    model = FAMILIES["qwen3_vl_moe"]().model
    roles = find_roles(model)
    shapes_ = {n: (m.out_features, m.in_features) for n, m in language_linears(model, roles, []).items()}
    device, modules, places = torch.device("cpu"), {n: [1, 0] for n in shapes_}, weight_places(model)
    block = _Block.of(model, roles.blocks[0], shapes_, modules, device, places, model.dtype)
    experts = [n for n in shapes_ if n.startswith(roles.blocks[0]) and "experts" in n]
    attention = [n for n in shapes_ if n.startswith(roles.blocks[0]) and "self_attn" in n]
    assert len(experts) == 8
    assert len(attention) == 4
    assert len(block.inputs) == len(experts) + 2  # what query, key and value read, and the output projection


def test_pictures_are_small_on_a_cpu_and_leave_room_for_text_unless_asked_for():
    asked = SABQuantizationConfig(image_tokens=1088)
    for device, expected in (("cpu", IMAGE_TOKENS_CPU), ("cuda", 1536)):
        assert image_tokens(SABQuantizationConfig(), torch.device(device)) == expected
        assert image_tokens(SABQuantizationConfig(max_length=40), torch.device(device)) == 30
        assert image_tokens(asked, torch.device(device)) == 1088


@pytest.mark.parametrize(("samples", "warned"), [("builtin", True), (None, False)])
def test_built_in_samples_are_warned_of(samples, warned, processor, caplog):
    model = build_llava()
    own = samples or [{"image": Image.new("RGB", (8, 8)), "question": "What color?", "answer": "Red."}]
    config = SABQuantizationConfig(calibration=own, num_samples=1)
    with caplog.at_level("WARNING", "sab_hf"):
        make_plan(model, config, processor)
    assert ("calibrating on the built-in samples" in caplog.text) == warned


@pytest.mark.parametrize(
    ("fields", "warned"),
    [
        ({"preset": "fast"}, True),
        ({"preset": "fast", "bits": 2.1}, False),
        ({"refine_steps": 1, "distil_steps": 0}, False),
        ({"distil_steps": 1}, False),
    ],
)
def test_few_bits_without_training_are_warned_of(fields, warned, caplog):
    model, given = small_model(64, 160)
    with caplog.at_level("WARNING", "sab_hf"):
        make_plan(model, SABQuantizationConfig(calibration=given, **fields))
    assert ("nothing is trained" in caplog.text) == warned
