"""Where the paths of the kernel lie is read rightly from a listing of its instructions."""

from __future__ import annotations

import shutil

import code_layout
import pytest

KERNEL = "_ZN8jax_topk10TopKKernelINS_7Float32ELi0ELb{}EEEvNS_8TopKArgsE"
CALLS = {2: "resident", 3: "streamed", 4: "few turns"}


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


def test_calls_are_found_by_line():
    source = (
        "// SelectResidentRow<T>(cta) is not called here\n"
        "__device__ bool SelectStreamedRow<T, Deal>(Cta& cta);\n"
        "    SelectShortRow<T, kMiddleTurns<T>>(cta, args, window, output);\n"
        "  if (SelectStreamedRow<T, Deal>(cta, args)) return;\n"
        "  CompleteStreamedRow<T, Deal>(cta, args);\n"
    )
    calls = {3: "middle turns", 4: "streamed", 5: "streamed, rare"}
    assert code_layout.calls_by_line(source) == calls


def test_the_kernel_calls_every_path_once():
    calls = code_layout.calls_by_line(
        (code_layout.ROOT / "ffi" / "cuda" / code_layout.CALLER).read_text()
    )
    assert sorted(calls.values()) == sorted(code_layout.PATHS)


def test_paths_in_front_and_behind():
    window = code_layout.WINDOW
    resident, streamed, few = ([("kernel.cuh", line)] for line in (2, 3, 4))
    inner = [("block.cuh", 2), *resident]
    lines = [
        *listing(1, (0x10, resident), (0x20, inner), (window - 16, resident), (window, resident)),
        *listing(0, (0x30, few), (window + 16, streamed), (window + 32, streamed)),
    ]
    found = code_layout.extents(lines, CALLS)
    of_clusters = found["clusters"]["resident"]
    assert (of_clusters.size, of_clusters.in_window, of_clusters.begin) == (64, 48, 0x10)
    alone = found["one CTA per row"]
    assert (alone["streamed"].size, alone["streamed"].in_window) == (32, 0)
    assert (alone["all"].size, alone["all"].in_window) == (48, 16)
    assert found["clusters"]["few turns"].begin is None
    assert "clusters         resident               0x10" in code_layout.table(found)

    # A path that is not there at all was not compiled, or is called otherwise now.
    sentences = code_layout.misplaced(found)
    assert [sentence.split(":")[0] for sentence in sentences] == [
        "few turns of the kernel for clusters",
        "streamed of the kernel for clusters",
        "middle turns of the kernel for one CTA per row",
        "streamed of the kernel for one CTA per row",
    ]
    assert "0 of 32 bytes lie in the first 64 KB, and 25% should" in sentences[-1]


def test_tools_that_are_not_there(capsys):
    with pytest.raises(SystemExit):
        code_layout.main(["--nvcc", "/nowhere/nvcc"])
    assert "/nowhere/nvcc was not found; pass its path as --nvcc" in capsys.readouterr().err


@pytest.mark.skipif(
    not (shutil.which("nvcc") and shutil.which("nvdisasm")), reason="needs nvcc and nvdisasm"
)
def test_ordinary_rows_lie_in_front():
    assert code_layout.main(["--check"]) == 0
