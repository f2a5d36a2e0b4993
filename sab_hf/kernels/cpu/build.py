"""Compile the CPU kernels (`csrc/`) into a shared library: at installation, or by `python -m sab_hf.kernels.cpu.build`.

Only the standard library is imported: `setup.py` runs this file before the package or PyTorch is there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
LIBRARY = HERE / "sab_cpu.so"
COMMON = ("portable", "pool", "linear", "outliers", "dense", "plan")
FOR_EACH = ("steps", "levels")  # compiled for every instruction set, by its flags and with its name
# so that loops become vector code
VECTORS = ("-fno-trapping-math", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi")
FLAGS = ("-O3", "-std=c11", "-D_POSIX_C_SOURCE=200809L", "-fPIC", "-fvisibility=hidden", "-pthread")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
X86 = {"avx2": AVX2, "avx512": AVX512}
NEON: dict[str, tuple[str, ...]] = {"neon": ()}
INSTRUCTION_SETS = {"x86_64": X86, "AMD64": X86, "aarch64": NEON, "arm64": NEON}


class BuildError(RuntimeError):
    """There is no compiler, or it does not compile the kernels."""


def find_compiler() -> list[str]:
    """Return the C compiler as a command: `CC` if it is set, else what Python was built with, `cc`, `gcc` or `clang`.

    Raises:
        BuildError: there is none.
    """
    asked = os.environ.get("CC")
    for name in [asked] if asked else [sysconfig.get_config_var("CC"), "cc", "gcc", "clang"]:
        command = shlex.split(name or "")
        if command and shutil.which(command[0]):
            return command
    raise BuildError(f"there is no C compiler: {f'CC={asked}' if asked else 'neither cc, gcc nor clang'} was found")


def build(library: Path = LIBRARY, extra_flags: Sequence[str] = (), machine: str | None = None) -> Path:
    """Compile the kernels for this machine's architecture.

    Args:
        library: the file to write.
        extra_flags: flags for compiling and linking, for instance `-fsanitize=address`.
        machine: the architecture as `platform.machine()` names it, for cross compilers.
    Returns:
        `library`.
    Raises:
        BuildError: there is no compiler, or it failed on what every machine needs. Instruction sets that it does not
            know are left out and logged.
    """
    if sys.platform == "win32":
        raise BuildError("the CPU kernels need POSIX threads; on Windows they run in WSL only")
    with tempfile.TemporaryDirectory() as folder:
        objects, defines = compile_objects(Path(folder), extra_flags, machine or platform.machine())
        library.parent.mkdir(parents=True, exist_ok=True)
        finished = Path(folder) / library.name
        _run([*find_compiler(), "-shared", *extra_flags, "-pthread", *map(str, objects), "-lm", "-o", str(finished)])
        # Replaced as a whole: a process that has the old file mapped keeps it.
        staged = library.with_name(f"{library.name}.{os.getpid()}")
        shutil.copyfile(finished, staged)
        staged.replace(library)
    logger.info("built %s (%s)", library, ", ".join(defines) or "portable C only")
    return library


def sources_digest() -> str | None:
    """Return a digest of the C sources, which the library carries so that a stale one is noticed; None without sources."""
    digest = hashlib.sha256()
    paths = sorted((HERE / "csrc").glob("*.[ch]"))
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest() if paths else None


def compile_objects(folder: Path, extra_flags: Sequence[str], machine: str) -> tuple[list[Path], list[str]]:
    """Compile every source into `folder`; return the object files and the `-D` flags of the instruction sets in them."""
    compiler = [*find_compiler(), *FLAGS, *extra_flags, "-c"]
    objects, defines = [], []
    for unit in COMMON:
        objects.append(_compile(compiler, unit, folder))
    objects += _compile_for(compiler, "portable", folder)
    for unit, flags in INSTRUCTION_SETS.get(machine, {}).items():
        try:
            made = [_compile([*compiler, *flags], unit, folder)]
            if flags:
                made += _compile_for([*compiler, *flags], unit, folder)
            objects += made
            defines.append(f"-DSAB_HAVE_{unit.upper()}")
        except BuildError as error:
            logger.warning("the CPU kernels are built without %s, which this compiler does not know: %s", unit, error)
    objects.append(_compile([*compiler, *defines, f"-DSAB_SOURCES={sources_digest()}"], "select", folder))
    return objects, defines


def _compile_for(compiler: list[str], instruction_set: str, folder: Path) -> list[Path]:
    """Compile what is there once for each instruction set."""
    command = [*compiler, *VECTORS, f"-DSAB_ISA={instruction_set}"]
    return [_compile(command, unit, folder, instruction_set) for unit in FOR_EACH]


def _compile(compiler: list[str], unit: str, folder: Path, suffix: str = "") -> Path:
    target = folder / f"{unit}{suffix}.o"
    _run([*compiler, str(HERE / "csrc" / f"{unit}.c"), "-o", str(target)])
    return target


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"`{shlex.join(command)}` did not start: {error}") from error
    if done.returncode:
        raise BuildError(f"`{shlex.join(command)}` failed:\n{done.stderr.strip()[-2000:]}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        build()
    except BuildError as error:
        sys.exit(str(error))
