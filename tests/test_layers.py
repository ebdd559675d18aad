"""The floors: launcher -> mmscale -> shards, never back; the ground and the top do without torch."""

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher.launching import write_stage

REPO = Path(__file__).resolve().parents[1]
ALLOWED = {"shards": {"shards"}, "mmscale": {"shards", "mmscale"}, "launcher": {"shards", "mmscale", "launcher"}}
HEAVY = {"torch", "deepspeed", "transformers", "torchvision", "accelerate"}
"""Packages that take seconds to import."""


def modules(floor: str) -> list[str]:
    """Names of a floor's modules, from its files."""
    paths = sorted((REPO / floor).rglob("*.py"))
    return [".".join(p.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__") for p in paths]


def imports(path: Path, *, at_import: bool) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of the imports of a file, all of them or only those that run when it is imported."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"), str(path))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            yield node.lineno, node.module or ""
        if not (at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            nodes.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("floor", ALLOWED)
def test_floor_imports_only_itself_and_what_is_below(floor: str) -> None:
    floors = set(ALLOWED)
    wrong = [
        f"{path.relative_to(REPO)}:{line}: {module}"
        for path in sorted((REPO / floor).rglob("*.py"))
        for line, module in imports(path, at_import=False)
        if module.split(".")[0] in floors - ALLOWED[floor] | {"tests", "benchmarks"}
    ]
    assert wrong == []


def test_ground_floor_never_mentions_torch() -> None:
    wrong = [
        f"{path.relative_to(REPO)}:{line}: {module}"
        for path in sorted((REPO / "shards").rglob("*.py"))
        for line, module in imports(path, at_import=False)
        if module.split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_top_floor_imports_nothing_heavy_itself() -> None:
    wrong = [
        f"{path.relative_to(REPO)}:{line}: {module}"
        for path in sorted((REPO / "launcher").rglob("*.py"))
        for line, module in imports(path, at_import=True)
        if module.split(".")[0] in HEAVY
    ]
    assert wrong == []


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that are loaded after a statement, in a Python of its own."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("\n")[-2].split())


def test_importing_the_ground_floor_loads_neither_torch_nor_the_floors_above() -> None:
    loaded = loaded_by("\n".join(f"import {name}" for name in modules("shards")))
    assert loaded & (HEAVY | {"mmscale", "launcher"}) == set()


def test_importing_the_top_floor_loads_no_torch() -> None:
    loaded = loaded_by("\n".join(f"import {name}" for name in modules("launcher")))
    assert loaded & HEAVY == set()


def test_help_loads_only_the_command_line_itself() -> None:
    loaded = loaded_by(
        "import sys\nsys.argv = ['mmscale', '--help']\nfrom launcher.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass"
    )
    standard = set(sys.stdlib_module_names) | set(sys.builtin_module_names)
    ours = {name for name in loaded if not name.startswith("_") and name not in standard}
    assert ours & {"numpy", "pyarrow", "PIL", "omegaconf", "mmscale", *HEAVY} == set()


def seconds_of(words: list[str]) -> float:
    """Seconds of the processor that `mmscale` takes at best, which is the time where nothing else runs."""
    command = [str(Path(sys.executable).parent / "mmscale"), *words]
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, cwd=REPO, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def test_help_answers_in_half_a_second() -> None:
    assert seconds_of(["--help"]) < 0.5


def test_dry_run_takes_a_second_and_no_torch(tmp_path: Path) -> None:
    stage = write_stage(tmp_path)
    words = ["launch", str(stage), "--ranks-per-node", "2", "--dry-run"]
    lines = ["import sys", f"sys.argv = ['mmscale', *{words!r}]", "from launcher.cli import main", "try:\n    main()"]
    assert loaded_by("\n".join([*lines, "except SystemExit:\n    pass"])) & HEAVY == set()
    assert seconds_of(words) < 1.0


def test_no_file_is_longer_than_a_person_reads() -> None:
    long = [
        f"{path.relative_to(REPO)}: {lines} lines"
        for floor in ALLOWED
        for path in sorted((REPO / floor).rglob("*.py"))
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    ]
    assert long == []
