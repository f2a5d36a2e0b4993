"""What makes a command line pleasant: help with defaults and examples, a word on misspelt names, quiet, colours, completion."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import runpy
import shlex
import subprocess
import threading
import time

import huggingface_hub
import pytest
from helpers import QUICK_OPTIONS, load, save_dense

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.cli import main, make_parser
from sab_hf.commands import COMMANDS
from sab_hf.make.settings import IMAGE_TOKENS_CPU


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_parses_and_every_default(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"example: {COMMANDS[name].EXAMPLE}" in shown
    program, *arguments = shlex.split(COMMANDS[name].EXAMPLE)
    assert program == "sab-hf"
    parsed = make_parser().parse_args(arguments)
    assert parsed.sab_command == name
    positional = {"export": ["gguf", "x", "x"], "quantize": ["x", "x"], "dequantize": ["x", "x"]}.get(name, ["x"])
    options = vars(make_parser().parse_args([name, *positional]))
    for option, value in options.items():
        if type(value) in (int, str) and option != "sab_command" and value not in positional:
            assert f"(default {value})" in shown, option


def test_help_of_quantize_tells_the_defaults_of_the_config(capsys):
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    config = SABQuantizationConfig()
    assert f"calibration samples (default {config.num_samples})" in shown
    assert f"on a CPU at most {IMAGE_TOKENS_CPU})" in shown
    assert f"seed of the calibration set (default {config.seed})" in shown
    assert f"{config.calibration} (default)" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["qantize", "a", "b"], "did you mean `quantize`?"),
        (["eval", "a", "--bacth-size", "3"], "unrecognized arguments: --bacth-size 3; did you mean `--batch-size`?"),
        (["eval", "a", "--dtype", "float23"], "did you mean `float32`?"),
        (["serve", "a", "--engine", "vlm"], "did you mean `vllm`?"),
        (["inspect", "a", "--xyz"], "unrecognized arguments: --xyz\n"),
    ],
)
def test_misspelt_names_are_told(argv, message, capsys):
    err = refused(capsys, *argv)
    assert message in err
    if argv[0] in COMMANDS:
        assert f"usage: sab-hf {argv[0]}" in err


def test_quiet_and_verbose(vlm_dir, questions, tmp_path, capsys):
    argv = ["quantize", str(vlm_dir), str(tmp_path / "out"), "--calibration", questions, *QUICK_OPTIONS]
    assert main([*argv, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert "saved: " in captured.out
    assert captured.err == ""
    assert main(argv) == 0
    assert "calibration set: 4 samples" in capsys.readouterr().err
    before = logging.getLogger("sab_hf").level
    assert main(["inspect", str(vlm_dir), "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert logging.getLogger("sab_hf").level == before
    assert "not allowed with argument" in refused(capsys, *argv, "--quiet", "--verbose")


def test_colours_are_for_terminals_that_want_them(vlm_dir, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["inspect", str(vlm_dir)])
    assert "\x1b[31merror:\x1b[0m" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    main(["inspect", str(vlm_dir)])
    assert "\x1b" not in capsys.readouterr().err


def test_hub_that_does_not_answer_is_asked_once(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    pauses, sleep, here = [], time.sleep, threading.get_ident()

    def pause(seconds: float) -> None:
        if threading.get_ident() == here:  # other threads of the process pause for reasons of their own
            pauses.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr("time.sleep", pause)
    assert main(["inspect", "nope"]) == 1
    assert pauses == []  # the client pauses for 1 to 8 s before it asks again
    err = capsys.readouterr().err
    assert err.count("http://127.0.0.1:9 does not answer") == 1
    assert "there is no folder `nope` here, and it could not be read from the Hub" in err
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in os.environ


def test_misspelt_folder_is_told(tmp_path, monkeypatch, capsys, packed_dir):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "tiny-sab").symlink_to(packed_dir)
    assert main(["inspect", "tinysab"]) == 1
    assert "did you mean `tiny-sab`?" in capsys.readouterr().err


def test_interrupted_run_says_where_the_finished_blocks_are(vlm_dir, questions, tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    argv = ["quantize", str(vlm_dir), str(tmp_path / "out"), "--calibration", questions, *QUICK_OPTIONS]
    argv += ["--set", f"checkpoint_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patched:
        patched.setattr("sab_hf.publish.open.opening_class", stop)
        assert main(argv) == 130
    assert f"no step was finished that `{tmp_path / 'run'}` could keep" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr("sab_hf.publish.save.save", stop)
        assert main(argv) == 130
    assert (
        f"what is finished is in `{tmp_path / 'run'}`; the same command continues after it" in capsys.readouterr().err
    )
    assert main(argv) == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh", "fish"])
def test_completion_knows_commands_and_options(shell, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", shell])
    assert stop.value.code == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert all(option.lstrip("-") in script for option in ("--push-to-hub", "--trust-remote-code"))
    if shell == "bash":
        done = subprocess.run(
            ["bash", "-c", f"{script}\nCOMP_WORDS=(sab-hf qua); COMP_CWORD=1; _shtab_sab_hf; echo ${{COMPREPLY[@]}}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.split() == ["quantize"]


def test_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sab_hf", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("sab_hf", run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"sab_hf {sab_hf.__version__}\n"


def test_code_of_a_model_is_run_only_when_asked_for(tmp_path, capsys, questions):
    """A text model whose repository brings its classes: refused without the option, quantized and inspected with it."""
    from helpers import build_llama, build_tokenizer

    folder = tmp_path / "own"
    save_dense(build_llama(), folder)
    build_tokenizer().save_pretrained(folder)
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    argv = ["quantize", str(folder), str(tmp_path / "out"), "--calibration", questions, *QUICK_OPTIONS]
    assert main(argv) == 1
    assert "trust_remote_code" in capsys.readouterr().err
    assert main([*argv, "--dry-run"]) == 1
    assert "trust_remote_code" in capsys.readouterr().err
    assert main([*argv, "--dry-run", "--trust-remote-code"]) == 0
    assert main([*argv, "--trust-remote-code"]) == 0
    assert main(["inspect", str(tmp_path / "out"), "--trust-remote-code"]) == 0
    capsys.readouterr()
    prompt = ["--prompt", "Hello", "--max-new-tokens", "2", "--trust-remote-code", "--json"]
    assert main(["chat", str(tmp_path / "out"), *prompt]) == 0


def test_models_of_tasks_may_bring_code_when_asked(monkeypatch, packed_dir):
    from sab_hf.evaluate import tasks

    given = {}
    result = tasks.TaskEvaluation("lmms-eval", 1, None, [tasks.TaskScore("chartqa", "a/b", "relaxed", 4, 0.5)])
    monkeypatch.setattr(tasks, "evaluate_tasks", lambda *args, **kwargs: given.update(kwargs) or result)
    assert main(["eval", str(packed_dir), "--tasks", "chartqa"]) == 0
    assert "trust_remote_code" not in given
    assert main(["eval", str(packed_dir), "--tasks", "chartqa", "--trust-remote-code"]) == 0
    assert given["trust_remote_code"] is True


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["quantize", "nope", "out", "--distil-steps", "-1"], 2, "`distil_steps` must be"),
        (["quantize", "nope", "out", "--set", "bitz=2"], 2, "did you mean `bits`?"),
        (["eval", "nope", "--include-path", "tasks"], 2, "it is for --tasks"),
        (["eval", "nope", "--output", "no/where.json"], 1, "there is no folder `no`"),
        (["chat", "nope", "--image", "no.png"], 1, "there is no picture `no.png`"),
    ],
)
def test_wrong_options_are_told_before_the_hub_is_asked(argv, code, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert main(argv) == code
    assert message in capsys.readouterr().err


# ---- the same in Python


def test_dict_is_taken_where_a_config_is_wanted(vlm_dir, make_config, model, samples, processor):
    fields = {field.name: getattr(make_config(), field.name) for field in dataclasses.fields(SABQuantizationConfig)}
    given = {name: fields[name] for name in ("num_samples", "alternations", "refine_steps", "distil_steps", "budget")}
    record = sab_hf.quantize(model, processor, samples, given)
    assert model.config.quantization_config.budget == "uniform"
    assert len(record.fits) == 14
    with pytest.raises(ValueError, match=r"unknown fields \['bit'\].*did you mean `bits`"):
        sab_hf.quantize(load(vlm_dir), processor, samples, {"bit": 1})
    with pytest.raises(ValueError, match="must be a SABQuantizationConfig or a dict of its fields, got float"):
        sab_hf.quantize(load(vlm_dir), processor, samples, 1.1)
    with pytest.raises(ValueError, match="quant_method"):
        load(vlm_dir, quantization_config={"bits": 1.1})


def test_evaluate_is_there_and_refuses_misspelt_arguments(packed_dir, processor):
    import sab_hf.evaluate.compare

    with pytest.raises(TypeError, match=r"evaluate\(\) has no argument `orginal`; did you mean `original`\?"):
        sab_hf.evaluate(packed_dir, orginal="a")
    with pytest.raises(ValueError, match="`num_samples` must be at least 1"):
        sab_hf.evaluate(packed_dir, num_samples=0, torch_dtype="float32", device_map="cpu", token=None)
    from sab_hf.evaluate import evaluate

    assert evaluate is sab_hf.evaluate.compare.evaluate


def test_records_are_short_and_tables_in_notebooks(packed_dir, saved):
    model = load(packed_dir)
    report = sab_hf.report(model)
    assert re.fullmatch(r"Report\(\d\.\d{3} bits/weight, 14 packed matrices, \d+\.\d KiB\)", repr(report))
    assert report._repr_html_().count("<tr>") == 1 + len(report.roles)
    assert f"{report.roles['language'].num_quantized:,}" in report._repr_html_()
    assert repr(sab_hf.report(load(packed_dir).dequantize())).startswith("Report(nothing packed, ")
    from sab_hf.publish.inspect import inspect

    found = inspect(saved)
    assert repr(found) == f"Inspection({saved}: {found.report!r}, checksums: present, not checked)"
    assert "<table>" in found._repr_html_()
    for own in report.modules:
        residual = f" and {own.num_significant} significant columns" if own.num_significant else ""
        shown = repr(model.get_submodule(own.name))
        assert (
            f"in_features={own.in_features}, out_features={own.out_features}, {own.bits:.3f} bits (1 plane{residual})"
            in shown
        )
    assert any(own.num_significant for own in report.modules)
