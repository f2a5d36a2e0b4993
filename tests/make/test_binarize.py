"""What a run must not depend on, and what it must leave as it was."""

from __future__ import annotations

import pytest
import torch
from family_zoo import FAMILIES
from helpers import build_llama, build_llava
from torch import nn

from sab_hf import SABLinear, SABQuantizationConfig, quantize
from sab_hf.anatomy.roles import find_roles
from sab_hf.calibration import PADDING
from sab_hf.machine.store import tensors_in
from sab_hf.make.binarize import _by_input
from sab_hf.make.distil import distil_window
from sab_hf.method import hessian
from sab_hf.method.hessian import SecondMoments

TEXT = [{"input_ids": torch.arange(40).reshape(2, 20) + 40 * i} for i in range(3)]


def language_model(model: nn.Module) -> nn.Module:
    return model.model.language_model


def logits_of_run(make_config, processor, model: nn.Module) -> torch.Tensor:
    quantize(model, processor, None, make_config(refine_steps=2))
    with torch.no_grad():
        return model(input_ids=torch.arange(5)[None]).logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_callers_default_dtype_changes_nothing(make_config, processor, dtype):
    expected, model = logits_of_run(make_config, processor, build_llava()), build_llava()
    torch.set_default_dtype(dtype)
    try:
        quantize(model, processor, None, make_config(refine_steps=2))
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(5)[None]).logits, expected)


def test_callers_default_device_changes_nothing(make_config, processor):
    expected, model = logits_of_run(make_config, processor, build_llava()), build_llava()
    with torch.device("meta"):
        quantize(model, processor, None, make_config(refine_steps=2))
        assert torch.get_default_device().type == "meta"
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(5)[None]).logits, expected)


def test_callers_no_grad_changes_nothing(make_config, processor):
    expected = logits_of_run(make_config, processor, build_llava())
    with torch.no_grad():
        assert torch.equal(logits_of_run(make_config, processor, build_llava()), expected)
        assert not torch.is_grad_enabled()


def test_inference_mode_is_refused_before_any_work(model, make_config, processor):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of it"):
        quantize(model, processor, None, make_config())
    assert not any(isinstance(module, SABLinear) for module in model.modules())


def test_modules_keep_their_training_modes(model, make_config, processor):
    model.eval()
    language_model(model).train()
    modes = {name: module.training for name, module in model.named_modules()}
    quantize(model, processor, None, make_config(refine_steps=0))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert any(isinstance(module, SABLinear) for module in model.modules())


def test_refinement_leaves_dense_matrices_alone(model, make_config, processor):
    before = {name: p.detach().clone() for name, p in language_model(model).named_parameters()}
    kept = make_config(refine_steps=5, modules_to_not_convert=["down_proj"], allow_low_coverage=True)
    quantize(model.bfloat16(), processor, None, kept)
    after = dict(language_model(model).named_parameters())
    matrices = [name for name in before if name in after and before[name].ndim > 1]
    assert any("down_proj" in name for name in matrices)
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in matrices)
    assert not torch.equal(
        after["layers.0.input_layernorm.weight"], before["layers.0.input_layernorm.weight"].bfloat16()
    )
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_interrupted_refinement_leaves_the_block_as_it_was(make_config, processor, monkeypatch, error):
    model = build_llava().bfloat16().requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def fail(block, index, trainees, *args):
        trainees.others[0].data += 1
        raise error

    monkeypatch.setattr("sab_hf.make.refine._train", fail)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        quantize(model, processor, None, make_config(refine_steps=2))
    monkeypatch.undo()
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) and not after[name].requires_grad for name in before)
    quantize(model, processor, None, make_config(refine_steps=0))  # what the message tells to do


def test_linear_of_several_blocks_is_refused_by_its_names(make_config):
    model = build_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.gate_proj` and `model\.layers\.1\.mlp\.gate_proj` are one Linear"
    ):
        quantize(model, None, TEXT, make_config())
    names = ["gate_proj", "up_proj", "down_proj"]
    quantize(model, None, TEXT, make_config(modules_to_not_convert=names, allow_low_coverage=True, refine_steps=0))


def test_inputs_may_be_given_by_name(make_config):
    def forward(self, x):
        return self.down_proj(input=self.act_fn(self.gate_proj(input=x)) * self.up_proj(input=x))

    models = [build_llama(), build_llama()]
    for layer in models[1].model.layers:
        layer.mlp.forward = forward.__get__(layer.mlp)
    for model in models:
        quantize(model, None, TEXT, make_config(refine_steps=2))
    with torch.no_grad():
        first, second = (model(input_ids=TEXT[0]["input_ids"]).logits for model in models)
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", ["qwen3_vl", "mllama", "gemma3n"])
def test_windows_are_held_to_the_states_of_the_full_precision_model(monkeypatch, family):
    """For given and for written samples, at the end of each of several windows.

    Deep visual features, which the model adds between blocks; blocks that run for images only; keys and values of earlier blocks.
    """
    if family not in FAMILIES:
        pytest.skip("not in this version of transformers")
    made, dense, ends = FAMILIES[family](), FAMILIES[family]().model, []

    def note(model, plan, window, weights, inputs, batches, steps):
        states = [state for each in inputs for state in each.states]
        kept = [(s.hidden, s.target, s.calls, s.injections, s.left, s.target_left) for s in states]
        sizes = sum(tensor.nbytes for tensor in tensors_in(kept)), sum(inputs[0].workspace.store.used.values())
        last = window.first + len(window.names) - 1
        targets = [(batches[s.number], s.hidden if s.target is None else s.target.clone()) for s in states]
        ends.append((last, targets, len(inputs[0].states), sizes))
        return distil_window(model, plan, window, weights, inputs, batches, steps)

    monkeypatch.setattr("sab_hf.make.binarize.distil_window", note)
    monkeypatch.setattr("sab_hf.make.distil.free_memory", lambda device: 1)
    options = {"alternations": 1, "budget": "uniform", "significance": "none", "distil_steps": 1}
    options |= {"num_samples": 8, "batch_size": 1, "written_samples": 5, "refine_steps": 0}
    quantize(made.model, None, made.batches, SABQuantizationConfig(**options))
    blocks = [dense.get_submodule(name) for name in find_roles(dense).blocks]
    assert [last for last, *_ in ends] == list(range(len(blocks)))
    passed: list[tuple[int, torch.Tensor]] = []  # what enters each block that runs, and at last what the last one gives

    def note_passed(block, args, kwargs, output):
        entered, given = (
            args[0] if args else kwargs["hidden_states"],
            output[0] if isinstance(output, tuple) else output,
        )
        passed[-1:] = [(blocks.index(block), entered.clone()), (len(blocks), given.clone())]

    for block in blocks:
        block.register_forward_hook(note_passed, with_kwargs=True)
    for last, targets, given, (kept, used) in ends:
        for batch, target in targets:
            passed.clear()
            with torch.no_grad():
                dense(**batch.inputs, use_cache=False)
            expected = next(hidden for index, hidden in passed if index > last)
            real = batch.modality != PADDING
            torch.testing.assert_close(target[..., real, :], expected[..., real, :], rtol=1e-4, atol=1e-5)
        assert any("pixel_values" in batch.inputs for batch, _ in targets[given:]) == (family != "gemma3n")
        assert used == kept


def test_sensitivity_is_measured_where_something_uses_it(model, make_config, processor):
    config = make_config(significance="none", budget="uniform", refine_loss="gradient", refine_steps=0)
    assert not quantize(model, processor, None, config).measured


def test_linears_with_one_input_share_its_factors(make_config, monkeypatch):
    """Query, key and value, the output, gate and up, and down: four factorizations for seven Linears, and none elsewhere."""
    model, made, plain = build_llama(), [], hessian.feedback_factor

    def counted(H):
        made.append(H.shape)
        return plain(H)

    monkeypatch.setattr(hessian, "feedback_factor", counted)
    monkeypatch.setattr("sab_hf.method.fit.feedback_factor", None)
    config = make_config(refine_steps=0, significance="paper", budget="uniform")  # nothing of these measures gradients
    record = quantize(model, None, TEXT, config)
    layers = model.model.layers
    assert [fit.name for fit in record.fits] == [name for name, _ in packed_linears(model)]
    assert len(record.fits) == 7 * len(layers)
    assert len(made) == 4 * len(layers)


def packed_linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SABLinear)]


def test_linears_are_fitted_by_input_wherever_they_stand():
    a, b = SecondMoments(4, torch.device("cpu")), SecondMoments(4, torch.device("cpu"))
    linears = {name: nn.Linear(4, 4) for name in "uvwxyz"}
    assert _by_input(linears, {"u": a, "v": b, "w": a, "y": b}) == ["u", "w", "v", "y", "x", "z"]
