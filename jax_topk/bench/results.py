"""Records, the header that says where they come from, and the JSON file that holds both.

    {"header": {"gpu": ..., "commit": ..., ...},
     "records": [{"implementation": "cuda", "rows": 1, "length": 4096, "distribution": "normal",
                  "k": 2048, "dtype": "float32", "metric": "graph_chain_us", "us": 2.6,
                  "verified": "certificate+oracle", "output": "indices", "width": 163840,
                  "plan": "", "cold": false, "samples": {"n": 50, "min": ..., ...}}, ...]}

`verified` is `"oracle"` (every row equals the NumPy oracle), `"certificate+oracle"` (every row
proven by the certificate, a sample also by the oracle), `"certificate"` (where ties are not
promised), `"equal"` (data that was only moved arrived bit for bit), `"WRONGn"` (n rows are wrong)
or `"floor"` (nothing is selected). Results are checked before and after timing; one entry stands
for both. Where records of other libraries come from another run, `other_runs` in the header names
them and says which.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_topk._version import __version__

from .cases import Case, Length

Key = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """One implementation's time in one cell."""

    implementation: str
    rows: int
    length: Length
    distribution: str
    k: int
    dtype: str
    metric: str
    us: float
    verified: str
    output: str = "indices"
    width: int = 163840
    plan: str = ""
    cold: bool = False
    devices: int = 1
    samples: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_case(
        cls,
        case: Case,
        implementation: str,
        metric: str,
        us: float,
        verified: str,
        samples: Mapping[str, float],
    ) -> Record:
        """Makes the record of a cell."""
        return cls(
            implementation=implementation,
            metric=metric,
            us=round(us, 3),
            verified=verified,
            samples=samples,
            **dataclasses.asdict(case),
        )

    @property
    def case(self) -> Case:
        """The cell."""
        return Case(
            self.rows,
            self.length,
            self.distribution,
            self.k,
            self.dtype,
            self.output,
            self.width,
            self.plan,
            self.cold,
            self.devices,
        )

    @property
    def key(self) -> Key:
        """What two measurements of the same thing have in common."""
        return (self.implementation, self.metric, *dataclasses.astuple(self.case))

    @property
    def is_wrong(self) -> bool:
        """Whether the result failed its check."""
        return self.verified.startswith("WRONG")

    @property
    def spread(self) -> float:
        """Half the interquartile range of the samples relative to the median; 0 if unknown."""
        try:
            low, high = self.samples["q25"], self.samples["q75"]
        except KeyError:
            return 0.0
        return max(0.0, (high - low) / 2 / self.us) if self.us > 0 else 0.0


@dataclasses.dataclass
class Results:
    """A header and its records."""

    header: dict[str, Any]
    records: list[Record]

    def merge(self, records: Iterable[Record]) -> None:
        """Adds records; one with the key of an older one takes its place."""
        merged = {record.key: record for record in self.records}
        merged.update({record.key: record for record in records})
        self.records = list(merged.values())

    def save(self, path: str | Path) -> None:
        """Writes the JSON, one record per line so that it diffs well, and moves it into place."""
        path = Path(path)
        lines = ",\n  ".join(json.dumps(_as_json(record)) for record in self.records)
        header = json.dumps(self.header, indent=2).replace("\n", "\n ")
        text = f'{{\n "header": {header},\n "records": [\n  {lines}\n ]\n}}\n'
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def _as_json(record: Record) -> dict[str, Any]:
    return dataclasses.asdict(record)


def load(path: str | Path) -> Results:
    """Reads what `Results.save` wrote; raises ValueError with a sentence if it is not that."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        names = {field.name for field in dataclasses.fields(Record)}
        records = [
            Record(**{name: value for name, value in item.items() if name in names})
            for item in data["records"]
        ]
        return Results(dict(data["header"]), records)
    except FileNotFoundError:
        raise ValueError(f"there is no file {str(path)!r}; pass a JSON that --json wrote") from None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{str(path)!r} is not a file of bench results ({type(error).__name__}: {error}); "
            "pass a JSON that --json wrote"
        ) from None


# --- header ---------------------------------------------------------------------------------------


def _output_of(command: Sequence[str], cwd: Path | None = None) -> str | None:
    """Output of a command, stripped; None if it is missing or fails."""
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_state() -> dict[str, Any]:
    """Commit of the checkout that holds this package and whether it has changes; None: no git."""
    root = Path(__file__).resolve().parents[2]
    commit = _output_of(("git", "rev-parse", "HEAD"), root)
    top = _output_of(("git", "rev-parse", "--show-toplevel"), root)
    if commit is None or top is None or Path(top).resolve() != root:
        return {"commit": None, "dirty": None}
    status = _output_of(("git", "status", "--porcelain"), root)
    return {"commit": commit, "dirty": bool(status) if status is not None else None}


def _query_gpu(fields: Sequence[str]) -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU; None without it or if it does not know a field."""
    line = _output_of(("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"))
    if not line:
        return None
    values = [value.strip() for value in line.splitlines()[0].split(",")]
    return dict(zip(fields, values, strict=False))


def gpu_clocks() -> dict[str, str] | None:
    """Clocks, power, temperature and reasons of throttling of the first GPU, as far as known."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
    # The name of the last field differs between drivers.
    return _query_gpu((*fields, "clocks_event_reasons.active")) or _query_gpu(fields)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def usable_cpus() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_header(
    target: str, device: str, settings: Mapping[str, Any], commit: str | None = None
) -> dict[str, Any]:
    """Describes the machine, the versions and the run.

    Args:
        target: `"gpu"` or `"cpu"`, what was timed.
        device: JAX's name of the device.
        settings: the numbers a reader needs to repeat the run.
        commit: stated commit, for a machine that has a copy of the tree without its git folder, or
            with that of another commit.

    Returns:
        A dict for JSON.
    """
    git = {"commit": commit, "dirty": None} if commit else git_state()
    known = (_query_gpu(("name", "driver_version")) or {}) if target == "gpu" else {}
    return {
        "target": target,
        "gpu": known.get("name", device) if target == "gpu" else None,
        "driver": known.get("driver_version"),
        "processor": _processor(),
        "cpus": usable_cpus(),
        "jax": _version("jax"),
        "jaxlib": _version("jaxlib"),
        "jax_topk": __version__,
        "torch": _version("torch") if target == "gpu" else None,
        "flashinfer": _version("flashinfer-python") if target == "gpu" else None,
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        **git,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": dict(settings),
    }


def sharded_fields(platform: str, devices: int, processes: int) -> dict[str, Any]:
    """What the header of the suite over several devices says besides.

    Args:
        platform: `"gpu"` or `"cpu"`.
        devices: number of devices.
        processes: that they belong to.

    Returns:
        `target`, of its own since one device's tables and plots do not apply; `devices` and
        `processes`; `links`, what nvidia-smi says of the links between GPUs.
    """
    links = _output_of(("nvidia-smi", "topo", "-m")) if platform == "gpu" else None
    return {
        "target": f"sharded-{platform}",
        "devices": devices,
        "processes": processes,
        "links": re.sub(r"\x1b\[[0-9;]*m", "", links).splitlines() if links else None,
    }
