"""Round trips of tiny random models of many families: quantized while loading, generating, saved, reloaded bit by bit."""

from __future__ import annotations

import itertools

import pytest
import transformers
from families import Outcome, check, run
from family_zoo import FAMILIES
from family_zoo import table as family_table
from helpers import V5

from sab_hf.anatomy.roles import find_roles
from sab_hf.config import DENSE

QUICK = {
    **dict.fromkeys(("qwen2_5_vl", "mllama", "qwen3_moe", "llama4_text", "gemma3n", "voxtral", "aria"), DENSE),
    **dict.fromkeys(("gemma3", "kosmos2", "florence2", "blip_2_t5"), 4),
}
"""Structurally different ones, with the planes of what is outside their blocks: the last four have embeddings unlike others,
which are scaled, read by name, one matrix for three, or tied in T5's way. docs/families.md holds the outcome of all."""

BROKEN = {
    ("llama4", "5.24.0"): "its own forward reads an output that its text model does not give",
    ("granite4_vision", "5.17.0"): "its default text config is not that of its text model",
    ("diffusion_gemma", "5.17.0"): "its default config has no vision part",
    ("diffusion_gemma", "5.24.0"): "its decoder reads the encoder's cache, and blocks run without one",
}


REFUSED = {
    "glm5_next": "Several streams",
    "hy_v4_vl": "Several streams",
    "git": "Positions that no token stands for",
    "udop": "Positions that no token stands for",
    "pix2struct": "read no tokens before their decoder",
    "vision_encoder_decoder": "read no tokens before their decoder",
    "pp_formulanet": "get_input_embeddings",
    "kyutai_speech_to_text": "no input embedding",
    "inkling2_loop": "runs twice",
    "mistral_large4": "depend on what earlier blocks compute",
}
"""Families that are refused, and a part of the reason."""


def cases():
    for name, rest_bits in itertools.product(FAMILIES, (DENSE, 4)):
        yield pytest.param(name, rest_bits, marks=() if QUICK.get(name) == rest_bits else pytest.mark.slow)


@pytest.mark.parametrize(("name", "rest_bits"), list(cases()))
def test_round_trip(name, rest_bits, tmp_path):
    if (name, transformers.__version__) in BROKEN:
        pytest.xfail(BROKEN[name, transformers.__version__])
    if name in REFUSED:
        check_refused(name, tmp_path)
        return
    try:
        outcome = check(name, tmp_path, rest_bits)
    except ImportError as error:
        pytest.skip(str(error))
    assert outcome.coverage > 0.9
    assert outcome.quantized
    assert outcome.measured == (outcome.stages == 1)
    assert "text" in outcome.modalities


def check_refused(name, folder):
    with pytest.raises((ImportError, RuntimeError, ValueError), match=f"{REFUSED[name]}|^not in transformers"):
        check(name, folder)


PARTS = {
    # family: (tower, a parameter or module of the projector)
    "blip_2": ("vision_model", "qformer.encoder.layer.0.attention.attention.query"),
    "instructblip": ("vision_model", "qformer.encoder.layer.0.attention.attention.query"),
    "idefics2": ("model.vision_model", "model.connector.perceiver_resampler.layers.0.self_attn.q_proj"),
    "mllama": ("model.vision_model", "model.multi_modal_projector"),
    "phi4_multimodal": ("model.embed_tokens_extend", None),
    "llama4": ("vision_model", "multi_modal_projector.linear_1"),
    "florence2": ("model.vision_tower", "model.multi_modal_projector"),
    "voxtral": ("audio_tower", "multi_modal_projector.linear_1"),
    "chameleon": ("vqmodel", None),  # convolutions only, inside of the text model
    "emu3": ("vqmodel", None),
    "git": ("git.image_encoder", "git.visual_projection.visual_projection.0"),
    "blip": ("vision_model", None),
    "vision_encoder_decoder": ("encoder", None),
    "t5gemma2": ("encoder.vision_tower", "model.encoder.multi_modal_projector.mm_input_projection_weight"),
}


@pytest.mark.parametrize("name", PARTS)
def test_towers_and_projectors(name):
    try:
        model = FAMILIES[name]().model
    except ImportError as error:
        pytest.skip(str(error))
    roles = find_roles(model)
    tower, projector = PARTS[name]
    assert [part.removeprefix("model.") for part in roles.vision] == [tower.removeprefix("model.")]
    if projector:
        assert roles.of(projector) == "projector"
    assert all(roles.of(block) == "language" for block in roles.blocks)


def test_text_model_is_around_an_embedding_that_is_apart():
    roles = find_roles(FAMILIES["git"]().model)
    assert roles.blocks == ("git.encoder.layer.0", "git.encoder.layer.1")
    assert roles.of("git.encoder.layer.0.output.dense.weight") == "language"
    assert roles.of("git.embeddings.position_embeddings.weight") == "embedding"


@pytest.mark.skipif(not V5, reason="not in transformers 4")
def test_decoder_beside_the_encoder_s_text_model_is_language():
    roles = find_roles(FAMILIES["t5gemma2"]().model)
    assert [stage[0] for stage in roles.stacks] == ["model.encoder.text_model.layers.0", "model.decoder.layers.0"]
    assert roles.of("model.decoder.embed_tokens.weight") == "embedding"


def test_towers_of_several_media_are_all_found():
    roles = find_roles(FAMILIES["qwen2_5_omni_thinker"]().model)
    assert [part.removeprefix("model.") for part in roles.vision] == ["audio_tower", "visual"]


def test_embeddings_of_each_layer_have_the_embedding_s_role():
    roles = find_roles(FAMILIES["gemma3n"]().model)
    assert roles.of("model.embed_tokens_per_layer.weight") == "embedding"
    assert roles.of("model.per_layer_model_projection.weight") == "language"


def test_problem_becomes_a_row_with_its_reason(monkeypatch, capsys):
    def build():
        raise ImportError("not in transformers 1.0")

    monkeypatch.setitem(FAMILIES, "future", build)
    (outcome,) = run(["future"])
    assert outcome.problem == "not in transformers 1.0"
    assert "future" in capsys.readouterr().out


def test_table_has_a_row_for_each_family_and_says_why_not(tmp_path, monkeypatch):
    monkeypatch.setattr(family_table, "DOC", tmp_path / "docs" / "families.md")
    outcomes = [
        vars(
            Outcome(
                "one", "4.57.6", quantized={"mlp.up": 2, "mlp.experts.*.down": 8}, coverage=0.955, modalities=["text"]
            )
        ),
        vars(Outcome("one", "4.57.6", "it broke", 4)),
        vars(Outcome("one", "5.24.0", "it broke", measured=False)),
        vars(Outcome("one", "5.24.0", "it broke", 4)),
        vars(Outcome("two", "5.24.0", "not in transformers 5.24.0")),
        vars(Outcome("two", "5.24.0", "not in transformers 5.24.0", 4)),
    ]
    family_table.write_table(outcomes)
    text = family_table.DOC.read_text()
    assert "| one | 95.5 % | text | `mlp`: up; `mlp.experts.*`: down | yes, no (1) | no (1) |" in text
    assert "| two |  |  |  | not run | – |" in text
    assert "1. `one`, 4.57.6, `one`, 5.24.0: it broke" in text
