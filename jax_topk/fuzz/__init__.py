"""Fuzzing at scale: `python -m jax_topk.fuzz --help`.

Draws batches from a seed, runs an implementation on them, and compares every row on the device with
an independent reference, bit for bit. The parts:

    generators   what rows hold: counter-based, the same bits from NumPy and from XLA
    windows      starts and lengths
    plans        forced paths of the CUDA kernel, and which path a row takes
    batch        a seed and a number -> one batch, with nothing read from a device
    programs     the two XLA programs of a shape class: make the values, check the results
    targets      runs an implementation on buffers with guard zones around the results
    case         one small reproducer as a line of text, run against the NumPy oracle
    shrink       a failing batch -> the smallest case that still fails
    watchdog     ends the process with a replay line where a batch hangs
    tally        counts, tables, JSON
    campaign     the loop over batches
"""
