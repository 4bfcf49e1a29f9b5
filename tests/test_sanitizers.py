"""The C++ of the CPU target under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

`ffi/tools/check_cpu.cc` runs it without XLA on hostile rows and windows, on busy pools, with many
callers at once, with every allocation failing once, and at offsets beyond 2^32 elements, and
compares every result with a sort. The tests are skipped only where the compiler cannot link a
sanitizer; in CI (the environment variable `CI`, or `JAX_TOPK_REQUIRE_SANITIZERS=1`) that fails.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import platform
import re
import shutil
import subprocess

import pytest

FFI = pathlib.Path(__file__).parents[1] / "ffi"
SOURCES = [
    FFI / "tools" / "check_cpu.cc",
    *(path for path in sorted((FFI / "cpu").glob("*.cc")) if path.name != "binding.cc"),
]
FLAGS = {
    "address,undefined": ["-fno-sanitize-recover=all"],
    "thread": [],
}
# The processor's own options of each file, as ffi/CMakeLists.txt gives them.
AVX2 = ["-mavx2", "-mbmi", "-mbmi2", "-mpopcnt"]
REQUIRED = any(
    os.environ.get(name, "0").lower() not in ("", "0", "false")
    for name in ("CI", "JAX_TOPK_REQUIRE_SANITIZERS")
)

# A program with the fault that each sanitizer is for: it must end the process.
FAULTS = {
    "address": (
        "int main(int n, char**) { int* volatile p = new int[4]; volatile int v = p[3 + n];"
        " delete[] p; return v & 0; }"
    ),
    "undefined": "int main(int n, char**) { volatile int i = 2147483647; i = i + n; return 0; }",
    "thread": (
        "#include <thread>\nint x; int main() { std::thread t([] { x = 1; }); x = 2; t.join(); }"
    ),
}


def compile_with(kind: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["g++", "-std=c++17", "-O1", "-g", f"-fsanitize={kind}", *FLAGS.get(kind, ())]
        + ["-Wall", "-Wextra", "-Wno-unused-parameter", "-pthread", "-I", str(FFI)]
        + [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def need(kind: str, folder: pathlib.Path) -> None:
    """Skips, or in CI fails, where the compiler lacks a sanitizer."""
    problem = None
    if shutil.which("g++") is None:
        problem = "g++ is not installed"
    else:
        source = folder / "empty.cc"
        source.write_text("int main() {}\n")
        result = compile_with(kind, source, "-o", folder / "empty")
        if result.returncode != 0:
            problem = f"g++ cannot link -fsanitize={kind}: {result.stderr.strip()[:300]}"
    if problem is None:
        return
    if REQUIRED:
        pytest.fail(f"{problem}; install the compiler's sanitizer libraries")
    pytest.skip(problem)


def run(program: pathlib.Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    options = {
        "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    return subprocess.run(
        [str(program), *arguments],
        env={**os.environ, **options, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_the_sanitizers_find_what_they_are_for(tmp_path, fault):
    kind = "thread" if fault == "thread" else "address,undefined"
    need(kind, tmp_path)
    source = tmp_path / "fault.cc"
    source.write_text(FAULTS[fault])
    result = compile_with(kind, source, "-o", tmp_path / "fault")
    assert result.returncode == 0, result.stderr
    result = run(tmp_path / "fault")
    assert result.returncode != 0
    expected = {
        "address": "heap-buffer-overflow",
        "undefined": "signed integer overflow",
        "thread": "data race",
    }
    assert expected[fault] in result.stderr


@pytest.mark.parametrize("kind", FLAGS)
def test_the_cpu_target_is_clean(tmp_path, kind):
    need(kind, tmp_path)

    def compile_file(path: pathlib.Path) -> pathlib.Path:
        is_avx2 = "avx2" in path.name and platform.machine() in ("x86_64", "AMD64")
        target = tmp_path / f"{path.stem}.o"
        result = compile_with(kind, *(AVX2 if is_avx2 else ()), "-c", path, "-o", target)
        assert result.returncode == 0, result.stderr
        assert result.stderr == "", "the compiler warns"
        return target

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_file, SOURCES))
    program = tmp_path / "check_cpu"
    result = compile_with(kind, *objects, "-o", program)
    assert result.returncode == 0, result.stderr
    # Both tables of vector kernels; threads do not care which.
    for isa, num_cases in (("", 30),) if kind == "thread" else (("", 120), ("baseline", 20)):
        result = run(program, "--cases", str(num_cases), JAX_TOPK_CPU_ISA=isa)
        assert result.returncode == 0, result.stdout + result.stderr[-8000:]
        match = re.search(r"(\d+) calls, 0 wrong rows", result.stdout)
        assert match is not None, result.stdout
        assert int(match[1]) > 2 * num_cases
