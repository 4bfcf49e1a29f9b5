"""The plot of a run: time over row length, one panel per batch size."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import CALL, GRAPH, JIT, STREAM, WIDTH, K
from .results import Record, Results

PANELS = (1, 8, 32, 128, 256)
STYLES: dict[tuple[str, str], tuple[str, str, str, str]] = {
    # (implementation, metric) -> (label, colour, marker, line style)
    ("cuda", GRAPH): ("jax_topk, kernel alone", "#0b6e99", "o", "-"),
    ("cuda", JIT): ("jax_topk inside jit", "#0b6e99", "o", ":"),
    ("cpu", CALL): ("jax_topk", "#0b6e99", "o", "-"),
    ("lax", JIT): ("jax.lax.top_k inside jit", "#c0504d", "s", "-"),
    ("lax", CALL): ("jax.lax.top_k", "#c0504d", "s", "-"),
    ("torch", GRAPH): ("torch.topk", "#e08a00", "^", "-"),
    ("torch", STREAM): ("torch.topk (no graph)", "#e08a00", "^", "--"),
    ("flashinfer", GRAPH): ("FlashInfer", "#6a994e", "v", "-"),
    ("floor_read", GRAPH): ("read-only kernel (floor)", "#8c8c8c", "", "--"),
}


def why_not() -> str | None:
    """Why no plot can be drawn, in one line; None if it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    return None


def _curves(
    records: Sequence[Record], rows: int, by_width: bool
) -> dict[tuple[str, str], list[tuple[int, float]]]:
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for record in records:
        x = record.width if by_width else record.length
        if record.rows == rows and isinstance(x, int):
            curves.setdefault((record.implementation, record.metric), []).append((x, record.us))
    return {key: sorted(points) for key, points in curves.items() if key in STYLES}


def _shown(results: Results, by_width: bool) -> list[Record]:
    """The records of the main grid with one k: 2048, or 64 over widths that may be narrower."""
    main = [
        record
        for record in results.records
        if record.distribution == "normal"
        and record.dtype == "float32"
        and record.output == ("values_sorted" if by_width else "indices")
        and not record.cold
        and not record.plan
        and (record.length == "full" if by_width else record.width == WIDTH)
    ]
    ks = {record.k for record in main}
    wanted = 64 if by_width else K
    k = wanted if wanted in ks else max(ks, default=0)
    return [record for record in main if record.k == k]


def draw(results: Results, path: str | Path) -> bool:
    """Draws the records of normal values to a file; the suffix of `path` sets the format.

    Args:
        results: of a GPU run (time over row length) or of a CPU run (time over row width).
        path: file to write.

    Returns:
        False if there is nothing to draw.
    """
    by_width = results.header.get("target") == "cpu"
    records = _shown(results, by_width)
    if not records:
        return False
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "jax_topk"  # the same file from the same results
    import matplotlib.pyplot as plt

    panels = sorted({record.rows for record in records})
    panels = [rows for rows in PANELS if rows in panels] or panels[: len(PANELS)]
    size = max(6.0, 3.3 * len(panels)), 3.8
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for axis, rows in zip(axes[0], panels, strict=True):
        for key, points in _curves(records, rows, by_width).items():
            label, colour, marker, line = STYLES[key]
            x, y = zip(*points, strict=True)
            (handle,) = axis.plot(
                x, y, color=colour, marker=marker, linestyle=line, markersize=4, label=label
            )
            handles.setdefault(label, handle)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"{rows} row{'s' if rows > 1 else ''}", fontsize=10)
        axis.set_xlabel("row width" if by_width else "row length")
        axis.grid(True, which="both", linewidth=0.4, alpha=0.4)
    axes[0][0].set_ylabel("microseconds per selection")
    device = results.header.get("gpu") or results.header.get("processor") or ""
    figure.suptitle(f"top-k of float32 rows, k = {records[0].k}, {device}", fontsize=11)
    labels = [style[0] for style in STYLES.values() if style[0] in handles]
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="lower center",
        ncol=len(labels) if len(panels) > 3 else 2,
        fontsize=9,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    figure.savefig(path, dpi=150, metadata=dated.get(Path(path).suffix.lower()))
    plt.close(figure)
    return True
