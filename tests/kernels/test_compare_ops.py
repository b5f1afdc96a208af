"""Builds csrc/tests/compare_ops.cpp with the flags of CMakeLists.txt; runs it here, and for AArch64 in an emulator.

The program prints one line per kernel and instruction set and fails if one of them differs from the portable kernels.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from miniphi.kernels import available_isas
from tests.shared_data import REPOSITORY

CSRC = REPOSITORY / "csrc"
SOURCES = {"x86_64": ("ops_avx2", "ops_avx512"), "aarch64": ("ops_neon",)}
KERNELS = 23  # lines per instruction set


def flags_of(source: str) -> list[str]:
    """What CMakeLists.txt compiles this file with; the comparison itself need not be fast, but quick to compile."""
    text = (REPOSITORY / "CMakeLists.txt").read_text()
    common = re.search(r"^set\(FLAGS (.+)\)$", text, re.MULTILINE)
    own = re.search(rf'\(csrc/{source}\.cpp PROPERTIES COMPILE_OPTIONS\s+"([^"]+)"', text)
    assert common is not None, "CMakeLists.txt has no line set(FLAGS ...)"
    assert (own is not None) == source.startswith(("ops_a", "ops_n")), f"options of {source}.cpp in CMakeLists.txt"
    options = own[1].split(";") if own else []
    return ["-std=c++20", *common[1].split(), *options, *([] if source.startswith("ops_") else ["-O1"])]


def build(compiler: str, machine: str, folder: Path, *link_flags: str) -> Path:
    definitions = ["-DMINIPHI_NEON"] if machine == "aarch64" else []
    objects = []
    for source in ("isa", "pack", "ops_portable", *SOURCES.get(machine, ()), "tests/compare_ops"):
        target = folder / f"{Path(source).name}.o"
        command = [compiler, *flags_of(source), *definitions, "-c", str(CSRC / f"{source}.cpp"), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        objects.append(str(target))
    program = folder / "compare_ops"
    subprocess.run([compiler, *link_flags, *objects, "-o", str(program)], check=True)
    return program


def run(*command: str) -> dict[str, int]:
    """Run the program; return how many kernels of each available instruction set agreed."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAILED" not in result.stdout
    return {
        isa: len(re.findall(rf"^{isa} .+: ok", result.stdout, re.MULTILINE))
        for isa in re.findall(r"^available: (\w+)$", result.stdout, re.MULTILINE)
    }


def test_here(tmp_path: Path) -> None:
    name = os.environ.get("CXX", "c++")
    compiler = shutil.which(name)
    if compiler is None:
        pytest.skip(f"no C++ compiler: {name} is not installed (CXX chooses another)")
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    agreed = run(str(build(compiler, machine, tmp_path)))
    assert agreed == {isa: KERNELS if isa != "portable" else 0 for isa in available_isas()}


@pytest.fixture(scope="module")
def aarch64_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    return build("aarch64-linux-gnu-g++", "aarch64", tmp_path_factory.mktemp("aarch64"), "-static")


@pytest.mark.parametrize("cpu", ["cortex-a76", "max"])
def test_aarch64(aarch64_program: Path, cpu: str) -> None:
    assert run("qemu-aarch64", "-cpu", cpu, str(aarch64_program)) == {"neon": KERNELS, "portable": 0}


def test_aarch64_without_dot_product(aarch64_program: Path) -> None:
    assert run("qemu-aarch64", "-cpu", "cortex-a53", str(aarch64_program)) == {"portable": 0}
