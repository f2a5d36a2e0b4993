"""What editors and type checkers make of the package: the README's snippets have no error, and a field that is wrong is one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sab_hf

ROOT = Path(sab_hf.__file__).parents[1]

WRONG = """
from sab_hf import SABQuantizationConfig, quantize

SABQuantizationConfig(bitz=1.1)
SABQuantizationConfig().bits.upper()
quantize(1)
"""


def test_snippets_of_the_readme_have_the_right_types(tmp_path):
    """All in one run of pyright, which takes most of a minute to read torch and transformers."""
    pytest.importorskip("pyright")
    snippets = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert snippets
    (tmp_path / "readme.py").write_text("\n".join(snippets))
    (tmp_path / "wrong.py").write_text(WRONG)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "--project", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = [(Path(one["file"]).name, one["range"]["start"]["line"], one["message"]) for one in found]
    assert [error for error in errors if error[0] == "readme.py"] == []
    assert {line for file, line, _ in errors if file == "wrong.py"} == {3, 4, 5}, errors
