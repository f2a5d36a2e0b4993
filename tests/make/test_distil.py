"""Distillation of all blocks together: what it minimizes, what it keeps, and that an interruption changes nothing."""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace

import pytest
import torch
from family_zoo import FAMILIES
from helpers import build_llama, build_llava, build_processor, build_samples, logits, packed_linears
from torch import nn

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.machine.limits import SampleLimit
from sab_hf.make import distil
from sab_hf.make.plan import make_plan
from sab_hf.make.settings import DistilSettings
from sab_hf.passes.states import BatchState

IDS = torch.randint(0, 256, (32, 20), generator=torch.Generator().manual_seed(0))
TEXT = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in IDS.split(1)]


STILL = {"distil_steps": 1, "distil_latent_rate": 1e-12, "distil_scale_rate": 1e-12}
"""Distillation that leaves the fit as it is."""


def config(**changes) -> SABQuantizationConfig:
    values = {"num_samples": 32, "batch_size": 1, "alternations": 2, "refine_steps": 0, "distil_steps": 20}
    return SABQuantizationConfig(**values | {"distil_batch": 4, "budget": "uniform", "significance": "paper"} | changes)


def divergence(model, reference, ids=IDS) -> float:
    """Return the mean KL of the next-token distributions over all tokens, nats."""
    inputs = {"input_ids": ids}
    given, wanted = (logits(m, inputs).double().log_softmax(-1) for m in (model, reference))
    return float((wanted.exp() * (wanted - given)).sum(-1).mean())


def test_predictions_come_nearer_to_those_of_the_full_precision_model():
    """Both numbers of the result are the divergence on the two samples that are held out."""
    reference = build_llama()
    fitted, trained = build_llama(), build_llama()
    sab_hf.quantize(fitted, None, TEXT, config(**STILL))
    record = sab_hf.quantize(trained, None, TEXT, config(distil_steps=60))
    (result,) = record.distillations
    batches = make_plan(build_llama(), config(), None, TEXT).calibration.batches
    held = torch.cat([batches[number].inputs["input_ids"] for number in (8, 24)])
    expected = [divergence(model, reference, held) for model in (fitted, trained)]
    assert [result.before, result.after] == pytest.approx(expected, rel=1e-3)
    assert result.after < 0.96 * result.before
    assert divergence(trained, reference) < 0.96 * divergence(fitted, reference)


@pytest.mark.parametrize("chunk", [7 * 4 * 32 * 264, 1])
def test_logits_made_for_some_positions_at_a_time_change_rounding_only(monkeypatch, chunk):
    models = [build_llama(), build_llama()]
    results = []
    for model in models:
        results += sab_hf.quantize(model, None, TEXT, config(distil_steps=2)).distillations
        monkeypatch.setattr("sab_hf.passes.tail.LOGIT_BYTES", chunk)
    assert results[0].after == pytest.approx(results[1].after, rel=1e-4)


def test_logits_are_made_where_they_count(monkeypatch):
    """On a CPU not at the placeholders of images, of which most calibration tokens are; the result is the same."""
    records = {}
    for everywhere in (False, True):
        model, positions = build_llava(), []
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda module, args, _, seen=positions: seen.append(args[0].shape[:-1].numel()))
        if everywhere:
            monkeypatch.setattr(distil, "_runs", lambda flags: [(0, len(flags))])
        options = config(num_samples=8, batch_size=2, distil_steps=3)
        record = sab_hf.quantize(model, build_processor(), build_samples(8), options)
        records[everywhere] = record.distillations[0], sum(positions)
    assert records[False][1] < records[True][1]
    assert records[False][0] == pytest.approx(records[True][0], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "runs"), [("0110100", [(1, 3), (4, 5)]), ("11", [(0, 2)]), ("00", []), ("", []), ("01", [(1, 2)])]
)
def test_runs_of_positions_that_count(flags, runs):
    assert distil._runs([flag == "1" for flag in flags]) == runs


def test_pictures_are_not_needed_for_the_head_of_a_llava(monkeypatch):
    """The tower runs to capture states, and to try whether it may stay out; no step of the training runs it."""
    model, runs = build_llava(), []
    model.get_submodule("model.vision_tower").register_forward_hook(lambda *_: runs.append(1))
    samples = build_samples(8)
    sab_hf.quantize(model, build_processor(), samples, config(num_samples=8, batch_size=2, distil_steps=1))
    few = len(runs)
    runs.clear()
    again = build_llava()
    again.get_submodule("model.vision_tower").register_forward_hook(lambda *_: runs.append(1))
    sab_hf.quantize(again, build_processor(), samples, config(num_samples=8, batch_size=2, distil_steps=6))
    assert len(runs) == few


def test_a_block_is_compiled_once_for_each_form_of_batch(monkeypatch):
    """Passes that train and passes that measure, of the first block and of all others; the result is the same."""
    ids = IDS[:30]
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)
    ]  # the last one of 2 samples
    options = config(num_samples=30, batch_size=4, distil_batch=4, distil_steps=12)
    ordinary = sab_hf.quantize(build_llama(), None, batches, options)
    compiled, graphs = nn.Module.compile, torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(distil, "compiling_pays", lambda device, steps: True)
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled(module, backend="eager"))
    torch.compiler.reset()
    graphs.clear()
    quick = sab_hf.quantize(build_llama(), None, batches, options)
    assert graphs["unique_graphs"] == 2
    assert quick.distillations[0].steps == 12
    assert list(quick.distillations[0]) == pytest.approx(list(ordinary.distillations[0]), rel=1e-5)


def test_windows_are_trained_one_after_the_other(monkeypatch):
    """A window that other blocks follow is held to the full-precision states after it, the last to the predictions."""
    monkeypatch.setattr(distil, "free_memory", lambda device: 1)
    reference, fitted, trained = build_llama(), build_llama(), build_llama()
    sab_hf.quantize(fitted, None, TEXT, config(**STILL))
    record = sab_hf.quantize(trained, None, TEXT, config())
    assert len(record.distillations) == 2
    assert all(result.after < result.before for result in record.distillations)
    assert divergence(trained, reference) < divergence(fitted, reference)


def test_compact_training_gives_nearly_the_same(monkeypatch):
    """Latents and moments in bfloat16, rounded at random; no weight is kept."""
    results = []
    for compact in (False, True):
        monkeypatch.setattr(distil, "blocks_at_once", lambda *_, compact=compact: distil.Way(2, compact, False))
        results += sab_hf.quantize(build_llama(), None, TEXT, config(distil_steps=40)).distillations
    assert results[0].after < 0.98 * results[0].before
    assert results[1].after == pytest.approx(results[0].after, rel=2e-3)


def test_batches_are_not_built_again_where_nothing_is_captured(monkeypatch):
    monkeypatch.setattr(BatchState, "with_tensors", None)
    record = sab_hf.quantize(build_llama(), None, TEXT[:4], config(num_samples=4, distil_steps=1))
    assert len(record.distillations) == 1


def test_what_fits_into_one_window_decides_how_it_is_trained():
    gpu, weights = torch.device("cuda"), [100] * 28
    assert distil.blocks_at_once(weights, gpu, 28 * 100 * 20 / 0.7 + 1) == (28, False, False)
    assert distil.blocks_at_once(weights, gpu, 28 * 100 * 8 / 0.7 + 1) == (28, True, False)
    assert distil.blocks_at_once(weights, gpu, 10 * 100 * 8 / 0.7 + 1) == (
        10,
        True,
        False,
    )  # three windows, 10 + 10 + 8
    assert distil.blocks_at_once(weights, torch.device("cpu"), 10 * 100 * 20 / 0.7 + 1) == (10, False, False)
    assert distil.blocks_at_once(weights, gpu, 1) == (1, True, False)


def test_batches_in_parts_change_rounding_only(monkeypatch):
    ids = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in IDS.split(4)]
    results = []
    for samples in (None, 3):
        monkeypatch.setattr(SampleLimit, "__init__", lambda self, samples=samples: setattr(self, "samples", samples))
        record = sab_hf.quantize(build_llama(), None, ids, config(batch_size=4, distil_steps=4))
        results += record.distillations
    assert results[0].after == pytest.approx(results[1].after, rel=1e-4)


def test_given_samples_keep_their_share():
    settings = SimpleNamespace(samples_per_step=8, seed=0)
    few, many = dict.fromkeys(range(6), 8), dict.fromkeys(range(10, 40), 8)

    def share(given, written):
        steps = itertools.islice(distil._draw_mixed(given, written, settings), 80)
        return sum(numbers[0] in given for numbers in steps) / 80

    assert share(few, many) == 0.375
    assert share(many, few) == pytest.approx(30 / 36, abs=0.02)
    assert (share(few, {}), share({}, few)) == (1, 0)


@pytest.mark.parametrize(
    ("bits", "steps", "rate"),
    [(1.1, 100, 0.03), (1.1, 1000, 0.03), (1.1, 4000, 0.015), (3.2, 1000, 0.0125), (2.0, 9000, 0.02 / 3)],
)
def test_more_bits_and_longer_runs_have_lower_rates(bits, steps, rate):
    settings = DistilSettings.of(
        SABQuantizationConfig(bits=bits, distil_steps=steps), torch.device("cpu"), writes=False
    )
    assert settings.latent_rate == pytest.approx(rate)
    assert settings.scale_rate == pytest.approx(min(0.005, rate / 5))


@pytest.mark.parametrize(
    ("writes", "options", "written"),
    [
        (True, {}, 2048),
        (False, {}, 0),
        (True, {"written_samples": 0}, 0),
        (False, {"written_samples": 7}, 7),
        (True, {"distil_steps": 0}, 0),
    ],
)
def test_models_write_samples_where_the_config_leaves_it_open(writes, options, written):
    assert DistilSettings.of(SABQuantizationConfig(**options), torch.device("cpu"), writes).written == written


def test_interrupted_training_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
    expected = build_llava()
    samples, folder = build_samples(8), tmp_path / "run"
    settings = {"num_samples": 8, "batch_size": 2, "distil_steps": 12}
    record = sab_hf.quantize(expected, build_processor(), samples, config(**settings))

    class StoppedError(Exception):
        pass

    steps = []
    original = distil._Loss.accumulate_gradients

    def stop(self, adam, numbers, step):
        steps.append(numbers)
        if len(steps) == 8:
            raise StoppedError
        original(self, adam, numbers, step)

    monkeypatch.setattr(distil._Loss, "accumulate_gradients", stop)
    with pytest.raises(StoppedError):
        sab_hf.quantize(build_llava(), build_processor(), samples, config(checkpoint_dir=str(folder), **settings))
    assert any("unfinished" in name for name in os.listdir(folder))
    first, steps[:] = steps[:7], [None] * 100
    model = build_llava()
    again = sab_hf.quantize(model, build_processor(), samples, config(checkpoint_dir=str(folder), **settings))
    assert len(steps) - 100 == 12 - len(first)
    assert again.distillations == record.distillations
    assert not any("unfinished" in name for name in os.listdir(folder))
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_training_that_diverges_keeps_what_was_before(caplog, monkeypatch):
    trained, fitted, train = build_llama(), {}, distil.distil

    def note(model, *args):
        fitted.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return train(model, *args)

    def diverge(self, adam, numbers, step):
        for gradient in adam.gradients():
            gradient.fill_(torch.nan)

    monkeypatch.setattr(distil, "distil", note)
    monkeypatch.setattr(distil._Loss, "accumulate_gradients", diverge)
    (result,) = sab_hf.quantize(trained, None, TEXT, config()).distillations
    assert (result.best_step, result.steps) == (0, 2)  # it ends at the first measurement
    assert result.before == result.after
    assert "did not lower the loss on held-out samples" in caplog.text
    assert all(torch.equal(tensor, fitted[name]) for name, tensor in trained.state_dict().items())


@pytest.mark.parametrize("count", [1, 2])
def test_few_samples_are_enough(count):
    (result,) = sab_hf.quantize(
        build_llama(), None, TEXT[:count], config(num_samples=count, distil_steps=3)
    ).distillations
    assert result.after <= result.before


@pytest.mark.parametrize("rest_bits", [4, 16])
def test_tied_head_and_norms_are_trained_in_half_precision(rest_bits):
    """The packed embedding is not trained; norms are, and stay in the model's dtype."""
    model = build_llama(tie_word_embeddings=True).bfloat16()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "norm" in name}
    record = sab_hf.quantize(model, None, TEXT, config(rest_bits=rest_bits))
    assert record.distillations[0].after < record.distillations[0].before
    norms = {name: p for name, p in model.named_parameters() if "layers" in name and "norm" in name}
    assert all(p.dtype == torch.bfloat16 for p in norms.values())
    assert any(not torch.equal(p, before[name]) for name, p in norms.items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", ["qwen3_vl", "mllama", "t5gemma", "gemma3n", "qwen3_moe"])
def test_unusual_models_are_distilled(family):
    """Deep visual features, cross-attention, an encoder, shared keys and values, experts without tokens."""
    if family not in FAMILIES:
        pytest.skip("not in this version of transformers")
    made = FAMILIES[family]()
    record = sab_hf.quantize(made.model, None, made.batches, config(num_samples=8, distil_steps=2))
    (result,) = record.distillations
    assert result.after <= result.before
    assert packed_linears(made.model)
