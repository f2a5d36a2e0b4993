"""The command `sab-hf`, called as a function, and once as a process for itself and for optimum-cli."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import load, logits, packed_linears
from processes import as_main, forked
from transformers import AutoModelForImageTextToText

import sab_hf
import sab_hf_command
from sab_hf.cli import main

ROOT = Path(__file__).parents[2]


def run(capsys, *argv: str | Path) -> tuple[int, str, str]:
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ---- usage


@pytest.mark.parametrize(
    "argv",
    [
        ["no-such-command"],
        ["inspect"],
        ["quantize", "a", "b", "--bits", "many"],
        ["dequantize", "a", "b", "--max-shard-size", "big"],
        ["eval", "a", "--num-samples", "0"],
        ["serve", "a", "--engine", "apache"],
    ],
)
def test_wrong_usage_is_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: sab-hf" in capsys.readouterr().err


def test_no_command_shows_all_of_them(capsys):
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    for name in ("chat", "quantize", "inspect", "eval", "serve", "dequantize", "export", "card", "run"):
        assert f"\n    {name}" in err


def test_failure_is_exit_code_1_with_the_reason_on_stderr(capsys, vlm_dir):
    code, out, err = run(capsys, "inspect", vlm_dir)
    assert (code, out) == (1, "")
    assert err.startswith("sab-hf inspect: error: ")
    assert "holds dense weights, and a checkpoint packed by sab_hf is required" in err


# ---- commands


def test_inspect_prints_a_table_or_json(capsys, packed_dir):
    code, out, _ = run(capsys, "inspect", packed_dir)
    assert code == 0
    assert "whole checkpoint" in out
    code, out, _ = run(capsys, "inspect", packed_dir, "--verify", "--json")
    assert json.loads(out)["bits"] == sab_hf.report(load(packed_dir)).bits
    assert json.loads(out)["checksums"] == "verified"


def test_json_has_null_for_what_is_no_number(capsys, monkeypatch):
    monkeypatch.setattr("sab_hf.commands.inspection.run", lambda args: ({"bits": float("nan")}, ""))
    assert json.loads(run(capsys, "inspect", "anything", "--json")[1]) == {"bits": None}


def test_quantize_writes_what_the_python_api_writes(capsys, vlm_dir, questions, tmp_path, inputs):
    options = [
        "--set",
        "alternations=2",
        "--set",
        "allow_text_only=true",
        "--set",
        'modules_to_not_convert=["layers.1"]',
        "--set",
        "allow_low_coverage=true",
    ]
    code, out, _ = run(
        capsys, "quantize", vlm_dir, tmp_path / "out", "--bits", "2.5", "--calibration", questions,
        "--refine-steps", "0", "--set", "distil_steps=0",
        "--seed", "3", "--num-samples", "3", "--dtype", "float32", "--json", *options,
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["saved"] == str(tmp_path / "out")
    config = sab_hf.SABQuantizationConfig(
        bits=2.5, calibration=questions, refine_steps=0, distil_steps=0, seed=3, num_samples=3, alternations=2,
        allow_text_only=True,
        modules_to_not_convert=["layers.1"], allow_low_coverage=True,
    )  # fmt: skip
    expected = load(vlm_dir, quantization_config=config)
    found = load(tmp_path / "out")
    assert packed_linears(found).keys() == packed_linears(expected).keys()
    assert torch.equal(logits(found, inputs), logits(expected, inputs))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("bitz=2", "`bitz` is no field of SABQuantizationConfig that can be set; did you mean `bits`?"),
        ("modules={}", "is no field of SABQuantizationConfig that can be set"),
        ("xyz", "is no field of SABQuantizationConfig that can be set; those are ['allow_low_coverage', "),
        ("damping=many", "`damping` must be a number"),
    ],
)
def test_quantize_refuses_what_cannot_be_set(capsys, vlm_dir, tmp_path, entry, message):
    code, _, err = run(capsys, "quantize", vlm_dir, tmp_path / "out", "--set", entry)
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_dequantize_writes_a_checkpoint_that_needs_no_plugin(capsys, saved, tmp_path, inputs):
    code, out, _ = run(capsys, "dequantize", saved, tmp_path / "dense", "--dtype", "float32")
    assert code == 0
    assert "MiB of dense weights" in out
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    dense = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(dense, inputs), logits(load(saved), inputs), rtol=1e-4, atol=1e-4)


def test_card_takes_an_evaluation_and_keeps_the_report(capsys, saved, tmp_path):
    scores = {"metrics": {"exact_match": 0.5}, "nll": 1.25}
    evaluation = {"data": "mine.jsonl", "seed": 1, "num_samples": 9, "model": scores}
    (tmp_path / "eval.json").write_text(json.dumps(evaluation))
    weights = (saved / "model.safetensors").read_bytes()
    code, out, _ = run(
        capsys, "card", saved, "--evaluation", tmp_path / "eval.json", "--base-model", "a/b", "--license", "mit"
    )
    assert code == 0
    assert str(saved / "README.md") in out
    assert json.loads((saved / "report.json").read_text())["evaluation"] == evaluation
    assert run(capsys, "card", saved)[0] == 0  # again, with all of it from the report and card that are there
    card = (saved / "README.md").read_text()
    assert "| exact match | 50.0% | – |" in card
    assert "base_model: a/b" in card
    assert "license: mit" in card
    assert "mine.jsonl" in (saved / "report.html").read_text()
    assert (saved / "model.safetensors").read_bytes() == weights


def test_card_can_be_published(capsys, saved, hub):
    code, out, _ = run(capsys, "card", saved, "--push", "--repo-id", "me/from-shell", "--json")
    assert (code, json.loads(out)["published"]) == (0, f"{hub.url}/me/from-shell")
    assert hub.files("me/from-shell")["model.safetensors"] == (saved / "model.safetensors").read_bytes()


def test_card_is_published_under_the_folder_s_name(capsys, saved, hub):
    code, _, _ = run(capsys, "card", saved, "--push")
    assert code == 0
    assert 'from_pretrained("me/tiny-sab"' in hub.files("me/tiny-sab")["README.md"].decode()


def test_eval_compares_with_the_original(capsys, saved, vlm_dir, questions, tmp_path):
    code, out, _ = run(
        capsys, "eval", saved, "--original", vlm_dir, "--data", questions, "--num-samples", "2", "--json",
        "--output", tmp_path / "eval.json", "--dtype", "float32",
    )  # fmt: skip
    assert code == 0
    result = json.loads(out)
    assert result == json.loads((tmp_path / "eval.json").read_text())
    assert result["num_samples"] == 2
    assert result["kl"] > 0


def test_run_starts_a_program_with_the_method_registered(capsys, tmp_path, packed_dir):
    script = (
        "import sys\nfrom transformers import AutoModelForImageTextToText as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1])\nprint(model.quantization_method, *sys.argv[2:])\nsys.exit(5)\n"
    )
    (tmp_path / "program.py").write_text(script)
    with pytest.raises(SystemExit) as stop:
        main(["run", str(tmp_path / "program.py"), str(packed_dir), "--flag"])
    assert stop.value.code == 5
    assert "sab --flag" in capsys.readouterr().out


def test_run_starts_a_module_too(capsys, tmp_path, monkeypatch):
    (tmp_path / "a_module.py").write_text("import sys; print(sys.argv[1:], __name__)")
    monkeypatch.syspath_prepend(tmp_path)
    for argv in (["run", "-m", "a_module", "-m", "--json"], ["run", "a_module", "-m", "--json"]):
        assert main(argv) == 0
        assert capsys.readouterr().out.strip() == "['-m', '--json'] __main__"
    for program in (["-m", "a_module"], ["a_module"], ["--", "a_module"]):
        assert main(["run", *program, "--", "y"]) == 0
        assert capsys.readouterr().out.strip() == "['--', 'y'] __main__"
    with pytest.raises(SystemExit) as stop:
        main(["run"])
    assert stop.value.code == 2


# ---- as processes


def process(argv: list[str], cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )


def test_command_as_a_process(packed_dir, tmp_path):
    done = forked(as_main("sab_hf.cli", "inspect", packed_dir, "--json", folder=tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == str(packed_dir)


def test_installed_command_is_this_one(packed_dir):
    def installed() -> None:
        sys.argv = ["sab-hf", "inspect", str(packed_dir)]
        sys.exit(sab_hf_command.main())

    done = forked(installed)
    assert done.returncode == 0, done.stderr
    assert str(packed_dir) in done.stdout


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["quantize", "--help"], 0), (["inspect"], 2)])
def test_usage_is_told_before_anything_heavy_is_imported(argv, code, tmp_path):
    script = (
        "import sab_hf_command, sys\n"
        "try:\n    sab_hf_command.main()\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'sab_hf'} & set(sys.modules)))\n"
    )
    done = process(["-c", script, *argv], tmp_path)
    assert done.returncode == code
    assert "usage: sab-hf" in done.stdout + done.stderr
    assert done.stdout.endswith("[]\n")


def test_interruption_of_an_import_leaves_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    script = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    done = process(["-c", f"{script}import sab_hf_command\nsab_hf_command.main()", "inspect", "x"], tmp_path)
    assert (done.returncode, done.stderr) == (130, "\nsab-hf: interrupted\n")


@pytest.mark.skipif(importlib.util.find_spec("optimum.commands.optimum_cli") is None, reason="needs optimum")
def test_optimum_cli_has_the_same_command(packed_dir, vlm_dir):
    def run_both() -> None:
        from optimum.commands.optimum_cli import main as optimum

        for folder in (packed_dir, vlm_dir):
            sys.argv = ["optimum-cli", "sab", "inspect", str(folder), "--json"]
            with pytest.raises(SystemExit) as stop:
                optimum()
            sys.stderr.write(f"code {stop.value.code}\n")

    done = forked(run_both)
    assert re.findall(r"^code (.*)", done.stderr, re.MULTILINE) == ["0", "1"], done.stderr
    assert json.loads(done.stdout)["name"] == str(packed_dir)


@pytest.mark.skipif(importlib.util.find_spec("optimum.commands.optimum_cli") is None, reason="needs optimum")
def test_optimum_cli_imports_nothing_heavy_to_parse(tmp_path):
    script = (
        "import sys\nfrom optimum.commands.optimum_cli import main\n"
        "try:\n    main()\nfinally:\n    print(sorted({'torch', 'transformers', 'sab_hf'} & set(sys.modules)))\n"
    )
    done = process(["-c", script, "sab", "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "quantize" in done.stdout
    assert done.stdout.endswith("[]\n")
