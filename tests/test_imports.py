"""The rooms of the package: imports point one way, and running a packed model never imports what makes one."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import sab_hf

PACKAGE = Path(sab_hf.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
ROOMS = (
    "ground",
    "calibration",
    "kernels",
    "packed",
    "method",
    "anatomy",
    "machine",
    "passes",
    "make",
    "publish",
    "evaluate",
    "doors",
)
"""From the ground up: a room imports only from itself and from rooms before it. Files in no folder are `ground` or doors."""
GROUND = {
    "brief",
    "config",
    "dotted",
    "notebook",
    "packing",
    "paths",
    "planes",
    "processors",
    "spelling",
    "trust",
    "units",
    "version",
}
MAKING = {"calibration", "method", "machine", "passes", "make"}
"""What a packed checkpoint needs nothing of; `evaluate` reads samples and may use it."""
RUNNING = set(ROOMS) - MAKING - {"evaluate"}
HEAVY = {"datasets", "PIL"}


def source(module: str) -> str:
    return MODULES[module].read_text(encoding="utf-8")


def room_of(module: str) -> str:
    first = module.partition(".")[0]
    return "ground" if first in GROUND else first if first in ROOMS else "doors"


@functools.cache
def imports(module: str) -> tuple[set[str], set[str]]:
    """Return what `module` imports when it is imported: modules of the package, and top-level names of others."""
    own, others = set(), set()
    for node in _module_level(ast.parse(source(module))):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif node.level == 0:
            others.add(node.module.split(".")[0])
        else:
            package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
            base = [part for part in package if part != "__init__"]
            base = base[: len(base) - (node.level - 1)]
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names = {f"{target}.{alias.name}".lstrip(".") for alias in node.names} & MODULES.keys()
            own |= names or {target or "__init__"}
    return own, others


def _module_level(node):
    """Yield the imports below `node` that run when the module is imported: those in no function, nor for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _module_level(child)


@functools.cache
def reached(module: str) -> set[str]:
    """Return the modules of the package that importing `module` imports, itself included."""
    found, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo.extend(imports(name)[0])
    return found


def test_every_room_is_there():
    assert {room_of(module) for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_come_from_rooms_before(module):
    own = ROOMS.index(room_of(module))
    for imported in imports(module)[0]:
        assert ROOMS.index(room_of(imported)) <= own, f"`{module}` imports `{imported}`, which lies above it"
        assert module not in reached(imported), f"`{module}` and `{imported}` import each other"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room_of(name) in RUNNING and name != "tuning"))
def test_what_runs_a_packed_model_imports_nothing_that_makes_one(module):
    found = reached(module)
    assert {name for name in found if room_of(name) in MAKING} == set()
    assert {name for inner in found for name in imports(inner)[1]} & HEAVY == set()


@pytest.mark.parametrize("place", ["kernels", "method", "calibration.builtin"])
def test_what_is_tested_on_one_version_of_transformers_imports_none(place):
    """The list is in `.ci/run`."""
    inside = [module for module in MODULES if f"{module}.".startswith(f"{place}.")]
    assert inside
    assert [module for module in inside if re.search(r"^\s*(from|import) transformers", source(module), re.M)] == []


def test_nothing_imports_the_package_by_its_absolute_name():
    assert [module for module in MODULES if "sab_hf" in imports(module)[1]] == []


def test_loading_and_running_a_packed_checkpoint_imports_nothing_heavy(packed_dir):
    script = """
        import json, sys
        from pathlib import Path

        asked = []

        class Watch:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("datasets", "PIL"):
                    frame = sys._getframe(1)
                    while "importlib" in frame.f_code.co_filename:
                        frame = frame.f_back
                    asked.append([name, frame.f_code.co_filename])

        sys.meta_path.insert(0, Watch())
        import sab_hf
        after_import = sorted(sys.modules)
        import torch
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], device_map="cpu")
        model.generate(input_ids=torch.arange(9)[None], max_new_tokens=2, do_sample=False)
        sab_hf.report(model)
        model.dequantize()
        print(json.dumps({"asked": asked, "after_import": after_import, "in_the_end": sorted(sys.modules)}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(packed_dir)],
        capture_output=True, text=True, check=False, cwd=PACKAGE.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    for moment in ("after_import", "in_the_end"):
        loaded = set(seen[moment])
        assert "sab_hf.packed.linear" in loaded
        assert {name for name in MODULES if room_of(name) in MAKING and f"sab_hf.{name}" in loaded} == set()
        assert "datasets" not in loaded
    assert [file for _, file in seen["asked"] if Path(file).is_relative_to(PACKAGE)] == []


def test_public_names_exist():
    assert all(hasattr(sab_hf, name) for name in sab_hf.__all__)
    assert set(sab_hf.__all__) <= set(dir(sab_hf))
    with pytest.raises(AttributeError, match="nothing"):
        sab_hf.nothing  # noqa: B018
