"""The sensitivity pass against a plain backward pass through the whole model."""

import pytest
import torch
from family_zoo import FAMILIES
from helpers import NUM_BLOCKS, build_llama, build_llava
from torch import nn

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.anatomy.roles import find_roles
from sab_hf.anatomy.selection import language_linears
from sab_hf.calibration import IMAGE, PADDING, TEXT, CalibrationBatch, prepare_calibration, token_modality
from sab_hf.method.hessian import damp
from sab_hf.passes import gradients
from sab_hf.passes.capture import BlockInputs
from sab_hf.passes.gradients import measure_sensitivity
from sab_hf.passes.tail import Tail

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


# ---- where it cannot be measured


def told(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "could not be measured" in r.message]


def sizes(model) -> dict[str, list[int]]:
    return model.config.quantization_config.modules


@pytest.mark.parametrize("case", ["no gradient", "no logits"])
def test_model_whose_loss_has_no_gradient_gets_an_even_budget_and_one_warning(
    case, make_config, processor, caplog, monkeypatch
):
    """The result is that of a config that asks for no sensitivity."""
    even, model = build_llava(), build_llava()
    plain = {"significance": "paper", "budget": "uniform", "refine_loss": "balanced"}
    sab_hf.quantize(even, processor, None, make_config(refine_steps=1, **plain))
    if case == "no gradient":
        mlp = type(model.model.language_model.layers[1].mlp)
        forward = mlp.forward
        monkeypatch.setattr(mlp, "forward", lambda self, x: _Opaque.apply(forward(self, x.detach()), x))
        reason = "block 1 (LlamaDecoderLayer) has no gradient: a kernel without one"
    else:
        monkeypatch.setattr("sab_hf.passes.tail.output_of_last_block", lambda *_, **__: object())
        reason = "LlavaForConditionalGeneration gives no `logits`"
    sab_hf.quantize(model, processor, None, make_config(refine_steps=0))
    (message,) = told(caplog)
    assert reason in message
    assert "bits are spread evenly" in message
    assert sizes(model) == sizes(even)


class _Opaque(torch.autograd.Function):
    """A kernel that has no backward pass."""

    @staticmethod
    def forward(ctx, y, x):
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("a kernel without one")


def test_encoder_decoder_gets_an_even_budget_and_one_warning(caplog):
    """The encoder's blocks are another stage: the loss reaches them through the decoder only."""
    models = []
    for changes in ({}, {"significance": "paper", "budget": "uniform", "refine_loss": "balanced"}):
        family = FAMILIES["florence2"]()
        config = SABQuantizationConfig(
            num_samples=8, refine_steps=1, distil_steps=0, alternations=1, bits=2.2, **changes
        )
        sab_hf.quantize(family.model, None, family.batches, config)
        models.append(family.model)
    (message,) = told(caplog)
    assert "only through the blocks of `model.language_model.decoder.layers.0`" in message
    fell_back, plain = (model.state_dict() for model in models)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in fell_back.items())


def test_features_that_only_cross_attention_reads_have_their_gradient():
    """Keys and values of an image come from no hidden state; blocks that a text leaves out are passed by."""
    family = FAMILIES["mllama"]()
    roles = find_roles(family.model)
    batches = [CalibrationBatch(b, token_modality(b, family.model.config)) for b in family.batches]
    names = list(language_linears(family.model, roles, []))
    inputs = BlockInputs(family.model, roles.blocks, batches)
    result = measure_sensitivity(
        family.model, inputs, batches, roles.blocks, names, damping=DAMPING, num_samples=8, seed=SEED
    )
    assert result.linears.keys() == set(names)
    linears = {name: family.model.get_submodule(name) for name in names if ".cross_attn.k_proj" in name}
    assert linears
    expected: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(batches):
        outputs = {}
        hooks = [
            m.register_forward_hook(lambda _, args, output, n=n, outputs=outputs: outputs.update({n: output}))
            for n, m in linears.items()
        ]
        logits = family.model(**batch.inputs, use_cache=False).logits.float().flatten(0, 1)
        for hook in hooks:
            hook.remove()
        drawn = torch.multinomial(
            logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(SEED + number)
        )
        loss = nn.functional.cross_entropy(logits, drawn[:, 0], reduction="sum")
        for name, gradient in zip(
            outputs, torch.autograd.grad(loss, list(outputs.values())) if outputs else (), strict=True
        ):
            expected[name] = expected.get(name, 0) + gradient.flatten(0, -2).square().sum(0)
    for name in linears:
        at = result.linears[name]
        assert at.gradient.keys() == {IMAGE}
        torch.testing.assert_close(at.gradient[IMAGE] * at.tokens[IMAGE], expected[name], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("positions", [1, 5])
def test_gradients_of_logits_made_in_parts_are_those_of_all(positions, samples, processor, monkeypatch):
    """With tokens that do not depend on chance."""
    model = build_llava()
    monkeypatch.setattr(torch, "multinomial", lambda p, _, generator: p.argmin(-1, keepdim=True))
    batches = prepare_calibration(samples, processor, model.config, num_samples=4, batch_size=2).batches
    inputs, blocks = BlockInputs(model, find_roles(model).blocks, batches), list(model.model.language_model.layers)
    state = inputs.states[0]
    tail = Tail(model, blocks, batches[0], state)
    whole = gradients._gradient_at_output(tail, batches[0], state, SEED)
    assert gradients.positions_at_once(model, batches[0]) == batches[0].modality.shape[1]
    monkeypatch.setattr(
        "sab_hf.passes.tail.LOGIT_BYTES", positions * 20 * 2 * model.get_input_embeddings().num_embeddings
    )
    assert gradients.positions_at_once(model, batches[0]) == positions
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, output: seen.append(output.shape[1]))
    parts = gradients._gradient_at_output(tail, batches[0], state, SEED)
    assert max(seen) == positions
    assert sum(seen) == batches[0].modality.shape[1]
    assert whole.abs().max() > 0
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_tower_does_not_run_again_for_gradients(samples, processor):
    """Once, to try whether the head alone gives the logits."""
    model = build_llava()
    batches = prepare_calibration(samples, processor, model.config, num_samples=4, batch_size=1).batches
    blocks = find_roles(model).blocks
    inputs, runs = BlockInputs(model, blocks, batches), []
    model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    linears = list(language_linears(model, find_roles(model), []))
    found = measure_sensitivity(model, inputs, batches, blocks, linears, damping=0.01, num_samples=4, seed=SEED)
    assert found.linears.keys() == set(linears)
    assert len(runs) == 1 < len(batches)
