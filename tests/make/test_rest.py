"""Towers, projector, embedding and head on sign planes: accuracy of the fit, round trips, tied weights, errors."""

import copy
import functools
import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from helpers import (
    CPU,
    V5,
    build_llama,
    build_llava,
    build_processor,
    build_tokenizer,
    file_bytes,
    file_entries,
    generate,
    load,
    logits,
    save_dense,
)
from torch import nn

import sab_hf
from sab_hf.machine.placement import Placement
from sab_hf.machine.workspace import Workspace
from sab_hf.make import rest
from sab_hf.make.plan import make_plan
from sab_hf.method.fit import fit_planes, fit_tall_planes
from sab_hf.packed.embedding import SABEmbedding, SABTiedEmbedding, SABTiedHead, look_up_scale
from sab_hf.packed.linear import SABLinear, SABModule
from sab_hf.passes.rest_inputs import moments_after_blocks

ROLES = ("vision", "projector", "embedding", "head")


def quantized(make_config, tied=False, **changes):
    model = build_llava(tied=tied, tie_word_embeddings=tied)
    sab_hf.quantize(model, build_processor(), config=make_config(**changes))
    return model


@pytest.fixture(scope="module")
def whole(make_config):
    """Return a function that gives a copy of a model with 4 planes outside its blocks."""
    made = functools.cache(lambda tied: quantized(make_config, tied, rest_bits=4))
    return lambda tied=False: copy.deepcopy(made(tied))


def test_embedding_looks_up_the_rows_of_its_planes():
    torch.manual_seed(0)
    planes = fit_planes(torch.randn(13, 20), torch.eye(20), 3).planes
    module = SABEmbedding.from_planes(planes, torch.float32)
    ids = torch.tensor([[0, 12, 5], [5, 5, 1]])
    torch.testing.assert_close(module(ids), module.planes().dense()[ids])
    assert module.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert list(module.state_dict()) == ["signs", "row_scale", "col_scale"]
    assert (module.num_embeddings, module.embedding_dim) == (13, 20)


class Scaled(nn.Embedding):
    """As Gemma's: the factor is a buffer, of which a skeleton on the meta device holds no value."""

    def __init__(self, scale, device=None):
        super().__init__(13, 20, device=device)
        self.scalar_embed_scale = scale
        self.register_buffer("embed_scale", torch.tensor(scale, device=device), persistent=False)

    def forward(self, input):
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


class Normed(nn.Embedding):
    def forward(self, input):
        return nn.functional.normalize(super().forward(input), dim=-1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_factor_of_a_scaled_embedding_is_found(device):
    assert look_up_scale(nn.Embedding(13, 20, device=device)) == 1
    assert look_up_scale(Scaled(5.65625, device)) == 5.65625
    assert (
        look_up_scale(Scaled(4.47213, device), torch.bfloat16) == 4.46875
    )  # as the buffer of a bfloat16 model holds it
    assert look_up_scale(Normed(13, 20, device=device)) is None


def test_scaled_embedding_keeps_its_factor_packed_and_dequantized():
    planes = fit_planes(torch.randn(13, 20), torch.eye(20), 3).planes
    module = SABEmbedding.from_planes(planes, torch.float32, Scaled(5.65625, "meta"))
    ids = torch.tensor([[0, 12, 5]])
    W = module.planes().dense()
    torch.testing.assert_close(module(ids), 5.65625 * W[ids])
    torch.testing.assert_close(module.weight[3, :], W[3])  # rows of the matrix itself, as Gemma 4 asks for them
    torch.testing.assert_close(module(W[:1], as_head=True, exact=True), W[:1] @ W.T)
    dense = module.dense(torch.float32)
    assert type(dense) is Scaled
    torch.testing.assert_close(dense(ids), module(ids))
    tied = SABTiedEmbedding(module, Scaled(2.0))
    torch.testing.assert_close(tied(ids), 2.0 * W[ids])
    assert not tied.state_dict()


def test_whole_rows_only_are_taken_from_a_packed_embedding_s_weight():
    planes = fit_planes(torch.randn(13, 20), torch.eye(20), 2).planes
    weight = SABEmbedding.from_planes(planes, torch.float32).weight
    assert weight[torch.tensor([1, 2])].shape == (2, 20)
    for index in (slice(1, None), (1, 2), (None, None)):
        with pytest.raises(TypeError, match="embedding_bits=16"):
            weight[index]


def test_embedding_that_is_more_than_a_look_up_stays_dense(make_config):
    def build():
        model = build_llava(tied=True, tie_word_embeddings=True)
        embedding = model.get_input_embeddings()
        embedding.__class__ = Normed
        return model

    model = build()
    sab_hf.quantize(model, build_processor(), config=make_config(rest_bits=4))
    assert type(model.get_input_embeddings()) is Normed
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="more than look rows up"):
        sab_hf.quantize(build(), build_processor(), config=make_config(head_bits=4))


def test_embedding_compiles_whole():
    module = SABEmbedding.from_planes(fit_planes(torch.randn(9, 12), torch.eye(12), 2).planes, torch.float32)
    ids = torch.tensor([3, 8])
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), module(ids))


@pytest.mark.parametrize("rows", [7, 16, 100])
def test_tall_fit_is_near_the_whole_fit(rows):
    torch.manual_seed(0)
    W, x = torch.randn(100, 24) * torch.rand(24), torch.randn(500, 24) @ torch.randn(24, 24)
    H = x.T @ x / 500 + 0.1 * torch.eye(24)
    whole, tall = fit_planes(W, H, 4), fit_tall_planes(W, H, 4, rows=rows)
    E = W - tall.planes.dense()
    assert float(((E @ H) * E).sum() / ((W @ H) * W).sum()) == pytest.approx(tall.error, rel=1e-3)
    assert tall.error < {100: 1.0001, 16: 3.5, 7: 12}[rows] * whole.error


@pytest.mark.parametrize("tied", [False, True])
def test_whole_model_round_trip(whole, inputs, tmp_path, tied):
    model = whole(tied)
    dense = [name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Embedding)]
    assert len(dense) == 1
    assert dense[0].endswith("embeddings.position_embedding")
    assert isinstance(model.get_input_embeddings(), SABEmbedding)
    assert isinstance(model.get_output_embeddings(), SABTiedHead if tied else SABLinear)
    model.save_pretrained(tmp_path)
    reloaded = load(tmp_path)
    assert torch.equal(logits(reloaded, inputs), logits(model, inputs))
    assert generate(reloaded, inputs) == generate(model, inputs)
    assert not (tied and any("lm_head" in name for name in file_entries(tmp_path)))
    report = sab_hf.report(reloaded)
    assert report.total_bytes == file_bytes(tmp_path)
    packed = {role for role, part in report.roles.items() if part.num_quantized}
    assert packed == {"language", *ROLES[: 3 if tied else 4]}
    reloaded.save_pretrained(tmp_path / "again")
    assert file_entries(tmp_path / "again") == file_entries(tmp_path)


@pytest.mark.parametrize("head", ["cpu", "disk"])
def test_tied_head_finds_planes_that_are_elsewhere(whole, inputs, tmp_path, head):
    model = whole(tied=True)
    model.save_pretrained(tmp_path)
    device_map = CPU | {"model.language_model.embed_tokens": "disk", "lm_head": head}
    apart = load(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    assert apart.get_input_embeddings().signs.is_meta
    assert torch.equal(logits(apart, inputs), logits(model, inputs))
    assert generate(apart, inputs) == generate(model, inputs)


@pytest.mark.parametrize("tied", [False, True])
def test_whole_model_dequantizes_to_the_same_function(whole, inputs, tmp_path, tied):
    model = whole(tied)
    for module in model.modules():
        if isinstance(module, (SABLinear, SABTiedHead)):
            module.exact = True
    expected = logits(model, inputs)
    model.dequantize()
    assert not any(isinstance(module, (SABModule, SABTiedHead)) for module in model.modules())
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-3, atol=1e-3)
    if tied:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    save_dense(model, tmp_path)
    assert torch.equal(logits(load(tmp_path), inputs), logits(model, inputs))


@pytest.mark.parametrize("role", ROLES)
def test_one_role_alone(make_config, inputs, role):
    model = quantized(make_config, **{f"{role}_bits": 6})
    parts = sab_hf.report(model).roles
    assert {name for name, part in parts.items() if part.num_quantized} == {"language", role}
    assert 6 < parts[role].bits < 16
    assert logits(model, inputs).isfinite().all()


def test_more_planes_come_nearer_to_the_dense_weights(make_config, whole):
    dense = build_llava()
    errors = []
    for model in (*(quantized(make_config, rest_bits=bits) for bits in (1, 2)), whole()):
        error = 0.0
        for name, module in model.named_modules():
            if isinstance(module, SABModule) and "language_model.layers" not in name:
                W = dense.get_submodule(name).weight.detach()
                error += float((module.planes().dense() - W).square().sum() / W.square().sum())
        errors.append(error)
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_modules_to_not_convert_reaches_the_rest(make_config):
    model = quantized(make_config, rest_bits=4, modules_to_not_convert=["lm_head", "vision_tower"])
    assert type(model.lm_head) is nn.Linear
    parts = sab_hf.report(model).roles
    assert parts["vision"].num_quantized == parts["head"].num_quantized == 0 < parts["projector"].num_quantized


def test_a_role_that_the_model_lacks_is_an_error_only_where_it_was_named(make_config):
    tokenizer, texts = build_processor().tokenizer, ["a text", "another text"]
    with pytest.raises(
        ValueError, match=r"`vision_bits` is 4, but LlamaForCausalLM has no matrix of the role `vision`"
    ):
        sab_hf.quantize(build_llama(), tokenizer, config=make_config(calibration=texts, vision_bits=4))
    model = build_llama()
    sab_hf.quantize(model, tokenizer, config=make_config(calibration=texts, rest_bits=4))
    assert isinstance(model.lm_head, SABLinear)


def test_tied_embeddings_take_one_number(make_config):
    with pytest.raises(ValueError, match=r"`embedding_bits` is 4 and `head_bits` is 2.*one tied matrix"):
        quantized(make_config, tied=True, embedding_bits=4, head_bits=2)
    model = quantized(make_config, tied=True, head_bits=5, rest_bits=4)
    assert model.get_input_embeddings().num_planes == 5


def test_tied_matrix_stays_dense_by_either_of_its_names(make_config):
    for kept in ({"head_bits": 16}, {"embedding_bits": 16}, {"modules_to_not_convert": ["lm_head"]}):
        model = quantized(make_config, tied=True, rest_bits=4, **kept)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert sab_hf.report(model).roles["projector"].num_quantized > 0


@pytest.mark.skipif(not V5, reason="transformers 4.57 ties what the config says, whatever the file holds")
@pytest.mark.parametrize("bits", [{"rest_bits": 8}, {"embedding_bits": 8}])
def test_head_of_its_own_is_kept_though_the_config_says_tied(vlm_dir, make_config, inputs, tmp_path, bits):
    dense = tmp_path / "dense"
    shutil.copytree(vlm_dir, dense)
    config = json.loads((dense / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (dense / "config.json").write_text(json.dumps(config))
    assert load(dense).lm_head.weight is not load(dense).get_input_embeddings().weight
    expected = load(vlm_dir, quantization_config=make_config(**bits))
    for _ in range(2):  # the second run resumes the first
        model = load(dense, quantization_config=make_config(**bits, checkpoint_dir=str(tmp_path / "run")))
        assert not isinstance(model.lm_head, SABTiedHead)
        assert torch.equal(logits(model, inputs), logits(expected, inputs))
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed"), inputs), logits(model, inputs))


@pytest.mark.parametrize(
    "name", ["lm_head", "model.language_model.embed_tokens", "model.multi_modal_projector.linear_1"]
)
def test_nan_outside_the_blocks_is_named_before_any_work(make_config, name):
    model = build_llava()
    with torch.no_grad():
        model.get_submodule(name).weight[3, 1] = torch.nan
    with pytest.raises(ValueError, match=f"the weight of `{name}` holds NaN"):
        sab_hf.quantize(model, build_processor(), config=make_config(rest_bits=4))
    assert not any(isinstance(module, SABModule) for module in model.modules())


@pytest.mark.parametrize("value", [0, 9, 15, 4.0, "4", True])
def test_bits_of_a_role_are_checked(make_config, value):
    with pytest.raises(ValueError, match=r"`head_bits` must be an integer from 1 to 8 \(sign planes\) or 16 \(dense\)"):
        make_config(head_bits=value)


# ---- at scale


def packed_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tied", [False, True])
def test_resumed_run_does_not_fit_the_rest_again(make_config, tmp_path, monkeypatch, tied):
    expected = packed_state(quantized(make_config, tied, rest_bits=3, checkpoint_dir=str(tmp_path)))
    assert (tmp_path / "rest.safetensors").exists()
    for file in tmp_path.glob("*layers.1.safetensors"):
        file.unlink()
    monkeypatch.setattr(rest, "fit_tall_planes", None)
    model = quantized(make_config, tied, rest_bits=3, checkpoint_dir=str(tmp_path))
    got = packed_state(model)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert isinstance(model.get_output_embeddings(), SABTiedHead if tied else SABLinear)


def test_blocks_come_to_the_compute_device_one_at_a_time(make_config, monkeypatch):
    """Everything that runs for the rest runs where the placement brought it, and no block stays there with another."""
    here, most = [], []
    visit = Placement.visit

    @contextmanager
    def spy(self, name, lasting=False):
        with visit(self, name, lasting) as module:
            here.append(name)
            most.append([n for n in here if ".layers." in n and "language_model" in n])
            try:
                yield module
            finally:
                here.remove(name)

    monkeypatch.setattr(Placement, "visit", spy)
    seen = []
    original = rest.moments_after_blocks
    monkeypatch.setattr(rest, "moments_after_blocks", lambda *args: (original(*args), seen.append(list(most)))[0])
    quantized(make_config, head_bits=4)
    (during,) = seen
    assert max(map(len, during)) == 1
    blocks = [names[0].rpartition(".")[2] for names in during if names]
    assert blocks == ["0", "0", "1"]  # to learn what blocks return, then each for the head's inputs
    assert any(not names for names in during)  # the modules beside them


@pytest.mark.skipif(not V5, reason="4.57.6 cannot save a model of renamed modules while some are offloaded")
def test_offloaded_blocks_give_the_rest_of_the_model_from_memory(vlm_dir, make_config, tmp_path):
    blocks = "model.language_model.layers"
    parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model.embed_tokens")
    others = (*parts, "model.language_model.norm", "model.language_model.rotary_emb", "lm_head")
    config = make_config(rest_bits=3, refine_steps=0)
    places = dict.fromkeys(others, "cpu") | {blocks: "disk"}
    model = load(vlm_dir, quantization_config=config, device_map=places, offload_folder=tmp_path)
    expected = load(vlm_dir, quantization_config=config).state_dict()
    got = model.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_offloaded_head_is_refused_before_any_work(vlm_dir, make_config, tmp_path):
    places = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match=r"`lm_head` is offloaded.*blocks may be offloaded.*`rest_bits`"):
        load(vlm_dir, quantization_config=make_config(rest_bits=3), device_map=places, offload_folder=tmp_path)


@pytest.mark.gpu
def test_rest_is_fitted_on_the_compute_device_and_goes_back(make_config):
    model = quantized(make_config, rest_bits=4, refine_steps=0, compute_device="cuda")
    expected = quantized(make_config, rest_bits=4, refine_steps=0, compute_device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    for name, module in expected.named_modules():
        if isinstance(module, SABModule) and "language_model.layers" not in name:
            W, other = module.planes().dense(), model.get_submodule(name).planes().dense()
            assert (W - other).norm() < 0.05 * W.norm(), name


def test_moments_of_the_head_are_those_of_the_full_precision_model(make_config, processor):
    model = build_llava()
    plan = make_plan(model, make_config(head_bits=4, batch_size=2), processor)
    batches, inputs = plan.calibration.batches, []
    got = moments_after_blocks(model, plan.roles, {"lm_head": model.lm_head}, batches, Workspace.of(model))["lm_head"]
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(**batch.inputs)
    hook.remove()
    rows, modality = torch.cat(inputs), torch.cat([batch.modality.flatten() for batch in batches])
    assert got.counts.keys() == {0, 1}
    for m, H in got.matrices().items():
        X = rows[modality == m]
        assert got.counts[m] == len(X)
        torch.testing.assert_close(H, X.T @ X / len(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_packed_vocabulary_keeps_its_size(make_config, tied):
    model = build_llama(tie_word_embeddings=tied)
    config = make_config(calibration=["some text", "more"] * 4, allow_text_only=True, rest_bits=4)
    sab_hf.quantize(model, build_tokenizer(), None, config)
    embedding, size = model.get_input_embeddings(), model.config.vocab_size
    for same in ({}, {"new_num_tokens": size}, {"new_num_tokens": size - 1, "pad_to_multiple_of": size}):
        assert model.resize_token_embeddings(**same) is embedding
    for other in (size + 8, size - 8):
        with pytest.raises(ValueError, match=rf"{size} tokens cannot be resized to {other}.*dequantize\(\)"):
            model.resize_token_embeddings(other)
    assert copy.deepcopy(model).resize_token_embeddings() is not embedding
    model.dequantize().resize_token_embeddings(size + 8)
    assert model(torch.tensor([[size + 7]])).logits.shape == (1, 1, size + 8)
