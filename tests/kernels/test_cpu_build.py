"""Building and loading the CPU kernels: sanitizers, missing compilers, libraries that do not fit."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import assert_is_matmul, inputs, operands, random_planes

from sab_hf.kernels.cpu import build, library
from sab_hf.kernels.ops import linear_reference, sab_linear

ROOT = Path(__file__).parents[2]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


def has_compiler() -> bool:
    try:
        build.find_compiler()
    except build.BuildError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C compiler")


@pytest.fixture
def fresh_load():
    """`library.load` forgets what it found, before and after the test."""
    library.load.cache_clear()
    yield
    library.load.cache_clear()


def compile_c(tmp_path: Path, code: str) -> Path:
    (tmp_path / "other.c").write_text(code)
    target = tmp_path / "other.so"
    subprocess.run([*build.find_compiler(), "-shared", "-fPIC", tmp_path / "other.c", "-o", target], check=True)
    return target


def compile_program(tmp_path: Path, source: str, *rest: str) -> Path:
    """Compile a C program of this folder's parent."""
    program = tmp_path / "program"
    include, std = f"-I{build.HERE / 'csrc'}", ("-std=c11", "-D_POSIX_C_SOURCE=200809L", "-pthread")
    command = [*build.find_compiler(), *std, include, str(ROOT / "tests" / source), *rest, "-lm", "-o", str(program)]
    subprocess.run(command, check=True)
    return program


@needs_compiler
def test_kernels_are_clean_under_sanitizers_and_equal_products_in_double(tmp_path):
    objects, _ = build.compile_objects(tmp_path, SANITIZERS, os.uname().machine)
    driver = compile_program(tmp_path, "csrc_driver.c", *SANITIZERS, *map(str, objects))
    done = subprocess.run([driver], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 1
    assert not done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64")),
    reason="needs the packages gcc-aarch64-linux-gnu and qemu-user",
)
def test_neon_equals_products_in_double_under_emulation(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "aarch64-linux-gnu-gcc")
    objects, defines = build.compile_objects(tmp_path, (), "aarch64")
    assert defines == ["-DSAB_HAVE_NEON"]
    driver = compile_program(tmp_path, "csrc_driver.c", "-O2", "-static", *map(str, objects))
    done = subprocess.run(["qemu-aarch64", driver, "5"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["portable", "portable", "neon", "neon"]


@needs_compiler
def test_the_faster_look_ups_of_two_instruction_sets_are_taken(tmp_path):
    program = compile_program(tmp_path, "csrc_choice.c", "-O2")
    assert subprocess.run([program], check=False).returncode == 0


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The library, built into a folder that was not there."""
    return build.build(tmp_path_factory.mktemp("built") / "folder" / "kernels.so")


@needs_compiler
def test_build_writes_a_library_that_loads(built):
    assert library.open_library(built).sab_cpu_isa().decode() in library.NAMES


def test_versions_of_header_and_package_agree():
    header = (build.HERE / "csrc" / "sab_cpu.h").read_text()
    assert int(re.search(r"#define SAB_CPU_ABI (\d+)", header).group(1)) == library.ABI
    assert library.LIBRARY == build.LIBRARY


def test_a_named_compiler_that_is_missing_is_an_error(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(build.BuildError, match="CC=no-such-compiler"):
        build.find_compiler()


def test_a_compiler_that_fails_is_named_with_its_message(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", f"{sys.executable} -c 'raise SystemExit(\"no such target\")'")
    with pytest.raises(build.BuildError, match="no such target"):
        build.build(tmp_path / "kernels.so")
    assert not list(tmp_path.iterdir())


def test_no_compiler_at_all(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(build.BuildError, match="neither cc, gcc nor clang"):
        build.find_compiler()


def test_missing_library_falls_back_and_says_so_once(monkeypatch, tmp_path, caplog, fresh_load):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "missing.so")
    monkeypatch.delenv(library.SWITCH, raising=False)
    planes, x = random_planes(20, 30, 2, 5), inputs(3, 30)
    with caplog.at_level(logging.WARNING):
        results = [sab_linear(x, *operands(planes)) for _ in range(3)]
    assert torch.equal(results[2], linear_reference(x, *operands(planes)))
    [record] = caplog.records
    assert "slowly" in record.message
    assert "missing.so is missing" in record.message
    assert "python -m sab_hf.kernels.cpu.build" in record.message


@needs_compiler
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("int sab_cpu_abi(void) { return 999; }", "has version 999 of the kernels, this package needs"),
        ("int something_else;", "does not load: .*sab_cpu_abi"),
    ],
)
def test_other_libraries_are_not_used(monkeypatch, tmp_path, caplog, fresh_load, code, message):
    monkeypatch.setattr(library, "LIBRARY", compile_c(tmp_path, code))
    monkeypatch.delenv(library.SWITCH, raising=False)
    assert library.load() is None
    assert re.search(message, caplog.text)


@needs_compiler
def test_a_library_of_other_sources_is_not_used(monkeypatch, tmp_path, built):
    here = tmp_path / "kernels"
    shutil.copytree(build.HERE / "csrc", here / "csrc")
    monkeypatch.setattr(build, "HERE", here)
    library.open_library(built)
    (here / "csrc" / "linear.c").open("a").write("/* edited */\n")
    with pytest.raises(library.UnusableLibraryError, match=r"kernels\.so is stale"):
        library.open_library(built)
    shutil.rmtree(here / "csrc")  # an installation without sources has nothing to compare
    library.open_library(built)


def test_files_that_are_no_libraries_are_not_used(tmp_path):
    path = tmp_path / "text.so"
    path.write_text("no library")
    with pytest.raises(library.UnusableLibraryError, match="does not load"):
        library.open_library(path)


@pytest.mark.skipif(library.load() is None, reason="there is no compiled library")
def test_switch_chooses_and_rejects_instruction_sets(monkeypatch, fresh_load):
    monkeypatch.setenv(library.SWITCH, "portable")
    assert library.load().sab_cpu_isa() == b"portable"
    library.load.cache_clear()
    monkeypatch.setenv(library.SWITCH, library.PYTORCH)
    assert library.load() is None
    library.load.cache_clear()
    monkeypatch.setenv(library.SWITCH, "mmx")
    with pytest.raises(ValueError, match=r"SAB_CPU_ISA.*portable, torch on this machine.*`mmx`"):
        library.load()


@pytest.mark.skipif(library.load() is None, reason="there is no compiled library")
def test_forked_processes_and_other_threads_can_compute():
    """The workers of the parent do not exist in a forked child; threads that call at once share nothing."""
    script = """
        import os, sys, threading
        sys.path.insert(0, "tests")
        import torch
        from helpers import assert_is_matmul, inputs, operands
        from helpers import random_planes
        from sab_hf.kernels.ops import sab_linear

        torch.set_num_threads(3)
        planes, x = random_planes(3000, 2000), inputs(1, 2000)
        packed = operands(planes)
        expected = sab_linear(x, *packed, exact=True)
        assert_is_matmul(expected, x, planes)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(sab_linear(x, *packed, exact=True), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
        results = []
        threads = [threading.Thread(target=lambda: results.append(sab_linear(x, *packed, exact=True))) for _ in range(6)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(results) == 6 and all(torch.equal(expected, y) for y in results)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_reference_is_the_op_without_kernels():
    planes, x = random_planes(20, 30, 2, 5), inputs(3, 30)
    assert_is_matmul(linear_reference(x, *operands(planes)), x, planes)
