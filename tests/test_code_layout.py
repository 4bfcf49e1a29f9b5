"""Where the paths of the kernel lie is read rightly from a listing of its instructions."""

from __future__ import annotations

import shutil

import code_layout
import pytest

KERNEL = "_ZN8jax_topk10TopKKernelINS_7Float32ELi0ELb{}EEEvNS_8TopKArgsE"
FUNCTIONS = {
    "kernel.cuh": ["", "SelectResidentRow", "SelectStreamedRow", "SelectShortRow", "SelectRow"],
    "block.cuh": ["BlockScan"],
}


def listing(kernel: int, *chains: tuple[int, list[tuple[str, int]]]) -> list[str]:
    """As nvdisasm prints: of every instruction its address and places, the innermost first."""
    lines = [f".text.{KERNEL.format(kernel)}:"]
    for address, places in chains:
        for i, (file, line) in enumerate(places):
            text = f'\t//## File "/ffi/cuda/{file}", line {line}'
            if i + 1 < len(places):
                text += f' inlined at "/ffi/cuda/{places[i + 1][0]}", line {places[i + 1][1]}'
            lines.append(text)
        lines.append(f"        /*{address:04x}*/                   NOP ;")
    return lines


def test_every_instruction_has_its_address_and_places():
    lines = listing(
        1, (0, [("kernel.cuh", 5)]), (0x10, [("block.cuh", 1), ("kernel.cuh", 2)]), (0x20, [])
    )
    lines.insert(1, "\t.align\t128")
    kernel = KERNEL.format(1)
    inner = (("block.cuh", 1), ("kernel.cuh", 2))
    assert list(code_layout.parse_listing(lines)) == [
        code_layout.Instruction(kernel, 0, (("kernel.cuh", 5),)),
        code_layout.Instruction(kernel, 0x10, tuple(inner)),
        code_layout.Instruction(kernel, 0x20, tuple(inner)),  # of the same line as the one before
    ]


def test_functions_are_found_by_line():
    source = (
        "// __device__ void NotThis(\n"
        "template <typename T>\n"
        "__device__ __forceinline__ uint32_t First(const Cta& cta,\n"
        "                                         uint32_t value) {\n"
        "  return Other(value);\n"
        "}\n"
        "__device__ __noinline__ void Second() {}\n"
    )
    assert code_layout.functions_by_line(source) == ["", "", *["First"] * 4, "Second"]


def test_paths_in_front_and_behind():
    window = code_layout.WINDOW
    resident, streamed, short = ([("kernel.cuh", line)] for line in (2, 3, 4))
    inner = [("block.cuh", 1), *resident]
    lines = [
        *listing(1, (0x10, resident), (0x20, inner), (window - 16, resident), (window, resident)),
        *listing(0, (0x30, short), (window + 16, streamed), (window + 32, streamed)),
    ]
    found = code_layout.extents(lines, FUNCTIONS)
    of_clusters = found["clusters"]["SelectResidentRow"]
    assert (of_clusters.size, of_clusters.in_window, of_clusters.begin) == (64, 48, 0x10)
    alone = found["one CTA per row"]
    assert (alone["SelectStreamedRow"].size, alone["SelectStreamedRow"].in_window) == (32, 0)
    assert (alone["all"].size, alone["all"].in_window) == (48, 16)
    assert found["clusters"]["SelectShortRow"].begin is None
    assert "clusters         SelectResidentRow      0x10" in code_layout.table(found)

    (sentence,) = code_layout.misplaced(found)
    assert "SelectStreamedRow of the kernel for one CTA per row: 0 of 32 bytes" in sentence
    # A path that is not there at all was not compiled, or is called otherwise now.
    assert len(code_layout.misplaced(code_layout.extents([], FUNCTIONS))) == 2


def test_tools_that_are_not_there(capsys):
    with pytest.raises(SystemExit):
        code_layout.main(["--nvcc", "/nowhere/nvcc"])
    assert "/nowhere/nvcc was not found; pass its path as --nvcc" in capsys.readouterr().err


@pytest.mark.skipif(
    not (shutil.which("nvcc") and shutil.which("nvdisasm")), reason="needs nvcc and nvdisasm"
)
def test_long_rows_lie_in_front():
    assert code_layout.main(["--check"]) == 0
