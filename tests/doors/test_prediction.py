"""`sab_hf.estimate` and `sab-hf quantize --dry-run`: from a model, a config, a folder or a Hub id, without weights."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from family_zoo import FAMILIES
from helpers import build_llama, build_llava
from transformers import AutoConfig

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.cli import main
from sab_hf.commands import quantize
from sab_hf.config import PRESETS
from sab_hf.machine.rates import Rates
from sab_hf.make.settings import DISTIL_STEPS, DISTIL_STEPS_CPU, REFINE_STEPS, REFINE_STEPS_CPU

QUICK = {"num_samples": 8, "refine_steps": 0, "distil_steps": 0, "alternations": 1, "budget": "uniform"}


@pytest.fixture
def without_weights(vlm_dir, tmp_path):
    """The folder of a dense checkpoint of which the weights were removed: whoever reads them fails."""
    folder = tmp_path / "without weights"
    shutil.copytree(vlm_dir, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    return folder


@pytest.fixture
def nameless(without_weights):
    """The config of that checkpoint, which does not say where it came from."""
    config = AutoConfig.from_pretrained(without_weights)
    config.name_or_path = ""
    return config


def dry_run(capsys, *argv) -> tuple[int, str, str]:
    code = main(["quantize", *map(str, argv), "--dry-run"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ---- what is stored


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rest_bits": 4},
        {"bits": 2.5, "vision_bits": 3},
        {"modules_to_not_convert": ["layers.1"], "allow_low_coverage": True},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_file_by_role_is_what_is_stored(changes, tied, samples, processor):
    model = build_llava(tied=tied)
    config = SABQuantizationConfig(**QUICK | changes)
    predicted = sab_hf.estimate(model, processor, samples, config)
    sab_hf.quantize(model, processor, samples, config)
    found = sab_hf.report(model)
    assert predicted.sizes == {role: r.quantized_bytes + r.dense_bytes for role, r in found.roles.items()}
    assert predicted.file_bytes == found.total_bytes


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen2_5_vl"])
def test_file_of_a_family_is_what_is_stored(family):
    made = FAMILIES[family]()
    config = SABQuantizationConfig(**QUICK, calibration=made.batches, allow_text_only=True)
    predicted = sab_hf.estimate(made.model, None, None, config)
    sab_hf.quantize(made.model, None, None, config)
    assert predicted.file_bytes == sab_hf.report(made.model).total_bytes


def test_budget_by_sensitivity_is_spent_to_a_few_columns(samples, processor):
    model = build_llava()
    config = SABQuantizationConfig(**QUICK | {"budget": "sensitivity", "bits": 2.5})
    predicted = sab_hf.estimate(model, processor, samples, config)
    sab_hf.quantize(model, processor, samples, config)
    assert predicted.file_bytes == pytest.approx(sab_hf.report(model).total_bytes, rel=0.02)


# ---- from a config alone


def test_folder_needs_no_weights_and_no_samples(without_weights, vlm_dir):
    config = SABQuantizationConfig(**QUICK)
    found = sab_hf.estimate(without_weights, config=config, dtype=torch.float32)
    whole = sab_hf.estimate(build_llava(attention_bias=True), config=config)
    assert found.sizes == whole.sizes
    assert found.weights == whole.weights > 0
    assert not found.loaded
    assert "samples of the built-in set" in found.tokens_from
    assert found.tokens > 8 * 50
    half = sab_hf.estimate(without_weights, config=config, dtype="bfloat16")
    assert (half.weights - half.widened) * 2 == found.weights


def test_weights_are_counted_where_they_will_be_loaded(without_weights):
    def found(device_map):
        config = SABQuantizationConfig(**QUICK)
        return sab_hf.estimate(without_weights, config=config, dtype=torch.float32, device_map=device_map)

    in_ram = found(None)
    assert in_ram.on_device == 0
    for where in ("cpu", "auto", "sequential"):  # this machine is all that there is
        assert (found(where).weights, found(where).on_device) == (in_ram.weights, 0)
    assert found("cuda").on_device == in_ram.weights
    norm = {"": "cuda", "lm_head": "disk", "model": "cpu", "model.language_model.norm": "cuda:1"}
    assert found(norm).on_device == 4 * AutoConfig.from_pretrained(without_weights).text_config.hidden_size


def test_config_alone_has_assumed_tokens(nameless):
    found = sab_hf.estimate(nameless, config=SABQuantizationConfig(**QUICK))
    assert "assumed" in found.tokens_from
    text = sab_hf.estimate(build_llama().config, config=SABQuantizationConfig(**QUICK))
    assert text.tokens < found.tokens


def test_stages_follow_the_settings(without_weights, monkeypatch):
    # the rates of one machine for every call: what is measured now differs from moment to moment
    products = dict.fromkeys((torch.float32, torch.bfloat16), 1e11)
    monkeypatch.setattr("sab_hf.machine.rates._measured", lambda *_: Rates(products, bandwidth=1e10, calls=1e5))
    monkeypatch.setattr("sab_hf.machine.rates.crowding", lambda: 1.0)

    def stages(**changes) -> dict[str, float]:
        return sab_hf.estimate(
            AutoConfig.from_pretrained(without_weights), config=SABQuantizationConfig(**changes)
        ).seconds

    balanced, fast, best = (stages(preset=name) for name in ("balanced", "fast", "best"))
    assert {"sensitivity", "capture", "second moments", "fit", "distillation"} <= balanced.keys()
    assert "distillation" not in fast
    assert {"targets", "refinement"} <= stages(distil_steps=0).keys()
    assert not {"targets", "refinement"} & balanced.keys()  # what sums second moments gives the targets too
    assert "towers, embedding, head" in stages(rest_bits=4)
    written = stages(written_samples=64)
    assert {"written samples", "targets"} <= written.keys()  # those samples have no second moments
    assert written["capture"] > balanced["capture"]
    assert sum(fast.values()) < sum(balanced.values()) < sum(best.values())
    assert stages(distil_steps=200)["distillation"] == pytest.approx(
        2 * stages(distil_steps=100)["distillation"], rel=0.05
    )


def test_tokens_are_counted_in_a_few_samples_of_local_data(without_weights, tmp_path):
    data = tmp_path / "short.jsonl"
    data.write_text('{"text": "Red."}\n' * 40)
    short, builtin = (
        sab_hf.estimate(without_weights, config=SABQuantizationConfig(calibration=name, num_samples=32))
        for name in (str(data), "builtin")
    )
    assert short.tokens_from == f"16 samples of `{data}`"
    assert 0 < short.tokens < 0.5 * builtin.tokens
    data.write_text('{"text": "Red."}\n' * 4)  # there are no more than these
    four = sab_hf.estimate(without_weights, config=SABQuantizationConfig(calibration=data, num_samples=32))
    assert four.tokens * 8 == short.tokens


# ---- the command


def test_dry_run_prints_a_table_or_json_and_writes_nothing(capsys, without_weights, tmp_path):
    options = ("--preset", "fast", "--num-samples", "8", "--dtype", "float32")
    code, out, _ = dry_run(capsys, without_weights, tmp_path / "out", *options)
    assert code == 0
    for words in ("second moments", "file, language", "RAM, GiB", "samples of the built-in set"):
        assert words in out
    code, out, _ = dry_run(capsys, without_weights, *options, "--rest-bits", "4", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["file_bytes"] == sum(found["file_bytes_by_role"].values())
    assert found["stages"]["fit"]["seconds"] > 0
    assert found["fits"] is True
    assert not (tmp_path / "out").exists()


def test_dry_run_loads_to_where_the_run_does(monkeypatch, capsys, without_weights, tmp_path):
    given = []
    monkeypatch.setattr("sab_hf.prediction._device_map_of", lambda model, where: given.append(where) or {})
    options = ("--preset", "fast", "--num-samples", "8")
    for where in ((), ("--device-map", "cpu")):
        assert dry_run(capsys, without_weights, *options, *where)[0] == 0
    assert given == ["auto" if torch.cuda.is_available() else None, "cpu"]


def test_dry_run_reads_a_repository_without_its_weights(capsys, without_weights, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.repos["me/dense"] = [{file.name: file.read_bytes() for file in without_weights.iterdir()}]
    code, out, err = dry_run(capsys, "me/dense", "--preset", "fast", "--num-samples", "8")
    assert code == 0, err
    assert "file, all" in out
    assert not [request for request in hub.requests if "safetensors" in request and "index" not in request]


def test_quantizing_needs_a_folder_to_write(capsys, without_weights):
    code = main(["quantize", str(without_weights)])
    assert code == 2
    assert "name the folder to write, or add --dry-run" in capsys.readouterr().err


def test_help_shows_all_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    text = capsys.readouterr().out
    shown = dict(entry.split("=", 1) for entry in quantize.DEFAULTS.split() if "=" in entry and entry[0].islower())
    fields = {f.name: f.default for f in dataclasses.fields(SABQuantizationConfig) if f.init}
    not_set = {"modules", "tied_head", "tied_embeddings", "checksums", "format_version", "processor", "progress"}
    settable = fields.keys() - not_set - set(quantize._WITH_OPTIONS)
    assert shown.keys() == settable
    for name in settable:
        assert json.loads(shown[name]) == fields[name]
        assert f"{name}=" in text
    steps = (
        f"(default {DISTIL_STEPS}, on a CPU {DISTIL_STEPS_CPU})",
        f"else {REFINE_STEPS}, on a CPU {REFINE_STEPS_CPU})",
    )
    assert f"--preset {{{','.join(PRESETS)}}}" in text
    best = PRESETS["best"]
    preset = (
        f"best: {best['num_samples']} samples and {best['written_samples']} that the model writes, {best['refine_steps']} steps "
        f"of refinement, {best['distil_steps']} of distillation"
    )
    for words in ("(default 512)", "(default 16)", "(default 0)", "builtin (default)", *steps, preset):
        assert words in " ".join(text.split())


# ---- what goes wrong


def test_wrong_preset_is_said_with_a_suggestion(capsys, without_weights):
    with pytest.raises(SystemExit, match="2"):
        dry_run(capsys, without_weights, "--preset", "bset")
    err = capsys.readouterr().err
    assert "argument --preset: invalid choice: 'bset'" in err
    assert "did you mean `best`?" in err


def test_model_that_does_not_exist(capsys, hub):
    code, out, err = dry_run(capsys, "me/nowhere")
    assert (code, out) == (1, "")
    assert "there is no folder `me/nowhere` here, and it could not be read from the Hub" in err


def test_gated_model_says_how_to_get_access(capsys, hub):
    hub.repos["me/gated"] = [{"config.json": b"{}"}]
    hub.gated.add("me/gated")
    code, out, err = dry_run(capsys, "me/gated")
    assert (code, out) == (1, "")
    assert "`me/gated` is gated: accept its conditions" in err
    assert "hf auth login" in err


def test_unknown_family_is_named(capsys, hub, tmp_path):
    config = json.dumps({"model_type": "from_the_future", "architectures": ["FutureForConditionalGeneration"]})
    (tmp_path / "config.json").write_text(config)
    code, out, err = dry_run(capsys, tmp_path)
    assert (code, out) == (1, "")
    assert "from_the_future" in err
    hub.repos["me/future"] = [{"config.json": config.encode()}]
    code, out, err = dry_run(capsys, "me/future")
    assert (code, out) == (1, "")
    assert "from_the_future" in err
    assert "could not be read from the Hub" not in err


def test_quantized_model_is_refused(capsys, packed_dir):
    code, _, err = dry_run(capsys, packed_dir)
    assert code == 1
    assert "is quantized already, with 'sab'" in err


def test_full_disk_is_found_before_the_work(capsys, without_weights, vlm_dir, tmp_path, monkeypatch, questions):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("sab_hf.machine.disk.shutil.disk_usage", lambda path: usage._replace(free=1000))
    code = main(["quantize", str(without_weights), str(tmp_path / "out")])
    assert code == 1
    assert "`the output folder`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("sab_hf.make.binarize.run_plan", None)
    given = SABQuantizationConfig(**QUICK, calibration=questions, allow_text_only=True, checkpoint_dir=tmp_path / "run")
    with pytest.raises(OSError, match="`checkpoint_dir`"):
        type(build_llava()).from_pretrained(vlm_dir, quantization_config=given)
    assert not (tmp_path / "run").exists()
