"""Mutation evidence: realistic defects, planted one at a time, and the tests that catch them.

    python -m tests.mutations            all that need no GPU; needs g++, cmake, ninja, nanobind
    python -m tests.mutations --help     a part of them, results as JSON or Markdown, the GPU's

`table.py` lists the defects, `workspace.py` plants one in a copy of the sources and runs its tests,
`report.py` writes what was seen; `results.md` and `results.json` are from the last full run.
"""
