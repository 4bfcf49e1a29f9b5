"""The bench: the only source of this project's numbers (`python -m jax_topk.bench`).

A run walks through *cells*. Each cell names a shape (rows, window lengths, width, k, dtype), a
distribution of values, what is asked for (`output`) and a forced plan; every implementation is
measured on it, and every result is proven right before and after it is timed.

    cases.py            cells, blocks of cells, and the suites of the committed results
    inputs.py           generators of values and of window lengths, on the device
    certificate.py      an O(width) proof that a result is the exact top-k, one jitted function
    oracle.py           the contract in NumPy, for samples of rows and for small cells
    implementations.py  this package, lax, torch, FlashInfer and the floors, as things to time
    timing.py           interleaved samples, slopes of chains, quantiles
    runner.py           measures blocks cell by cell, with progress
    sharded.py          one row over several devices, and what else one could do
    processes.py        the same in several processes
    exchange_model.py   on paper: the exchange of candidates over 8 to 512 devices
    sharded_tables.py   text tables of both, and those of docs/sharding.md
    results.py          records, header, JSON
    tables.py           text tables
    compare.py          new against old results, beyond noise
    peers.py            against a table of other kernels' times
    goals.py            the project's speed targets, met or missed
    plot.py, report.py  the README's plot and tables, regenerated from committed results

Only `certificate`, `implementations`, `inputs`, `runner` and `sharded` touch a device; the rest
works on records, wherever they were measured.
"""
