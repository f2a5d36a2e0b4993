"""`python -m sab_hf.run`: other programs see the method, their arguments and their exit codes; and `sab_hf.load`."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import generate, load
from processes import as_main, forked

import sab_hf
from sab_hf import run

ROOT = Path(sab_hf.__file__).parents[1]


def start(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run `python -m sab_hf.run` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "sab_hf.run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


@pytest.fixture
def script(tmp_path) -> Path:
    """A program that knows nothing of this package: it loads a checkpoint with a helper beside it, and exits with 3."""
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "helper.py").write_text("from transformers import AutoModelForImageTextToText as Auto\n")
    path = tmp_path / "programs" / "program.py"
    code = """
        import sys
        from helper import Auto

        if __name__ == "__main__":
            kinds = {type(module).__name__ for module in Auto.from_pretrained(sys.argv[1]).modules()}
            print(sys.argv, "SABLinear" in kinds)
            sys.exit(3)
    """
    path.write_text(textwrap.dedent(code))
    return path


def test_script_loads_a_packed_checkpoint_and_gives_its_exit_code(script, packed_dir, tmp_path):
    done = start("programs/program.py", str(packed_dir), "--flag", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stdout.strip() == f"{['programs/program.py', str(packed_dir), '--flag']} True"


def test_module_and_unknown_program(monkeypatch, tmp_path, capsys):
    (tmp_path / "my_module.py").write_text("import sys; print(sys.argv[1:], __name__); sys.exit('went wrong')")
    monkeypatch.syspath_prepend(tmp_path)
    for arguments in (["my_module", "a"], ["-m", "my_module", "a"]):
        with pytest.raises(SystemExit) as stop:
            run.main(arguments)
        assert stop.value.code == "went wrong"
        assert capsys.readouterr().out.strip() == "['a'] __main__"
    missing = "is no file, no command of an installed package, and no module"
    for arguments, message in (
        (["no_such_program"], f"'no_such_program' {missing}\n"),
        (["pytets"], f"'pytets' {missing}; did you mean `pytest`?\n"),
        (["no.such.module"], missing),
        (["-m"], "-m needs the name of a module"),
        (["-m", "json"], "'json' is a package that cannot be run"),
        (["json"], "'json' is a package that cannot be run"),
    ):
        with pytest.raises(SystemExit) as stop:
            run.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_command_of_an_installed_package(monkeypatch, tmp_path):
    """Entry points are looked up by name and called with their own arguments; what they return is passed on."""
    package = tmp_path / "tool-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: tool\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[console_scripts]\nmy-tool = my_tool_code:main\n")
    (tmp_path / "my_tool_code.py").write_text("import sys\ndef main():\n    return [len(sys.argv), *sys.argv]\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.argv)
    assert run.main(["my-tool", "--x", "1"]) == [3, "my-tool", "--x", "1"]
    assert sys.argv == before


def test_a_peft_that_cannot_be_imported_stops_no_program(script, packed_dir, tmp_path):
    (script.parent / "peft.py").write_text("raise ImportError('its own reasons')")

    def program() -> None:
        for name in [name for name in sys.modules if name == "sab_hf.peft" or name.partition(".")[0] == "peft"]:
            del sys.modules[name]
        vars(sab_hf).pop("peft", None)
        sys.path.insert(0, str(script.parent))
        as_main("sab_hf.run", script, packed_dir, folder=tmp_path)()

    done = forked(program)
    assert done.returncode == 3, done.stderr
    assert done.stdout.strip().endswith("True")
    assert "adapters on packed models will not load" in done.stderr
    assert "its own reasons" in done.stderr


def test_usage(capsys):
    for arguments, code in (([], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            run.main(arguments)
        assert stop.value.code == code
    out, err = capsys.readouterr()
    assert "PROGRAM [ARGS ...]" in out
    assert "PROGRAM [ARGS ...]" in err


# ---- load


def test_load_gives_model_and_processor(packed_dir, inputs):
    model, processor = sab_hf.load(packed_dir, dtype=torch.float32)
    assert not model.training
    assert generate(model, inputs) == generate(load(packed_dir), inputs)
    assert type(processor).__name__ == "LlavaProcessor"


def test_load_refuses_what_is_not_packed(vlm_dir):
    with pytest.raises(ValueError, match=r"holds dense weights, and a checkpoint packed by sab_hf is required"):
        sab_hf.load(vlm_dir)


def test_load_says_when_the_processor_is_missing(packed_dir, tmp_path):
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / name).symlink_to(packed_dir / name)
    with pytest.raises(OSError, match="has no processor beside its weights"):
        sab_hf.load(tmp_path)


def test_load_names_a_config_without_a_generating_model():
    from transformers import SiglipVisionConfig

    from sab_hf.publish.open import opening_class

    with pytest.raises(ValueError, match="no generating model for a SiglipVisionConfig"):
        opening_class(SiglipVisionConfig())
