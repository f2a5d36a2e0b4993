"""Saving and publishing: complete, atomic, and through the real huggingface_hub client to a hub on the loopback interface."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from helpers import build_llava, build_processor, load, logits, png_base64
from huggingface_hub import ModelCard
from transformers import AutoProcessor

import sab_hf
from sab_hf.publish import save as hub_module
from sab_hf.publish.inspect import inspect
from sab_hf.publish.summary import summarize

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quantized(vlm_dir, make_config):
    """A model that was quantized while it loaded, so that it carries its record."""
    return load(vlm_dir, quantization_config=make_config(refine_steps=2))


# ---- folders


def test_saved_folder_is_complete_and_loads(quantized, processor, inputs, tmp_path):
    where = sab_hf.save(quantized, processor, tmp_path / "saved", max_shard_size="60KB")
    assert where == str(tmp_path / "saved")
    names = {str(path.relative_to(where)) for path in Path(where).rglob("*") if path.is_file()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "README.md",
        "report.json",
        "report.html",
        "tokenizer.json",
    }
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert {"plots/bits_language.svg", "plots/error_language.svg", "plots/loss_by_stage.svg"} <= names
    assert list(tmp_path.iterdir()) == [tmp_path / "saved"]
    assert torch.equal(logits(load(where), inputs), logits(quantized, inputs))
    assert AutoProcessor.from_pretrained(where).tokenizer.pad_token == "<pad>"


def test_processor_is_saved_without_what_calls_left_in_it(quantized, tmp_path):
    used = build_processor()
    used.tokenizer("some text", truncation=True, max_length=4, padding="max_length")
    sab_hf.save(quantized, used, tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert (stored["truncation"], stored["padding"]) == (None, None)
    assert used.tokenizer.backend_tokenizer.truncation["max_length"] == 4  # the caller's own is left alone


@pytest.mark.parametrize("given", ["path", "none"])
def test_processor_is_loaded_where_none_is_given(quantized, vlm_dir, tmp_path, given):
    sab_hf.save(quantized, vlm_dir if given == "path" else None, tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


def test_missing_processor_is_an_error_before_anything_is_written(quantized, tmp_path):
    with pytest.raises(ValueError, match="needs the model's processor, and none could be loaded from '/nowhere'"):
        sab_hf.save(quantized, "/nowhere", tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_dense_model_is_refused(model, processor, tmp_path):
    with pytest.raises(ValueError, match="is not binarized by sab_hf; quantize it first"):
        sab_hf.save(model, processor, tmp_path / "saved")


def test_failure_while_saving_leaves_the_old_checkpoint(quantized, processor, tmp_path, monkeypatch, inputs):
    sab_hf.save(quantized, processor, tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir() if path.is_file()}

    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(hub_module, "html_report", fail)
    with pytest.raises(OSError, match="full"):
        sab_hf.save(quantized, processor, tmp_path / "saved")
    with pytest.raises(OSError, match="full"):
        sab_hf.save(quantized, processor, tmp_path / "other")
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir() if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [tmp_path / "saved"]


def test_saving_replaces_a_checkpoint_and_nothing_else(quantized, processor, tmp_path):
    sab_hf.save(quantized, processor, tmp_path / "saved", max_shard_size="60KB")
    sab_hf.save(quantized, processor, tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").glob("*.safetensors*")] == ["model.safetensors"]
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_my_aunt.txt").write_text("Dear aunt")
    with pytest.raises(ValueError, match="is no checkpoint, so it is not replaced"):
        sab_hf.save(quantized, processor, tmp_path / "letters")
    assert (tmp_path / "letters" / "to_my_aunt.txt").is_file()


# ---- summary and card


def test_summary_is_json_and_says_what_the_record_says(quantized):
    summary = json.loads(json.dumps(summarize(quantized), allow_nan=False))
    record = quantized.hf_quantizer.record
    assert [module["error"] for module in summary["modules"]] == [fit.error for fit in record.fits]
    assert summary["record"]["refinements"] == [list(result) for result in record.refinements]
    assert summary["bits"] == sab_hf.report(quantized).bits
    for module in summary["modules"]:
        assert sum(module["stored"].values()) == module["stored_bytes"]
        density = sum(module["significant_columns"]) / len(module["significant_columns"])
        assert density == pytest.approx(module["num_significant"] / module["in_features"], abs=0.02)
    dense = build_llava(attention_bias=True)
    assert summary["bytes_at_16_bits"] == 2 * sum(parameter.numel() for parameter in dense.parameters())


def test_quantizing_in_memory_leaves_the_record_too(processor, make_config):
    model = build_llava(attention_bias=True)
    record = sab_hf.quantize(model, processor, None, make_config())
    assert model.hf_quantizer.record is record


def test_card_of_a_model_with_record_and_evaluation(quantized, processor, tmp_path):
    scores = {"metrics": {"exact_match": 0.5}, "nll": 1.25}
    evaluation = {"data": "builtin", "seed": 1, "num_samples": 9, "model": scores, "original": scores, "kl": 0.125}
    example = {
        "question": "What | is it?",
        "accepted": ["red"],
        "given": "blue",
        "given_by_original": "red",
        "right": False,
    }
    evaluation["examples"] = [example | {"original_right": True, "picture": png_base64((250, 0, 0))}]
    sab_hf.save(
        quantized, processor, tmp_path / "saved", evaluation=evaluation, base_model="someone/their-vlm", license="mit"
    )
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.to_dict() == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": "someone/their-vlm",
        "base_model_relation": "quantized",
        "tags": ["sab_hf", "binarized", "1-bit", "quantized"],
        "model-index": [
            {
                "name": "saved",
                "results": [
                    {
                        "task": {"type": "image-text-to-text"},
                        "dataset": {"name": "builtin", "type": "builtin"},
                        "metrics": [
                            {"type": "exact_match", "value": 0.5, "name": "exact match"},
                            {"type": "nats_per_token", "value": 1.25, "name": "nats per token"},
                        ],
                    }
                ],
            }
        ],
    }
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert code.splitlines()[0].startswith("import sab_hf")
    assert "| exact match | 50.0% | 50.0% |" in card.text
    assert "| KL to the original, nats | 0.1250 | – |" in card.text
    shown = "![The picture of question 1](plots/example_0.png)\n\n- question: What \\| is it?\n- accepted: red\n"
    assert f"{shown}- ✗ wrong, this model: `blue`\n- ✓ right, the original: `red`\n" in card.text
    assert (tmp_path / "saved/plots/example_0.png").read_bytes() == base64.b64decode(png_base64((250, 0, 0)))
    assert (
        "| Is it still good? | ✓ **50.0%** | right answers (exact match, 9 questions); the original gives 50.0%."
        in card.text
    )
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [
        ("exact_match", 0.5),
        ("nats_per_token", 1.25),
    ]
    assert quantized.hf_quantizer.record.calibration in card.text
    assert f"**{sab_hf.report(quantized).bits:.3f} bits each**" in card.text
    assert "seed 0" in card.text
    for picture in re.findall(r"\]\((plots/.*?)\)", card.text):
        assert (tmp_path / "saved" / picture).is_file()


def test_card_of_a_model_that_was_loaded_packed(packed_dir, processor, tmp_path):
    sab_hf.save(load(packed_dir), processor, tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "there was no record of the quantization" in card
    assert "No evaluation was run" in card
    assert "base_model" not in card
    assert str(packed_dir) not in card


def test_card_of_a_checkpoint_that_was_loaded_and_saved_again(quantized, processor, tmp_path):
    sab_hf.save(quantized, processor, tmp_path / "first", base_model="someone/their-vlm", license="mit")
    sab_hf.save(load(tmp_path / "first"), processor, tmp_path / "second")
    first, second = (ModelCard.load(tmp_path / name / "README.md") for name in ("first", "second"))
    assert second.data.to_dict() == first.data.to_dict()
    assert quantized.hf_quantizer.record.calibration in second.text
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("first", "second"))
    assert [second[name] for name in ("record", "device")] == [first[name] for name in ("record", "device")]


def test_card_of_an_audio_model_names_a_class_that_loads_it(processor, tmp_path):
    from family_zoo.others import qwen2_audio

    family = qwen2_audio()
    config = sab_hf.SABQuantizationConfig(
        calibration=family.batches, num_samples=8, alternations=1, refine_steps=0, distil_steps=0
    )
    sab_hf.quantize(family.model, processor, None, config)
    sab_hf.save(family.model, processor, tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    auto = getattr(transformers, re.search(r"model = (\w+)\.from_pretrained", card.text)[1])
    assert type(auto.from_pretrained(tmp_path / "saved")) is type(family.model)
    assert card.data.pipeline_tag is None


def test_local_original_gives_its_license_but_not_its_path(vlm_dir, make_config, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module, "find_license", lambda base: {str(vlm_dir): "cc0-1.0"}[base])
    sab_hf.save(load(vlm_dir, quantization_config=make_config()), processor, tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "license: cc0-1.0" in card
    assert "base_model" not in card
    assert str(vlm_dir) not in card + (tmp_path / "saved" / "report.json").read_text()


def test_license_is_read_from_the_card_of_the_original(tmp_path):
    from sab_hf.publish.card import find_license

    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert find_license(str(tmp_path)) == "apache-2.0"
    assert find_license(str(tmp_path / "nothing")) is None
    assert find_license(None) is None
    (tmp_path / "README.md").write_text("---\nlicense: [apache-2.0\ntags: - a: b\n---\n# A model\n")
    assert find_license(str(tmp_path)) is None


def test_local_paths_of_data_are_not_published(model, processor, make_config, tmp_path):
    data = tmp_path / "questions" / "data.jsonl"
    data.parent.mkdir()
    data.write_text("\n".join(json.dumps({"question": f"Say {i}.", "answer": str(i)}) for i in range(4)))
    sab_hf.quantize(model, processor, None, make_config(calibration=str(data), allow_text_only=True))
    scores = {"metrics": {"exact_match": 0.5}, "nll": 1.25}
    evaluation = {"data": str(data), "seed": 1, "num_samples": 9, "model": scores}
    sab_hf.save(model, processor, tmp_path / "saved", evaluation=evaluation)
    pages = [(tmp_path / "saved" / name).read_text() for name in ("README.md", "report.json", "report.html")]
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert stored["calibration"] == "questions/data.jsonl"
    assert all("questions/data.jsonl" in page for page in pages)
    assert not any(str(tmp_path) in page for page in pages)


# ---- the hub


def test_card_of_a_repository_without_an_owner_names_it(quantized, processor, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert sab_hf.save(quantized, processor, "tiny-sab", push=True) == f"{hub.url}/me/tiny-sab"
    assert hub.files("me/tiny-sab")["README.md"].decode().count('from_pretrained("me/tiny-sab"') == 2
    assert list(tmp_path.iterdir()) == []


def test_a_new_branch_is_made(quantized, processor, hub):
    sab_hf.save(quantized, processor, "me/tiny-sab", push=True, revision="new")
    assert hub.branches == {("me/tiny-sab", "new")}
    assert "model.safetensors" in hub.files("me/tiny-sab")


def test_failure_before_publishing_leaves_nothing(quantized, processor, hub, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(hub_module, "html_report", fail)
    with pytest.raises(OSError, match="full"):
        sab_hf.save(quantized, processor, "me/tiny-sab", push=True)
    assert list(tmp_path.iterdir()) == []


def test_published_checkpoint_loads_by_its_id_in_a_new_process_which_publishes_it_again(
    quantized, processor, inputs, hub, tmp_path
):
    url = sab_hf.save(quantized, processor, "me/tiny-sab", push=True, max_shard_size="60KB")
    assert url == f"{hub.url}/me/tiny-sab"
    files = hub.files("me/tiny-sab")
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == len(shards)
    assert files["README.md"].decode().count('from_pretrained("me/tiny-sab"') == 2
    assert len(hub.repos["me/tiny-sab"]) == 2  # empty, and one commit: never half a checkpoint

    torch.save({"inputs": inputs, "logits": logits(quantized, inputs)}, tmp_path / "expected.pt")
    script = """
        import sys
        import sab_hf
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from sab_hf.publish.inspect import inspect

        found = inspect("me/tiny-sab")
        model = AutoModelForImageTextToText.from_pretrained("me/tiny-sab", dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained("me/tiny-sab")
        expected = torch.load(sys.argv[1])
        with torch.no_grad():
            logits = model(**expected["inputs"]).logits
        assert torch.equal(logits, expected["logits"])
        model.push_to_hub("me/alone", max_shard_size="60KB")
        print(processor.tokenizer.pad_token, found.checksums, found.report.bits, sep=";")
    """
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    before = len(hub.requests)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "expected.pt")],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "checksums are not checked" not in done.stderr
    assert done.stdout.strip().split(";") == ["<pad>", "present, not checked", str(sab_hf.report(quantized).bits)]
    assert {f"GET /me/tiny-sab/resolve/{hub.sha('me/tiny-sab')}/{shard}" for shard in shards} <= set(
        hub.requests[before:]
    )

    alone = tmp_path / "alone"
    alone.mkdir()
    for name, content in hub.files("me/alone").items():
        (alone / name).write_bytes(content)
    assert inspect(alone, verify=True).checksums == "verified"
    assert torch.equal(logits(load(alone), inputs), logits(quantized, inputs))
