"""Every error that this package raises has a test of its message.

Read from the source: whoever adds a `raise`, or a refusal in C++, and no test that looks for some
three words of its sentence, fails here.
"""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = ("api", "sharding", "install", "_axis_check", "_lowering", "_native")
CPP = ("handler_checks.h", "plan.cc", "cpu/binding.cc")
WORDS = 3  # in a row that a test must look for

# Sentences that no test can reach, with the reason.
UNREACHABLE = {
    "is not an extension module of this Python": "importlib refuses such a file name before",
    "no memory left for the candidates": "tests/test_sanitizers.py lets every allocation fail",
}


def words_of(text: str) -> list[str]:
    """Words without the marks of regular expressions, so that patterns and sentences compare."""
    return re.sub(r"\\[a-zA-Z]|[^\w=/<>-]+", " ", text.replace("\\b", " ")).lower().split()


def runs(words: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def strings(tree: ast.AST) -> list[str]:
    """The literal parts of all strings below a node."""
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def sentences_of_python(name: str) -> list[tuple[int, list[str]]]:
    """Line and literal parts of every message that a module raises or returns to be raised."""
    tree = ast.parse((ROOT / "jax_topk" / f"{name}.py").read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            parts = strings(node.exc)
        elif isinstance(node, ast.Return) and node.value is not None:
            parts = [part for part in strings(node.value) if len(words_of(part)) > WORDS]
        else:
            continue
        if parts:
            found.append((node.lineno, parts))
    return found


def sentences_of_cpp(name: str) -> list[tuple[int, list[str]]]:
    """Line and literal parts of what a C++ file returns as an error."""
    text = (ROOT / "ffi" / name).read_text()
    found = []
    for match in re.finditer(
        r"(?:return Invalid\(|BadOverride\(item,|ffi::Error\(|return \")(.*?);\n", text, re.DOTALL
    ):
        parts = re.findall(r'"((?:[^"\\]|\\.)*)"', match.group())
        if any(len(words_of(part)) >= 2 for part in parts):
            found.append((text[: match.start()].count("\n") + 1, parts))
    return found


@pytest.fixture(scope="module")
def tested() -> list[str]:
    """All strings of the tests, as words in one line each."""
    texts = []
    for path in sorted((ROOT / "tests").glob("*.py")):
        if path.name != "test_error_coverage.py":
            texts += strings(ast.parse(path.read_text()))
    return [f" {' '.join(words_of(text))} " for text in texts]


def is_tested(parts: list[str], tested: list[str]) -> bool:
    wanted: set[tuple[str, ...]] = set()
    for part in parts:
        words = words_of(part)
        wanted |= runs(words, min(WORDS, max(len(words), 2)))
    lines = [f" {' '.join(run)} " for run in wanted]
    return any(line in text for text in tested for line in lines)


def check(file: str, sentences: list[tuple[int, list[str]]], tested: list[str]) -> None:
    assert sentences, f"no message was found in {file}"
    missing = [
        f"{file}:{line}: {' ... '.join(parts)}"
        for line, parts in sentences
        if not is_tested(parts, tested) and not any(u in " ".join(parts) for u in UNREACHABLE)
    ]
    assert not missing, "no test looks for:\n" + "\n".join(missing)


@pytest.mark.parametrize("name", MODULES)
def test_every_message_of_the_package_is_tested(name, tested):
    check(f"jax_topk/{name}.py", sentences_of_python(name), tested)


@pytest.mark.parametrize("name", CPP)
def test_every_message_of_the_handlers_and_the_planner_is_tested(name, tested):
    check(f"ffi/{name}", sentences_of_cpp(name), tested)


def test_a_message_without_a_test_is_noticed(tested):
    parts = ["k=", " lies beyond the seventh hill of ", "; walk there"]
    assert not is_tested(parts, tested)
    assert is_tested(
        ["k=", ", the largest k of the cuda target; pass a smaller k"],
        [" k=5000 exceeds 4096 the largest k of the cuda target "],
    )
