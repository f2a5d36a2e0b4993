"""The sensitivity pass against a plain backward pass through the whole model."""

import pytest
import torch
from conftest import NUM_BLOCKS, build_llama, build_llava
from torch import nn

from sab_hf.calibration import IMAGE, PADDING, TEXT, prepare_calibration
from sab_hf.capture import BlockInputs
from sab_hf.gradients import measure_sensitivity
from sab_hf.hessian import damp
from sab_hf.roles import find_roles
from sab_hf.selection import language_linears

DAMPING, SEED = 0.01, 5


def measured(model, samples, processor, num_samples=4):
    roles = find_roles(model)
    linears = language_linears(model, roles, [])
    batches = prepare_calibration(samples, processor, model.config, num_samples=4, batch_size=2).batches
    inputs = BlockInputs(model, roles.blocks, batches)
    before = [state.hidden.clone() for state in inputs.states]
    result = measure_sensitivity(
        model, inputs, batches, roles.blocks, linears, damping=DAMPING, num_samples=num_samples, seed=SEED
    )
    assert all(torch.equal(state.hidden, hidden) for state, hidden in zip(inputs.states, before, strict=True))
    return result, batches, linears, roles


def plain_gradients(model, batches, modules):
    """Mean squared gradients by modality at the outputs of `modules`, from one backward pass of the whole model."""
    sums, counts = {name: {} for name in modules}, {}
    for i, batch in enumerate(batches):
        outputs = {}

        def note(name, output, outputs=outputs):
            outputs[name] = output[0] if isinstance(output, tuple) else output

        hooks = [
            module.register_forward_hook(lambda _, args, output, name=name, note=note: note(name, output))
            for name, module in modules.items()
        ]
        logits = model(**batch.inputs, use_cache=False).logits.float()
        for hook in hooks:
            hook.remove()
        logits = logits.flatten(0, 1)[batch.modality.flatten() != PADDING]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(SEED + i))
        loss = nn.functional.cross_entropy(logits, drawn[:, 0], reduction="sum")
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        for m in (TEXT, IMAGE):
            chosen = batch.modality.flatten() == m
            counts[m] = counts.get(m, 0) + int(chosen.sum())
            for name, gradient in zip(outputs, gradients, strict=True):
                rows = gradient.reshape(-1, gradient.shape[-1])[chosen]
                sums[name][m] = sums[name].get(m, 0) + rows.square().sum(0)
    return {name: {m: total / counts[m] for m, total in by.items()} for name, by in sums.items()}, counts


def test_gradients_are_those_of_a_backward_pass_through_the_whole_model(samples, processor):
    model = build_llava(attention_bias=True)
    result, batches, linears, roles = measured(model, samples, processor)
    blocks = {name: model.get_submodule(name) for name in roles.blocks}
    expected, counts = plain_gradients(model, batches, linears | blocks)
    assert result.linears.keys() == linears.keys()
    for name, at in result.linears.items():
        for m in (TEXT, IMAGE):
            torch.testing.assert_close(at.gradient[m], expected[name][m], rtol=1e-3, atol=1e-8)
        assert at.tokens == counts
    assert len(roles.blocks) == NUM_BLOCKS
    assert result.outputs.keys() == set(roles.blocks)
    for name in roles.blocks:
        for m in (TEXT, IMAGE):
            torch.testing.assert_close(result.outputs[name][m], expected[name][m], rtol=1e-3, atol=1e-8)


def test_variances_are_those_of_the_inverse_second_moments(samples, processor):
    model = build_llava()
    result, batches, linears, _ = measured(model, samples, processor)
    name = next(name for name in linears if name.endswith("layers.0.mlp.up_proj"))
    seen = []
    hook = linears[name].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch.inputs, use_cache=False)
    hook.remove()
    for m in (TEXT, IMAGE):
        x = torch.cat([s.flatten(0, 1)[b.modality.flatten() == m] for s, b in zip(seen, batches, strict=True)])
        H = damp(x.T @ x / len(x), DAMPING)
        torch.testing.assert_close(result.linears[name].variance[m], 1 / H.inverse().diagonal(), rtol=1e-3, atol=0)


def test_column_scores_are_the_loss_at_stake(samples, processor):
    model = build_llava()
    result, _, linears, _ = measured(model, samples, processor)
    for name, at in result.linears.items():
        W = linears[name].weight.detach()
        for m, scores in at.column_scores(W).items():
            expected = at.tokens[m] * torch.einsum("i,ij,j->j", at.gradient[m], W.square(), at.variance[m])
            torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_sensitivity_of_fewer_samples_uses_whole_batches(samples, processor, num_samples):
    model = build_llava()
    result, batches, _, _ = measured(model, samples, processor, num_samples)
    tokens = next(iter(result.linears.values())).tokens
    assert tokens == {m: int((batches[0].modality == m).sum()) for m in (TEXT, IMAGE)}


def test_sensitivity_of_a_text_model_has_one_modality_and_leaves_parameters_as_they_were(processor):
    model = build_llama()
    result, *_ = measured(model, ["a text of some length", "another"], processor.tokenizer)
    assert all(at.gradient.keys() == {TEXT} for at in result.linears.values())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
