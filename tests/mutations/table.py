"""The defects that are planted, one at a time, and the tests that have to notice each.

`old` must occur exactly once in its file, so that the table cannot rot unnoticed: where the code
has changed, the run stops and names the anchor to repair. Anchors are single lines where that is
enough.
`why` says where the defect comes from: `peer` marks those that public top-k kernels have had.

A mutant that survives is a hole in the tests. It is closed there; a mutant leaves this table only
if it changes no result that the contract promises, and then it was none.
"""

from __future__ import annotations

import dataclasses

EMULATED, CPU, PYTHON, GPU = "emulated", "cpu", "python", "gpu"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One planted defect.

    Attributes:
        name: unique, for `--only`.
        target: what is built and run: `"emulated"` (the CUDA kernel's headers and the planner, on
            the CPU), `"cpu"` (the native module `_cpu`), `"python"` (nothing is built), or `"gpu"`
            (`ffi/tools/run_kernel.cu`, with nvcc).
        file: path from the root of the checkout.
        old: text that occurs exactly once in the file.
        new: text that replaces it.
        why: a sentence that says why somebody could write this.
        tests: what is run, as pytest takes it; for `"gpu"` the arguments of `run_kernel`.
    """

    name: str
    target: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]


def _tests(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{file}.py::{name}" for name in names)


def _emulated(*names: str) -> tuple[str, ...]:
    return _tests("test_kernel_emulated", *names)


SCHEDULES = "test_no_schedule_changes_the_result"
BOUNDARIES = "test_lengths_at_every_boundary"
HOSTILE = "test_hostile_rows"
PLATEAU = "test_plateau_in_a_list_without_room_for_k_ties"
FEW_CTAS = "test_large_values_in_few_ctas"

KERNEL = (
    # --- windows and addresses --------------------------------------------------------------------
    Mutant(
        "length_read_as_unsigned",
        EMULATED,
        "ffi/cuda/kernel.cuh",
        "min(max(raw_length, 0), width - start)",
        "static_cast<int32_t>(min(static_cast<uint32_t>(raw_length),\n"
        "                                static_cast<uint32_t>(width - start)))",
        "peer (vllm 51593): length -1 becomes 2^32 - 1, which is clamped to the whole row.",
        _emulated(BOUNDARIES),
    ),
    Mutant(
        "start_clamped_to_the_last_element",
        EMULATED,
        "ffi/cuda/kernel.cuh",
        "min(max(raw_start, 0), width)",
        "min(max(raw_start, 0), width - 1)",
        "As dynamic_slice clamps: a window that begins at the end of the row has one element.",
        _emulated("test_garbage_windows"),
    ),
    Mutant(
        "offset_of_a_row_in_32_bits",
        EMULATED,
        "ffi/cuda/row_window.cuh",
        "(row * args.width + start) * T::kBytes",
        "static_cast<int32_t>(row * args.width + start) * int64_t{T::kBytes}",
        "peer: `row * stride` in 32 bits, wrong from 2^31 elements on.",
        _emulated("test_an_operand_of_more_than_2_31_elements"),
    ),
    Mutant(
        "offset_of_an_aligned_row_in_32_bits",
        EMULATED,
        "ffi/cuda/kernel.cuh",
        "+ row * args.width * T::kBytes;",
        "+ static_cast<int32_t>(row * args.width) * int64_t{T::kBytes};",
        "The same where the window begins with its row.",
        _emulated("test_an_operand_of_more_than_2_31_elements"),
    ),
    Mutant(
        "vectors_that_leave_the_operand",
        EMULATED,
        "ffi/cuda/row_window.cuh",
        "window.leaves_operand = window.vectors < window.begin ||",
        "window.leaves_operand = false &&",
        "peer: vector loads past a row's end; at the end of the last row they leave the buffer.",
        _emulated("test_rows_off_vector_boundaries"),
    ),
    Mutant(
        "last_element_of_a_run",
        EMULATED,
        "ffi/cuda/row_window.cuh",
        "run.valid &= LowBits(window.length - run.position);",
        "run.valid &= LowBits(window.length - run.position + 1);",
        "peer: off by one at the end of the window, garbage beyond the length is read as data.",
        _emulated(BOUNDARIES),
    ),
    Mutant(
        "first_element_of_a_run",
        EMULATED,
        "ffi/cuda/row_window.cuh",
        "run.valid &= ~LowBits(-run.position);",
        "run.valid &= ~LowBits(-run.position - 1);",
        "Off by one at the start of a window that does not begin at a vector.",
        _emulated("test_poison_beside_the_window"),
    ),
    Mutant(
        "edge_of_the_last_vector",
        EMULATED,
        "ffi/cuda/row_window.cuh",
        "index == window.num_vectors - 1",
        "index == window.num_vectors",
        "Off by one: the exact histograms count what lies behind the window.",
        _emulated("test_poison_beside_the_window"),
    ),
    Mutant(
        "copied_indices_off_by_one",
        EMULATED,
        "ffi/cuda/write_row.cuh",
        "i + 3 < length ? i + 3 : -1",
        "i + 3 <= length ? i + 3 : -1",
        "Off by one in the last of four lanes of a wide store.",
        _emulated("test_rows_of_at_most_k_elements", BOUNDARIES),
    ),
    # --- what is kept, and the proof --------------------------------------------------------------
    Mutant(
        "overflow_of_the_list_not_noticed",
        EMULATED,
        "ffi/cuda/kernel.cuh",
        "k <= row.certain + row.open && row.certain + kept <= capacity;",
        "k <= row.certain + row.open;",
        "peer (vllm 51782, 52149, SGLang v2): a full candidate buffer drops elements silently.",
        _emulated(HOSTILE, PLATEAU, SCHEDULES),
    ),
    Mutant(
        "lower_guess_not_verified",
        EMULATED,
        "ffi/cuda/kernel.cuh",
        "return row.certain < k && k <= row.certain + row.open &&",
        "return row.certain < k &&",
        "The sample is trusted: fewer than k elements reach the bracket.",
        _emulated("test_a_sample_that_promises_too_much"),
    ),
    Mutant(
        "upper_guess_not_verified",
        EMULATED,
        "ffi/cuda/kernel.cuh",
        "return row.certain < k && k",
        "return k",
        "The other side of the same: more than k elements are taken for certain winners.",
        _emulated("test_a_sample_that_misleads", HOSTILE),
    ),
    Mutant(
        "stale_histogram",
        EMULATED,
        "ffi/cuda/block.cuh",
        "    own[first ^ 1] = make_uint4(0, 0, 0, 0);\n",
        "",
        "peer (vllm 49139): a histogram is used again with the counts of the time before.",
        _emulated(HOSTILE, SCHEDULES),
    ),
    Mutant(
        "histogram_never_cleared",
        EMULATED,
        "ffi/cuda/kernel.cuh",
        "  ClearBins(cta);\n",
        "",
        "Shared memory is not zero at the start, although it often is under a debugger.",
        _emulated(SCHEDULES),
    ),
    Mutant(
        "what_failed_is_learnt_one_too_high",
        EMULATED,
        "ffi/cuda/narrow_bracket.cuh",
        "return {{0, guess.lowest - 1}, reached, length - reached};",
        "return {{0, guess.lowest}, reached, length - reached};",
        "Off by one: the elements at the lowest guessed key are counted twice.",
        _emulated("test_a_sample_that_promises_too_much"),
    ),
    # --- ties and order ---------------------------------------------------------------------------
    Mutant(
        "ties_to_the_highest_index",
        EMULATED,
        "ffi/cuda/filter_part.cuh",
        "bits &= ~(0x80000000u >> __clz(bits));",
        "bits &= bits - 1;",
        "The wrong end of a mask: of equal elements the last ones win.",
        _emulated("test_ties_spread_over_ctas", PLATEAU),
    ),
    Mutant(
        "ties_of_other_ctas_forgotten",
        EMULATED,
        "ffi/cuda/write_row.cuh",
        "return num_ties > equal_before ? num_ties - equal_before : 0;",
        "return num_ties > equal_before ? num_ties : 0;",
        "Every CTA of the row takes as many ties as the row needs, and they overwrite each other.",
        _emulated("test_ties_spread_over_ctas"),
    ),
    Mutant(
        "ties_of_other_warps_forgotten",
        EMULATED,
        "ffi/cuda/short_row.cuh",
        "wanted > places.of[turn] ? wanted - places.of[turn] : 0;",
        "wanted;",
        "Every thread of a short row takes as many ties as the row needs.",
        _emulated(PLATEAU, BOUNDARIES, HOSTILE),
    ),
    Mutant(
        "turns_of_a_warp_exchanged",
        EMULATED,
        "ffi/cuda/short_row.cuh",
        "word >> (8 * i) & 0x00ff00ffu",
        "word >> (8 * (1 - i)) & 0x00ff00ffu",
        "Even and odd turns are mixed up: selected elements get each other's places.",
        _emulated(HOSTILE),
    ),
    Mutant(
        "last_vector_of_a_short_row_counted_whole",
        EMULATED,
        "ffi/cuda/short_row.cuh",
        "if (tail != 0) {",
        "if (false) {",
        "What lies behind the window in its last vector is taken for a part of the row.",
        _emulated("test_poison_beside_the_window", BOUNDARIES),
    ),
    Mutant(
        "first_vector_of_a_short_row_counted_whole",
        EMULATED,
        "ffi/cuda/short_row.cuh",
        "if (Unlikely(window.skew != 0) && cta.thread == 0) {",
        "if (false) {",
        "What lies before the window in its first vector is taken for a part of the row.",
        _emulated("test_poison_beside_the_window", HOSTILE),
    ),
    Mutant(
        "padding_of_a_short_row_takes_part_as_a_tie",
        EMULATED,
        "ffi/cuda/short_row.cuh",
        "ties.words[word] &= valid.words[word];",
        "(void)valid;",
        "In a row of lowest keys, what stands before the window is selected as a tie.",
        _emulated("test_lowest_key_competes_with_what_is_beside_the_window"),
    ),
    Mutant(
        "elements_above_a_crowded_bin_forgotten",
        EMULATED,
        "ffi/cuda/short_row.cuh",
        "    estimate.above += above;\n",
        "",
        "Narrowing a crowded bin loses the elements above it, and the rank is taken twice.",
        _emulated(SCHEDULES, HOSTILE),
    ),
    Mutant(
        "pivot_counted_as_greater",
        EMULATED,
        "ffi/cuda/find_pivot.cuh",
        "greater_before += (keys.x > bracket.highest) + (keys.y > bracket.highest) +",
        "greater_before += (keys.x >= bracket.highest) + (keys.y > bracket.highest) +",
        "Off by one key: an element equal to the bracket's end moves the outputs of later CTAs.",
        _emulated("test_ties_spread_over_ctas", "test_lowest_key_competes_with_padding", HOSTILE),
    ),
    Mutant(
        "rank_of_the_pivot",
        EMULATED,
        "ffi/cuda/find_pivot.cuh",
        "if (has_sum && greater < rank && rank <= ahead >> 16) {",
        "if (has_sum && greater < rank && rank < ahead >> 16) {",
        "Off by one in a rank that counts from 1: nobody is the pivot without spare ties.",
        _emulated(SCHEDULES),
    ),
    Mutant(
        "rank_of_an_element_by_its_owner",
        EMULATED,
        "ffi/cuda/short_row.cuh",
        "if (!Unlikely(has_ties)) return ahead.greater < rank;",
        "if (!Unlikely(has_ties)) return ahead.greater <= rank;",
        "Off by one where the owners of few open elements decide alone: k + 1 are selected.",
        _emulated(HOSTILE, SCHEDULES),
    ),
    Mutant(
        "ties_of_owners_in_any_order",
        EMULATED,
        "ffi/cuda/short_row.cuh",
        "(keys[i] == key && positions[i] < position)",
        "(keys[i] == key && positions[i] > position)",
        "Of few equal elements at the threshold, the last positions are selected.",
        _emulated("test_few_ties_at_the_threshold_of_a_short_row"),
    ),
    Mutant(
        "lowest_key_of_finalists_reached_by_none",
        EMULATED,
        "ffi/cuda/find_pivot.cuh",
        "    if (key == 0) of_share.reached = count / kThreadsPerCandidate;\n",
        "",
        "No sum carries beside the lowest key: no element has its rank.",
        _emulated("test_few_elements_of_the_lowest_key"),
    ),
    Mutant(
        "padding_taken_for_the_lowest_key",
        EMULATED,
        "ffi/cuda/kernel.cuh",
        "if (pivot.key == 0) selection.equal_before",
        "if (false) selection.equal_before",
        "Candidates are padded with key 0, which -NaN with all bits set has too.",
        _emulated("test_lowest_key_competes_with_padding"),
    ),
    Mutant(
        "sorted_ties_by_descending_index",
        EMULATED,
        "ffi/cuda/sort_pairs.cuh",
        "(uint64_t{a.y} << 32 | a.x) < (uint64_t{b.y} << 32 | b.x)",
        "(uint64_t{a.y} << 32 | b.x) < (uint64_t{b.y} << 32 | a.x)",
        "The position sorts the wrong way round among equal keys.",
        _emulated(SCHEDULES, "test_ties_spread_over_ctas"),
    ),
    Mutant(
        "pad_one_too_late",
        EMULATED,
        "ffi/cuda/write_row.cuh",
        "int32_t place = first + ThreadIndex(); place < output.k",
        "int32_t place = first + 1 + ThreadIndex(); place < output.k",
        "Off by one where the padding begins: one result is never written.",
        _emulated("test_rows_of_at_most_k_elements"),
    ),
    # --- pipelines and exchanges; missing waits are in waits.py -----------------------------------
    Mutant(
        "one_copy_group_too_many_in_flight",
        EMULATED,
        "ffi/cuda/stream_part.cuh",
        "CopyAsyncWait<1>();",
        "CopyAsyncWait<2>();",
        "Off by one in the number of stages: the tile is read before it has arrived.",
        _emulated(SCHEDULES),
    ),
    Mutant(
        "one_barrier_for_both_exchanges",
        EMULATED,
        "ffi/cuda/exchange.cuh",
        "BarrierWait(&cta.header->barriers[kCountsBarrier + attempt], 0);",
        "BarrierWait(&cta.header->barriers[kCountsBarrier], 0);",
        "The second exchange waits for the first one, which is over.",
        _emulated(SCHEDULES, "test_a_sample_that_misleads"),
    ),
    Mutant(
        "sums_sent_before_all_segments_are_read",
        EMULATED,
        "ffi/cuda/exchange.cuh",
        """  for (int bin = cta.thread; bin < own_count; bin += kThreads) {
    uint4 sum = make_uint4(0, 0, 0, 0);
    for (int source = 0; source < cta.num_active; ++source) {
      const uint4 part = received[source * each + bin];
      sum = make_uint4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    }
    for (int peer = 0; peer < cta.num_active; ++peer) {""",
        """  for (int i = cta.thread; i < own_count * cta.num_active; i += kThreads) {
    const int bin = i % own_count;
    uint4 sum = make_uint4(0, 0, 0, 0);
    for (int source = 0; source < cta.num_active; ++source) {
      const uint4 part = received[source * each + bin];
      sum = make_uint4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    }
    for (int peer = i / own_count, last = peer; peer == last; ++peer) {""",
        "Sums for one peer are sent while those for another one are not yet made; it was so once.",
        _emulated("test_a_peer_may_be_a_round_of_histograms_ahead"),
    ),
    Mutant(
        "winners_sent_while_open_keys_are_sent",
        EMULATED,
        "ffi/cuda/kernel.cuh",
        "GatherCandidates(cta, mine, row, ctas, output.is_sorted);",
        "GatherCandidates(cta, mine, row, ctas, false);",
        "The first CTA's own open keys are overwritten before all peers have them; it was so once.",
        _emulated("test_winners_may_arrive_while_the_first_cta_sends_its_open_keys"),
    ),
    Mutant(
        "more_peers_than_warps",
        EMULATED,
        "ffi/cuda/exchange.cuh",
        "turn < num_peers; turn += kWarps)",
        "turn < num_peers; turn += num_peers)",
        "A warp serves one peer only: a cluster of 16 has more peers than a CTA has warps.",
        _emulated(HOSTILE),
    ),
    Mutant(
        "last_cta_with_open_keys_taken_for_the_first",
        EMULATED,
        "ffi/cuda/kernel.cuh",
        "return CtaRange{__ffs(row.with_open) - 1, 31 - __clz(row.with_open)};",
        "return CtaRange{__ffs(row.with_open) - 1, __ffs(row.with_open) - 1};",
        "Only the first CTA that has open keys searches them.",
        _emulated(FEW_CTAS, SCHEDULES),
    ),
    Mutant(
        "cta_behind_the_open_keys_counts_none_of_them",
        EMULATED,
        "ffi/cuda/kernel.cuh",
        "if (cta.rank > ctas.last) selection.greater_before += rank;",
        "",
        "A CTA that takes no part in the search forgets what is selected before it.",
        _emulated(FEW_CTAS),
    ),
    Mutant(
        "winners_sent_while_the_first_cta_searches",
        EMULATED,
        "ffi/cuda/kernel.cuh",
        "if (!Unlikely(row.with_open != all) || is_sorted)",
        "if (!Unlikely(row.with_open != all))",
        "Of a sorted row, pairs overwrite open keys that the first CTA still reads.",
        _emulated(FEW_CTAS),
    ),
    Mutant(
        "kept_above_a_plateau_counted_as_certain",
        EMULATED,
        "ffi/cuda/kernel.cuh",
        "row = SumRecords(cta, PartCounts{0, record.certain});",
        "row = SumRecords(cta, record);",
        "The k-th key lies above a plateau, and the counts still speak of the plateau.",
        _emulated("test_plateau_below_the_threshold_or_across_it"),
    ),
    Mutant(
        "listed_once_more_behind_the_ties",
        EMULATED,
        "ffi/cuda/write_row.cuh",
        "for (; Unlikely(place < num_done) && selected != 0; ++place) selected &= selected - 1;",
        "",
        "What was met while ties were read again is written a second time.",
        _emulated(PLATEAU, "test_plateau_below_the_threshold_or_across_it"),
    ),
    Mutant(
        "last_key_of_a_sort_without_bins",
        EMULATED,
        "ffi/cuda/sort_pairs.cuh",
        "static_cast<float>(range) + static_cast<float>(1u << step)",
        "static_cast<float>(range) + 1.0f",
        "Ties of the lowest key are spread over bins behind the last: so at first.",
        _emulated("test_bins_of_a_sort_keep_the_order"),
    ),
    Mutant(
        "numbers_of_several_keys_compared",
        EMULATED,
        "ffi/cuda/sort_pairs.cuh",
        "margin == 0 || (beyond != nearest && beyond != -nearest)",
        "true",
        "Small values that count as one key are put in the order of their positions.",
        _emulated("test_bins_of_a_sort_keep_the_order"),
    ),
    Mutant(
        "keys_of_a_sort_spread_by_value_and_number",
        EMULATED,
        "ffi/cuda/sort_pairs.cuh",
        "if (margin == 0 || has_extremes || per_key >= 2) return;",
        "if (margin == 0 || per_key >= 2) return;",
        "Without an infinity the others could be spread by value, but behind its bins.",
        _emulated("test_bins_of_a_sort_keep_the_order"),
    ),
    Mutant(
        "overflow_of_a_bin_unnoticed",
        EMULATED,
        "ffi/cuda/sort_pairs.cuh",
        "most_before == kMaxPerBin",
        "most_before > kMaxPerBin",
        "Four bits count to fifteen, and carry into the next bin at the sixteenth.",
        _emulated("test_sorted_rows_with_crowded_bins"),
    ),
    Mutant(
        "crowded_bin_cut_short",
        EMULATED,
        "ffi/cuda/sort_pairs.cuh",
        "if (Unlikely(count > 4)) {",
        "if (Unlikely(count > 5)) {",
        "Five pairs in a network of four.",
        _emulated("test_sorted_rows_with_crowded_bins"),
    ),
    Mutant(
        "network_of_four_incomplete",
        EMULATED,
        "ffi/cuda/sort_pairs.cuh",
        "  Exchange(&of[1], &of[2]);\n",
        "",
        "Four exchanges look like enough for four pairs.",
        _emulated("test_sorted_rows_with_crowded_bins"),
    ),
    Mutant(
        "crowded_bin_listed_by_its_third",
        EMULATED,
        "ffi/cuda/sort_pairs.cuh",
        "if (before == 1) *next",
        "if (before == 2) *next",
        "Bins of two stay in the order in which their pairs came.",
        _emulated("test_sorted_rows_with_crowded_bins"),
    ),
    Mutant(
        "lists_of_crowded_bins_overlap",
        EMULATED,
        "ffi/cuda/sort_pairs.cuh",
        "space.crowded + kPairTurns * 32 * cta.warp",
        "space.crowded + 32 * cta.warp",
        "A list has room for one turn of its warp.",
        _emulated("test_sorted_rows_with_crowded_bins"),
    ),
    Mutant(
        "pairs_sent_off_their_vectors",
        EMULATED,
        "ffi/cuda/write_row.cuh",
        "head(first_place % 2)",
        "head(0)",
        "Pairs of 8 bytes go by vectors of 16: an odd place is in the middle of one.",
        _emulated(SCHEDULES),
    ),
    Mutant(
        "first_pair_of_a_vector_forgotten",
        EMULATED,
        "ffi/cuda/write_row.cuh",
        "} else if (i + 1 < end) {",
        "} else if (i + 2 < end) {",
        "A CTA that has one pair for the second half of a vector does not send it.",
        _emulated("test_sorted_rows_of_one_winner_per_cta"),
    ),
    Mutant(
        "open_keys_behind_those_of_the_first_attempt",
        EMULATED,
        "ffi/cuda/kernel.cuh",
        "    if (cta.thread == 0) cta.header->num_own = 0;\n",
        "",
        "The exact path collects open keys behind those of the guess that failed.",
        _emulated(SCHEDULES, HOSTILE),
    ),
    Mutant(
        "places_left_out_by_the_copy_alone",
        EMULATED,
        "ffi/cuda/kernel.cuh",
        "part.last, per_thread, is_spaced, cta.tiles),",
        "part.last, per_thread, false, cta.tiles),",
        "The copy leaves out every ninth place, and the runs do not know.",
        _emulated("test_parts_of_every_number_of_vectors_per_thread"),
    ),
    Mutant(
        "long_part_in_the_room_of_one_tile",
        EMULATED,
        "ffi/cuda/kernel.cuh",
        "(args.num_stages > 1 && each",
        "(args.num_stages > 0 && each",
        "Twelve thousand elements lie over the open keys where one tile is in flight.",
        _emulated("test_parts_of_every_number_of_vectors_per_thread"),
    ),
    Mutant(
        "masks_of_a_long_run_cut_short",
        EMULATED,
        "ffi/cuda/filter_part.cuh",
        "} else if (per_thread <= 5 && ",
        "} else if (per_thread <= 6 && ",
        "Runs of six vectors are filtered by code for five.",
        _emulated("test_parts_of_every_number_of_vectors_per_thread"),
    ),
    Mutant(
        "padding_of_candidates_sent_as_it_is",
        EMULATED,
        "ffi/cuda/block.cuh",
        "if (place < num_padded) reinterpret_cast<uint32_t*>(cta.own)[place] = 0;",
        "",
        "Stale shared memory behind the last candidate becomes a candidate.",
        _emulated(SCHEDULES, HOSTILE),
    ),
)

PLANNER = (
    Mutant(
        "sort_buffer_without_room_for_its_padding",
        EMULATED,
        "ffi/smem_layout.h",
        "larger(list_capacity * 4, NextPowerOfTwo(k) * 8)",
        "larger(list_capacity * 4, k * 8)",
        "The bitonic sort pads to a power of two of pairs, here behind the end of shared memory.",
        _emulated("test_sorted_rows_with_many_ties"),
    ),
    Mutant(
        "clusters_counted_by_sms_alone",
        CPU,
        "ffi/plan.cc",
        "std::max(problem.rows, int64_t{1}) <= limits.resident_clusters[size - 1];",
        "problem.rows * size <= limits.num_sms;",
        "The CTAs of a cluster lie in one group of SMs, and other GPUs have smaller ones, or none.",
        _tests(
            "test_plan",
            "test_every_plan_fits_its_device",
            "test_clusters_leave_each_cta_an_sm",
        ),
    ),
    Mutant(
        "capacity_not_in_whole_vectors",
        CPU,
        "ffi/plan.cc",
        "static_cast<int>(AlignUp(problem.k + spare, 4))",
        "static_cast<int>(problem.k + spare)",
        "Candidates travel in vectors of four; an odd capacity misaligns what lies behind it.",
        _tests("test_plan", "test_capacities_are_whole_vectors"),
    ),
    Mutant(
        "shared_memory_of_the_sm_ignored",
        CPU,
        "ffi/plan.cc",
        "std::min(limits.smem_per_block_bytes, limits.smem_per_sm_bytes - kSmemReservedPerBlock)",
        "limits.smem_per_block_bytes",
        "What a block may ask for can exceed what an SM has left beside the runtime's own share.",
        _tests("test_plan", "test_the_runtime_keeps_a_share_of_an_sm"),
    ),
    Mutant(
        "more_ctas_than_a_grid_takes",
        CPU,
        "ffi/plan.cc",
        "if (problem.rows * cluster >= (int64_t{1} << 31)) {",
        "if (problem.rows >= (int64_t{1} << 32)) {",
        "A grid of 2^31 CTAs is refused at launch, in words that say nothing about rows.",
        _tests("test_plan", "test_what_cannot_be_planned_is_refused"),
    ),
    Mutant(
        "shape_of_lengths_not_checked",
        CPU,
        "ffi/handler_checks.h",
        "if (!IsBatchAnd(lengths.dimensions(), batch, nullptr)) {",
        "if (false) {",
        "A call past the Python checks reads lengths beyond their buffer.",
        _tests("test_native", "test_handlers_explain_wrong_calls"),
    ),
    Mutant(
        "k_beyond_the_row_not_checked",
        CPU,
        "ffi/handler_checks.h",
        "if (problem->k > problem->width) {",
        "if (false) {",
        "The same for k: more results than the row has elements.",
        _tests("test_native", "test_handlers_explain_wrong_calls"),
    ),
    Mutant(
        "type_of_values_not_checked",
        CPU,
        "ffi/handler_checks.h",
        "if (values->element_type() != operand.element_type()) {",
        "if (false) {",
        "Float32 values written into a buffer of bfloat16 are twice as long as it is.",
        _tests("test_native", "test_handlers_explain_wrong_calls"),
    ),
)

CPU_TARGET = (
    Mutant(
        "cpu_length_read_as_unsigned",
        CPU,
        "ffi/cpu/work_plan.cc",
        "std::clamp<int64_t>(length, 0, width - clamped_start)",
        "std::min<int64_t>(static_cast<uint32_t>(length), width - clamped_start)",
        "peer (vllm 51593): length -1 becomes the whole row.",
        _tests("test_contract", "test_windows_are_clamped"),
    ),
    Mutant(
        "cpu_offset_of_a_row_in_32_bits",
        CPU,
        "ffi/cpu/top_k.cc",
        "+ row * args_.problem.width + window.start",
        "+ static_cast<int32_t>(row * args_.problem.width) + window.start",
        "peer: `row * stride` in 32 bits, wrong from 2^31 elements on.",
        _tests("test_cpu_target", "test_an_operand_of_more_than_2_31_elements"),
    ),
    Mutant(
        "cpu_threshold_is_strict",
        CPU,
        "ffi/cpu/ordered_key.h",
        "static_cast<Signed>(static_cast<Signed>(u) - 1), is_smallest",
        "static_cast<Signed>(u), is_smallest",
        "`>` for `>=` in the scan: elements equal to the threshold are dropped. A guess that is too"
        " high is noticed, the threshold after a cut has to be right.",
        _tests("test_cpu_target", "test_the_threshold_after_a_cut_is_exact"),
    ),
    Mutant(
        "cpu_too_many_ties_kept",
        CPU,
        "ffi/cpu/candidates.cc",
        "(is_equal & (num_equal_left > 0))",
        "(is_equal & (num_equal_left >= 0))",
        "Off by one: one more element equal to the pivot is kept than fits.",
        _tests("test_contract", "test_ties_go_to_the_lowest_index", "test_hostile_rows"),
    ),
    Mutant(
        "cpu_guess_not_verified",
        CPU,
        "ffi/cpu/select_row.cc",
        "if (candidates.size < std::min(k, length)) {",
        "if (false) {",
        "The sample is trusted: where it promised too much, results are missing.",
        _tests("test_cpu_target", "test_a_guess_that_is_too_high_is_noticed"),
    ),
    Mutant(
        "cpu_guess_of_a_split_row_not_verified",
        CPU,
        "ffi/cpu/top_k.cc",
        "if (all.size < std::min(k_, length)) {",
        "if (false) {",
        "The same for a row that several threads share.",
        _tests("test_cpu_target", "test_a_guess_that_is_too_high_is_noticed"),
    ),
    Mutant(
        "cpu_threshold_after_a_cut",
        CPU,
        "ffi/cpu/select_row.cc",
        "threshold = pivot + 1;",
        "threshold = pivot + 2;",
        "Off by one key: the next better neighbour of the worst kept element is dropped.",
        _tests("test_cpu_target", "test_the_threshold_after_a_cut_is_exact"),
    ),
    Mutant(
        "cpu_elements_behind_the_end_of_a_block",
        CPU,
        "ffi/cpu/simd_kernels.h",
        "(Above(last, cut) ^ inversion) & is_real;",
        "(Above(last, cut) ^ inversion) & (is_real | (is_real + 1));",
        "Off by one in the mask of the last block: a zero behind the row takes part.",
        _tests("test_cpu_target", "test_zeros_behind_the_end_are_no_elements"),
    ),
    Mutant(
        "cpu_ties_in_rank_order",
        CPU,
        "ffi/cpu/simd_kernels.h",
        "((other == mine) & (j < lane))",
        "((other == mine) & (j > lane))",
        "Of equal elements inside one vector the last one comes first.",
        _tests("test_contract", "test_ties_go_to_the_lowest_index", "test_hostile_rows"),
    ),
    Mutant(
        "cpu_pad_one_too_late",
        CPU,
        "ffi/cpu/write_row.cc",
        "std::fill(results.indices + num_written, results.indices + results.k, -1);",
        "std::fill(results.indices + num_written + 1, results.indices + results.k, -1);",
        "Off by one where the padding begins: one index is never written.",
        _tests("test_contract", "test_windows_are_clamped", "test_padding_and_real_infinities"),
    ),
    Mutant(
        "cpu_parts_of_a_split_row",
        CPU,
        "ffi/cpu/top_k.cc",
        "split.PartBegin(part), split.PartBegin(part + 1), k_",
        "split.PartBegin(part), split.PartBegin(part + 1) - 1, k_",
        "Off by one at the border between two threads' parts: its last element is never seen.",
        _tests("test_cpu_target", "test_position_of_the_best_does_not_matter")
        + _tests("test_cpu_target", "test_a_row_alone_is_split"),
    ),
)

PYTHON_CODE = (
    Mutant(
        "batch_dimension_not_in_front",
        PYTHON,
        "jax_topk/_primitive.py",
        "return results, [0] * len(results)",
        "return results, [next(dim for dim in dims if dim is not None)] * len(results)",
        "The batch dimension of the results is said to be where that of the operand was.",
        _tests("test_transforms", "test_vmap_over_any_axis"),
    ),
    Mutant(
        "padding_inside_the_gradient",
        PYTHON,
        "jax_topk/_primitive.py",
        "jnp.where(indices < 0, indices, indices + offset)",
        "indices + offset",
        "-1 plus a start is an element in front of the window, which then gets a gradient.",
        _tests("test_transforms", "test_padding_has_no_gradient"),
    ),
    Mutant(
        "start_not_clamped_in_the_gradient",
        PYTHON,
        "jax_topk/_primitive.py",
        "offset = jnp.clip(starts, 0, width)[..., None]",
        "offset = starts[..., None]",
        "The forward pass clamps a negative start; a gradient that does not goes elsewhere.",
        _tests("test_transforms", "test_vjp_scatters_to_the_selected_elements"),
    ),
    Mutant(
        "indices_of_unused_values_lose_their_order",
        PYTHON,
        "jax_topk/_primitive.py",
        'if list(used) == [False, True] and not eqn.params["sorted"]:',
        "if list(used) == [False, True]:",
        "The faster form writes ascending indices; here the caller wants the order of values.",
        _tests("test_transforms", "test_unused_values_cost_nothing"),
    ),
    Mutant(
        "lengths_wrap_around",
        PYTHON,
        "jax_topk/api.py",
        "        counts = xp.clip(counts, counts.dtype.type(low), counts.dtype.type(high))\n",
        "        pass\n",
        "A cast for a clamp: a length of 2^32 + 1 becomes 1.",
        _tests("test_contract", "test_every_integer_type_of_lengths")
        + _tests("test_contract", "test_int64_lengths_are_clamped_and_not_wrapped"),
    ),
    Mutant(
        "largest_k_of_the_kernel",
        PYTHON,
        "jax_topk/_lowering.py",
        "isinstance(k, int) and k <= _native.MAX_K",
        "isinstance(k, int) and k <= _native.MAX_K + 1",
        "Off by one at the limit: k = 4097 reaches the handler, which can only fail at run time.",
        _tests("test_transforms", "test_the_choice_by_platform_dtype_and_k"),
    ),
    Mutant(
        "rows_counted_as_one_dimension_too_many",
        PYTHON,
        "jax_topk/_lowering.py",
        '{"num_batch_dims": str(len(shapes_in[0]) - 1)}',
        '{"num_batch_dims": str(len(shapes_in[0]))}',
        "The width is declared independent: the older partitioner splits rows and loses winners.",
        _tests("test_sharding", "test_the_older_partitioner"),
    ),
    Mutant(
        "exchange_from_the_outer_axis",
        PYTHON,
        "jax_topk/sharding.py",
        "enumerate(reversed(axes))",
        "enumerate(axes)",
        "Stages in the order in which the axes are written: ties no longer go to the lowest index.",
        _tests("test_merge", "test_equals_top_k_of_the_whole_row"),
    ),
    Mutant(
        "merge_in_the_order_of_arrival",
        PYTHON,
        "jax_topk/sharding.py",
        "if not are_blocks_ordered:",
        "if False:",
        "Equal values of interleaved devices win by their device, not by their index.",
        _tests("test_merge", "test_ties_go_to_the_lowest_global_index")
        + _tests("test_merge", "test_merges_interleaved_candidates"),
    ),
    Mutant(
        "padding_recognised_by_its_value",
        PYTHON,
        "jax_topk/sharding.py",
        "            lengths=count,\n",
        "",
        "Padding of -inf competes with real -inf, and wins by its place.",
        _tests("test_merge", "test_a_real_minus_infinity_behind_padding")
        + _tests("test_merge", "test_windows_that_cross_every_border"),
    ),
    Mutant(
        "blocks_offset_by_their_number",
        PYTHON,
        "jax_topk/sharding.py",
        "local_end = jnp.clip(end - offset, 0, local_width)",
        "local_end = jnp.clip(end - offset, 0, local_width - 1)",
        "Off by one: the last element of every block is outside the window.",
        _tests("test_merge", "test_windows_that_cross_every_border"),
    ),
    Mutant(
        "reference_pads_one_too_late",
        PYTHON,
        "jax_topk/_reference.py",
        "is_valid = place < length[..., None]",
        "is_valid = place <= length[..., None]",
        "Off by one where the padding begins: an element behind the window becomes a result.",
        _tests("test_contract", "test_windows_are_clamped"),
    ),
    Mutant(
        "installed_for_types_that_differ",
        PYTHON,
        "jax_topk/install.py",
        '"cpu": ("float32", "float16"),',
        '"cpu": ("float32", "float16", "bfloat16"),',
        "`lax.top_k` on CPU merges the NaNs of bfloat16: routed, its results would change.",
        _tests("test_install", "test_other_types_keep_their_lowering"),
    ),
    Mutant(
        "installed_into_its_own_expression",
        PYTHON,
        "jax_topk/install.py",
        "not _lowering.is_lowering_expression()",
        "True",
        "The XLA expression holds a top_k, which would be routed too: a forced 'xla' is replaced.",
        _tests("test_install", "test_a_forced_expression_stays_xla"),
    ),
)

# The emulation replaces ptx.cuh and launch.cu, and its threads switch only at barriers.
ON_A_GPU = (
    Mutant(
        "gpu_counter_without_an_atomic",
        GPU,
        "ffi/cuda/stream_part.cuh",
        "if (cta.lane == 0) taken = FetchAndAdd(&cta.header->num_chunks, needs);",
        "if (cta.lane == 0) {\n    taken = cta.header->num_chunks;\n"
        "    cta.header->num_chunks = taken + needs;\n  }",
        "A read and a write for an atomic: two warps get the same chunk.",
        ("--rows 64 --width 65536 --k 2048", "--rows 256 --width 65536 --k 2048"),
    ),
    Mutant(
        "gpu_copies_not_waited_for",
        GPU,
        "ffi/cuda/ptx.cuh",
        'asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");',
        "",
        "Nothing waits for asynchronous copies: a tile is read before it has arrived.",
        ("--rows 64 --width 4096 --k 2048", "--rows 300 --width 163840 --k 2048"),
    ),
    Mutant(
        "gpu_barrier_that_expects_two",
        GPU,
        "ffi/cuda/ptx.cuh",
        "mbarrier.init.shared::cta.b64 [%0], 1;",
        "mbarrier.init.shared::cta.b64 [%0], 2;",
        "peer (vllm 41605): a barrier waits for an arrival that never comes.",
        ("--rows 1 --width 65536 --k 2048",),
    ),
    Mutant(
        "gpu_cluster_along_the_rows",
        GPU,
        "ffi/cuda/launch.cu",
        "attribute.val.clusterDim = {1, static_cast<unsigned>(plan.cluster_size), 1};",
        "attribute.val.clusterDim = {static_cast<unsigned>(plan.cluster_size), 1, 1};",
        "The cluster spans rows instead of the CTAs of one row.",
        ("--rows 16 --width 65536 --k 2048",),
    ),
    Mutant(
        "gpu_shared_memory_not_asked_for",
        GPU,
        "ffi/cuda/launch.cu",
        "config.dynamicSmemBytes = static_cast<size_t>(plan.smem_bytes);",
        "config.dynamicSmemBytes = static_cast<size_t>(plan.smem_bytes) / 2;",
        "Half of the shared memory that the layout needs.",
        ("--rows 8 --width 65536 --k 2048",),
    ),
    Mutant(
        "gpu_scan_in_the_wrong_direction",
        GPU,
        "ffi/cuda/ptx.cuh",
        "return __shfl_up_sync(0xffffffffu, value, delta);",
        "return __shfl_down_sync(0xffffffffu, value, delta);",
        "Up and down are easily confused.",
        ("--rows 8 --width 65536 --k 2048",),
    ),
)

MUTANTS = (*KERNEL, *PLANNER, *CPU_TARGET, *PYTHON_CODE, *ON_A_GPU)
