"""Every barrier and every wait of the kernel, removed in turn: found in the sources, not listed.

A barrier that nothing needs is a cost, and one that only a comment defends will be removed by
somebody. So a test has to fail without each, or `REDUNDANT` says why nothing can go wrong.
"""

from __future__ import annotations

import pathlib
import re

from .table import EMULATED, Mutant

_WAIT = re.compile(
    r"^ *((?:if \([^;]*\) )?(?:SyncThreads\(\)|BarrierWait\([^;]*\)|ClusterWait\(\));)"
    r"(?: *// (.*))?$"
)

_TESTS = (
    "test_no_schedule_changes_the_result",
    "test_sorted_rows_with_a_list",
    "test_a_sample_that_misleads",
    "test_hostile_rows",
    "test_plateau_in_a_list_without_room_for_k_ties",
    "test_streamed_parts_wait_for_barriers_of_their_peers",
    "test_the_best_of_a_streamed_row_may_be_written_last",
    "test_large_values_in_few_ctas",
    "test_winners_may_arrive_while_the_first_cta_sends_its_open_keys",
    "test_sorted_rows_with_many_ties",
    "test_sorted_rows_with_crowded_bins",
    "test_sorted_keys_that_differ_between_warps_alone",
    "test_a_crowd_that_is_narrowed_twice",
    "test_candidates_with_many_ties",
    "test_candidates_that_meet_in_a_bin",
    "test_open_elements_of_a_short_row_of_16_bit_values",
    "test_open_elements_of_the_widest_bins",
)

# Part of a wait's line or of its comment -> why nothing can go wrong without it.
REDUNDANT: dict[str, str] = {
    "the lists' last reads before they are begun anew": "what a late warp reads of the old lists is"
    " not used, and it meets the others at the barrier behind the reset",
    "the cleared histogram before the guess": "CTAs that share a row have met at the cluster's"
    " barrier, and one alone would guess worse, but verifies its guess: a race all the same, which"
    " racecheck would report",
    "counts of pairs before their sums": "a sum that is too small says that a bin overflowed, and"
    " the row is sorted by other ways, in the end by one without counts: slow, and a race",
    "the pairs before their reads, and the cleared histogram": "a thread reads the pairs that it"
    " wrote itself, but for those behind the last, whose copy of it counts for nothing, and another"
    " barrier comes before the first count: a race all the same, as above",
}


def mutants(root: pathlib.Path) -> tuple[Mutant, ...]:
    """One mutant for each wait in `ffi/cuda/*.cuh`, named by file and number."""
    found = []
    for path in sorted((root / "ffi" / "cuda").glob("*.cuh")):
        if path.name == "ptx.cuh":  # where they are defined
            continue
        text = path.read_text()
        lines = text.splitlines(keepends=True)
        places = [number for number, line in enumerate(lines) if _WAIT.match(line)]
        for index, number in enumerate(places, 1):
            match = _WAIT.match(lines[number])
            assert match is not None
            if any(part in lines[number] for part in REDUNDANT):
                continue
            wait, comment = match.group(1), match.group(2) or match.group(1)
            first = number
            while text.count("".join(lines[first : number + 1])) > 1:
                first -= 1  # with the lines in front of it, until there is only one such place
            old = "".join(lines[first : number + 1])
            new = "".join(lines[first:number]) + lines[number].replace(wait, "(void)0;")
            found.append(
                Mutant(
                    f"no_wait_in_{path.stem}_{index}",
                    EMULATED,
                    f"ffi/cuda/{path.name}",
                    old,
                    new,
                    f"A missing wait: {comment}",
                    tuple(f"tests/test_kernel_emulated.py::{test}" for test in _TESTS),
                )
            )
    return tuple(found)


def _all_waits(root: pathlib.Path) -> list[str]:
    return [
        line
        for path in (root / "ffi" / "cuda").glob("*.cuh")
        if path.name != "ptx.cuh"
        for line in path.read_text().splitlines()
        if _WAIT.match(line)
    ]


def unused_reasons(root: pathlib.Path) -> list[str]:
    """Entries of `REDUNDANT` that no wait matches any more."""
    return [part for part in REDUNDANT if not any(part in line for line in _all_waits(root))]


def num_redundant(root: pathlib.Path) -> int:
    """How many waits `REDUNDANT` excuses."""
    return sum(any(part in line for part in REDUNDANT) for line in _all_waits(root))
