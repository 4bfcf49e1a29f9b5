"""README, docs and docstrings: examples run, links lead somewhere, claims are those of the code."""

from __future__ import annotations

import doctest
import importlib
import pathlib
import pkgutil
import re
import subprocess
import sys
import tomllib
import types

import pytest

import jax_topk
from jax_topk import _lowering, _native

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(text: str, heading: str) -> str:
    (found,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found


def run_examples(name: str, text: str, module: types.ModuleType | None = None) -> int:
    """Runs the `>>>` examples of a text; returns their number."""
    names = {} if module is None else vars(module).copy()
    test = doctest.DocTestParser().get_doctest(text, names, name, name, 0)
    report: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert results.failed == 0, "".join(report)
    return results.attempted


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_python_examples_run(path):
    blocks = code_blocks(path.read_text(), "python")
    assert all(block.startswith(">>> ") for block in blocks), "not an example that can be run"
    # One namespace for the whole document, as a reader's session would be.
    run_examples(path.name, "\n".join(blocks))


MODULES = [
    module.name
    for module in pkgutil.walk_packages(jax_topk.__path__, "jax_topk.")
    if not module.name.endswith(("__main__", "._cpu", "._cuda"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    tests = doctest.DocTestFinder(exclude_empty=True).find(module)
    for test in tests:
        run_examples(test.name, test.docstring, module)


@pytest.mark.parametrize("name", ["top_k", "top_k_indices", "sharded_top_k", "merge_top_k"])
def test_functions_that_select_have_an_example(name):
    assert run_examples(name, getattr(jax_topk, name).__doc__) > 0


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked.read_text()), f"{path.name} links to {target}"


def test_the_readme_opens_with_the_two_commands():
    """The first installs and runs the main job, the second installs and runs the tests."""
    first, second = code_blocks(README.read_text(), "sh")
    commands = [block.strip().split(" && ") for block in (first, second)]
    assert [len(command) for command in commands] == [2, 2]
    for install, _ in commands:
        extras = re.fullmatch(r'python -m pip install (?:\.|"\.\[([\w,]+)\]")', install)[1]
        assert set((extras or "").split(",")) - {""} <= set(PROJECT["optional-dependencies"])
    assert commands[0][1] == "python -m examples.sparse_attention"
    assert (ROOT / "examples" / "sparse_attention" / "__main__.py").exists()
    assert commands[1][1] == "python -m pytest"


def test_the_readme_names_supported_versions():
    supported = section(README.read_text(), "What is supported")
    pythons = re.findall(r":: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.MULTILINE)
    assert f"| Python | {', '.join(pythons)};" in supported
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    (oldest_jax,) = re.findall(r"^jax>=([\d.]+)$", "\n".join(PROJECT["dependencies"]), re.M)
    assert f"| JAX | {oldest_jax} and newer;" in supported
    ci = (ROOT / ".ci" / "run").read_text()
    assert f"readonly OLDEST_JAX={oldest_jax}\n" in ci


def test_the_changelog_has_this_version():
    assert f"\n## [{jax_topk.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_names_the_implementations_and_limits():
    text = README.read_text()
    for implementation in _lowering.IMPLEMENTATIONS:
        assert f'`"{implementation}"`' in section(text, "The contract in short")
    assert ", ".join(_lowering.KERNEL_DTYPES[:2]) in text
    assert f"the CUDA kernel serves k up to {_native.MAX_K}" in text


def test_the_readme_names_the_targets():
    named = re.findall(r"^\| `(jax_topk_v\d+_\w+)`", README.read_text(), re.MULTILINE)
    assert named == list(_native.TARGETS)


LIMITS = {
    "num_sms": 132,
    "smem_per_block_bytes": 232_448,
    "smem_per_sm_bytes": 233_472,
    "max_cluster_size": 16,
}


def test_the_readme_lists_the_overrides_of_the_plan():
    """Every override in the table is legal, and the planner's own list of names has no other."""
    if _native.CPU.module is None:
        pytest.skip(_native.CPU.reason)
    plan_launch = _native.CPU.module.plan_launch
    table = re.findall(
        r"^\| `(\w+)=(.+?) \|", section(README.read_text(), r"Forcing paths, [^\n]*"), re.MULTILINE
    )
    with pytest.raises(ValueError, match="the names are") as caught:
        plan_launch(1, 100, 10, "float32", False, LIMITS, "x=1")
    names = re.search(r"the names are ([\w, ]+)", str(caught.value))[1].split(", ")
    assert sorted(name for name, _ in table) == sorted(names)
    for name, values in table:
        for value in re.findall(r"\w+", values):
            value = "64" if value == "N" else value
            plan_launch(1, 100_000, 10, "float32", False, LIMITS, f"{name}={value}")


@pytest.mark.parametrize(
    "command",
    [
        "jax_topk",
        "jax_topk.bench",
        "jax_topk.bench.report",
        "jax_topk.bench.sharded_tables",
        "jax_topk.fuzz",
        "examples.sparse_attention",
        "examples.sparse_attention.context_parallel",
    ],
)
def test_commands_explain_themselves(command):
    result = subprocess.run(
        [sys.executable, "-m", command, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: python -m ")
