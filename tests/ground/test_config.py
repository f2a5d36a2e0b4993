"""`SABQuantizationConfig`: what it refuses, and what survives JSON, copies and transformers."""

import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.quantizers.auto import AutoQuantizationConfig

from sab_hf import SABQuantizationConfig
from sab_hf.config import MAX_PLANES, PRESETS
from sab_hf.packing import FORMAT_VERSION

NO_INTEGER = [0, -1, 1.0, "1", None, True, 2**70]
INVALID = {
    "bits": [0, -1, "1", True, math.nan, math.inf, MAX_PLANES + 1.5, [1.1]],
    "portable": ["onnx", True, ""],
    "num_samples": NO_INTEGER,
    "image_tokens": [0, -1, 1.0, "1", True, 2**70],
    "preset": ["", "bset", 1, True, ["fast"]],
    "progress": ["bar", 1, True, []],
    "written_samples": [-1, 2.0, True, "many"],
    "seed": [-1, 0.5, "0", None, False, 2**63, 2**70],
    "max_length": NO_INTEGER,
    "batch_size": NO_INTEGER,
    "allow_text_only": [0, 1, "yes", None],
    "allow_urls": [0, 1, "yes", None],
    "modules_to_not_convert": ["lm_head", [1], [None], {"a": 1}, 3],
    "allow_low_coverage": [0, 1, "yes", None],
    "language_blocks": ["model.layers", [1], [None], {"a": 1}, 3],
    "fit": ["", "Hessian", None, 1],
    "alternations": NO_INTEGER,
    "damping": [0, -0.01, math.nan, math.inf, "0.01", None, True],
    "block_size": NO_INTEGER,
    "salient_top_p": [0, -0.1, 1.1, math.nan, None, True],
    "diff_quantile": [-0.1, 1.1, math.nan, None, True],
    "sparsity_threshold": [-0.1, 1.1, math.nan, None, True],
    "refine_steps": [-1, 1.0, "1", True],
    "refine_batch": NO_INTEGER,
    "refine_loss": ["", "mse", None, 1],
    "modality_balance": ["", "Equal", None, 0.5],
    "significance": ["", "hessian", None, True],
    "budget": ["", "even", None, 1.1],
    "sensitivity_samples": NO_INTEGER,
    "rest_bits": [0, -1, 9, 15, 4.0, "4", None, True],
    "vision_bits": [0, 9, 15, 4.0, "4", True],
    "projector_bits": [0, 9, 15, 4.0, "4", True],
    "embedding_bits": [0, 9, 15, 4.0, "4", True],
    "head_bits": [0, 9, 15, 4.0, "4", True],
    "tied_head": [0, 1, "yes", None],
    "tied_embeddings": [None, "model.encoder.embed_tokens", [1], ("a",)],
    "refine_scale_rate": [0, -0.1, 1.1, math.nan, None, True],
    "refine_latent_rate": [0, -0.1, 1.1, math.nan, None, True],
    "distil_steps": [-1, 1.0, "1", True],
    "distil_batch": NO_INTEGER,
    "distil_scale_rate": [0, -0.1, 1.1, math.nan, True],
    "distil_latent_rate": [0, -0.1, 1.1, math.nan, True],
    "compute_device": ["", 0, True],
    "checkpoint_dir": ["", 1],
    "offload_dir": ["", 1],
    "cache_device_gib": [-1, math.nan, "1", True],
    "cache_ram_gib": [-1, math.nan, "1", True],
    "process_timeout": [0, -1, math.nan, None, True],
    "checksums": [
        1,
        {},
        {"tensors": {}, "aliases": {}, "config": None},
        {"tensors": {"a": 1}, "aliases": {}, "config": ""},
    ],
    "modules": [
        None,
        [],
        {"a": 1},
        {"a": [1]},
        {"a": [1, 2, 3]},
        {"a": [0, 0]},
        {"a": [MAX_PLANES + 1, 0]},
        {"a": [1, -1]},
        {"a": [1.0, 0]},
        {"a": [True, 0]},
    ],
    "format_version": [FORMAT_VERSION + 1, None, "1"],
}
VALID = {
    "bits": [None, 1, 1.05, MAX_PLANES + 1],
    "seed": [0, 2**63 - 1],
    "salient_top_p": [1, 1e-6],
    "diff_quantile": [0, 1],
    "sparsity_threshold": [0, 1],
    "modules_to_not_convert": [None, [], ["layers.0", "down_proj"]],
    "fit": ["hessian", "elementwise"],
    "refine_loss": ["balanced", "gradient"],
    "modality_balance": ["equal", "tokens", "text"],
    "significance": ["gradient", "paper", "none"],
    "budget": ["sensitivity", "uniform"],
    "rest_bits": [1, 8, 16],
    "head_bits": [None, 1, 8, 16],
    "refine_steps": [None, 0],
    "distil_steps": [None, 0],
    "distil_latent_rate": [None, 1],
    "cache_device_gib": [None, 0],
    "cache_ram_gib": [None, 0],
    "compute_device": [None, "cuda:1"],
    "refine_scale_rate": [1],
    "modules": [{}, {"a": [1, 0], "b.c": [MAX_PLANES, 5]}],
    "checksums": [None, {"tensors": {"a": "12"}, "aliases": {"b": "a"}, "config": "34"}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in INVALID.items() for value in values])
def test_config_names_the_field_it_rejects(name, value):
    stated = "format version" if name == "format_version" else f"`{name}` must"
    with pytest.raises(ValueError, match=stated):
        SABQuantizationConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in VALID.items() for value in values])
def test_config_accepts_the_ends_of_each_range(name, value):
    assert getattr(SABQuantizationConfig(**{name: value}), name) == value


def test_every_field_has_its_invalid_values():
    free = {"calibration", "processor", "quant_method"}
    assert {field.name for field in dataclasses.fields(SABQuantizationConfig)} - free == INVALID.keys()


MACHINE = {
    "compute_device": "cuda:1",
    "checkpoint_dir": "/a",
    "offload_dir": "/b",
    "cache_device_gib": 1.5,
    "cache_ram_gib": 2,
    "process_timeout": 9.0,
    "allow_urls": True,
}

names = st.text("ab.é_0", max_size=5)

configs = st.builds(
    SABQuantizationConfig,
    bits=st.none() | st.floats(0, 9, exclude_min=True),
    calibration=st.sampled_from(["builtin", "user/set", "./samples.jsonl"]),
    num_samples=st.integers(1, 1000),
    seed=st.integers(0, 2**40),
    allow_text_only=st.booleans(),
    modules_to_not_convert=st.none() | st.lists(names, max_size=3),
    fit=st.sampled_from(["hessian", "elementwise"]),
    damping=st.floats(1e-6, 1e3),
    diff_quantile=st.floats(0, 1),
    modules=st.dictionaries(names, st.tuples(st.integers(1, MAX_PLANES), st.integers(0, 999)).map(list), max_size=3),
)


@given(config=configs)
@settings(deadline=None)
def test_config_survives_json(config):
    plain = json.loads(json.dumps(config.to_dict()))
    assert SABQuantizationConfig.from_dict(plain) == config
    assert SABQuantizationConfig.from_dict(json.loads(config.to_json_string())) == config
    assert AutoQuantizationConfig.from_dict(plain) == config
    assert dict(config) == config.to_dict() == config.to_diff_dict()


def test_config_records_every_number():
    plain = SABQuantizationConfig().to_dict()
    unrecorded = {"processor", "progress", "preset", *MACHINE}
    assert plain.keys() == {field.name for field in dataclasses.fields(SABQuantizationConfig)} - unrecorded
    assert (plain["quant_method"], plain["format_version"]) == ("sab", FORMAT_VERSION)


def test_config_does_not_record_the_machine():
    """Where a run happened has no place in a checkpoint that others download."""
    config = SABQuantizationConfig(**MACHINE)
    assert MACHINE.keys() & config.to_dict().keys() == set()
    assert {name: getattr(copy.deepcopy(config), name) for name in MACHINE} == MACHINE


def test_paths_and_devices_become_names():
    config = SABQuantizationConfig(checkpoint_dir=Path("a/b"), compute_device=torch.device("cuda:1"))
    assert (config.checkpoint_dir, config.compute_device) == ("a/b", "cuda:1")


def test_from_dict_rejects_unknown_fields():
    with pytest.raises(ValueError, match=r"unknown fields \['bit', 'group_size'\].*did you mean `bits`"):
        SABQuantizationConfig.from_dict({"quant_method": "sab", "group_size": 128, "bit": 1})
    with pytest.raises(ValueError, match=r"unknown fields \['xyz'\].*accepted are .*'bits'"):
        SABQuantizationConfig.from_dict({"xyz": 1})


def test_from_dict_rejects_another_method():
    with pytest.raises(ValueError, match="`quant_method` must be 'sab', got 'gptq'"):
        SABQuantizationConfig.from_dict({"quant_method": "gptq"})


@pytest.mark.parametrize(
    "news",
    [{}, {"codebook": 3}, {"modules": {"a": [1, 2, 3]}}, {"fit": "end-to-end"}, {"bits": "mixed"}],
    ids=["version alone", "new field", "new sizes", "new fit", "new bits"],
)
def test_from_dict_of_a_later_format_says_to_upgrade(news):
    """Whatever else a later format changes: its number is the reason that a user can act on."""
    plain = SABQuantizationConfig().to_dict() | {"format_version": FORMAT_VERSION + 1} | news
    with pytest.raises(ValueError, match=f"format version {FORMAT_VERSION + 1}.*upgrade"):
        SABQuantizationConfig.from_dict(plain)


def test_from_dict_takes_fields_as_keywords_and_hands_back_the_rest():
    plain = {"quant_method": "sab", "bits": 1.5}
    config, unused = SABQuantizationConfig.from_dict(plain, return_unused_kwargs=True, bits=1.2, device_map="cpu")
    assert (config.bits, unused) == (1.2, {"device_map": "cpu"})
    assert plain == {"quant_method": "sab", "bits": 1.5}


class Unique:
    """Stands for a processor or a sample: neither to be copied nor written as JSON."""

    def __deepcopy__(self, memo):
        raise AssertionError("copied")


def test_to_dict_leaves_objects_out():
    config = SABQuantizationConfig(processor=Unique(), calibration=[Unique()])
    plain = json.loads(json.dumps(config.to_dict()))
    assert "processor" not in plain
    assert plain["calibration"] == "custom"
    assert "bits" in repr(config)
    assert SABQuantizationConfig.from_dict(plain).processor is None
    assert "processor" not in SABQuantizationConfig(processor="/somebody/s/folder").to_dict()


def test_to_dict_records_no_path_of_the_machine(tmp_path):
    data = tmp_path / "set" / "data.jsonl"
    data.parent.mkdir()
    data.touch()
    for path in (data, str(data)):
        assert SABQuantizationConfig(calibration=path).to_dict()["calibration"] == "set/data.jsonl"
    assert SABQuantizationConfig(calibration=Path("nowhere.jsonl")).to_dict()["calibration"] == "nowhere.jsonl"


def test_to_dict_shares_nothing_with_the_config():
    config = SABQuantizationConfig(modules={"a": [1, 0]}, modules_to_not_convert=["b"])
    plain = config.to_dict()
    plain["modules"]["a"].append(5)
    plain["modules_to_not_convert"].append("c")
    assert (config.modules, config.modules_to_not_convert) == ({"a": [1, 0]}, ["b"])


def test_deepcopy_shares_samples_and_processor_only():
    config = SABQuantizationConfig(
        processor=Unique(), calibration=[Unique()], modules={"a": [1, 0]}, modules_to_not_convert=["b"], bits=1.3
    )
    copied = copy.deepcopy(config)
    assert copied == config
    assert copied.processor is config.processor
    assert copied.calibration is config.calibration
    copied.modules["a"][0] = 2
    copied.modules_to_not_convert.append("c")
    assert (config.modules, config.modules_to_not_convert) == ({"a": [1, 0]}, ["b"])


# ---- presets


def test_preset_sets_its_fields_and_given_ones_win():
    defaults = SABQuantizationConfig()
    fast = SABQuantizationConfig(preset="fast")
    assert (fast.refine_steps, fast.distil_steps, fast.num_samples, fast.sensitivity_samples) == (0, 0, 128, 16)
    mine = SABQuantizationConfig(preset="fast", num_samples=512, distil_steps=None, bits=1.2)
    assert (mine.refine_steps, mine.distil_steps, mine.num_samples, mine.bits) == (0, None, 512, 1.2)
    assert SABQuantizationConfig(preset="balanced").to_dict() == defaults.to_dict()
    best = SABQuantizationConfig(1.2, preset="best")
    assert best.distil_steps > 1000
    assert best.num_samples > defaults.num_samples
    assert best.bits == 1.2


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_survives_copies_and_only_its_values_are_saved(preset):
    config = SABQuantizationConfig(preset=preset, num_samples=77)
    plain = config.to_dict()
    assert "preset" not in plain
    assert plain["num_samples"] == 77
    assert {plain[name] for name in ("refine_steps",)} == {config.refine_steps}
    again = SABQuantizationConfig.from_dict(plain)
    assert again.preset is None
    assert again.to_dict() == plain
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert copied.to_dict() == plain
    assert SABQuantizationConfig.from_dict({"preset": preset, "num_samples": 77}).to_dict() == plain


@pytest.mark.parametrize(
    ("preset", "hint"),
    [("bset", "; did you mean `best`?"), ("Fast", "; did you mean `fast`?"), (3, "got 3"), ("x" * 99, "")],
)
def test_wrong_preset_is_refused_with_the_names_that_there_are(preset, hint):
    with pytest.raises(ValueError, match=r"`preset` must be one of \['fast', 'balanced', 'best'\], got") as error:
        SABQuantizationConfig(preset=preset)
    assert str(error.value).endswith(hint)


def test_progress_is_a_function_and_not_saved():
    config = SABQuantizationConfig(progress=print)
    assert "progress" not in config.to_dict()
    assert copy.deepcopy(config).progress is print
    with pytest.raises(ValueError, match="`progress` must be a function"):
        SABQuantizationConfig(progress="bar")
