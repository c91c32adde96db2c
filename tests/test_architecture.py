"""House rules as tests: who may import whom, and what stays light."""

import ast
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flowerray

PACKAGE = Path(flowerray.__file__).parent
ROOT = PACKAGE.parent

# The data flow: a part imports only parts that stand before it.
ORDER = [
    "errors", "config", "files", "text", "memory", "description",
    "data/pool", "data/images", "data/dataset", "data/splits", "data/download", "data/oxford",
    "data/folder",
    "data/species", "data/sprites", "data/scenery", "data/painter", "data/synthetic",
    "data/source", "data/store", "data/batches", "data/augment",
    "fold", "model", "attacks/pgd", "attacks/logits", "attacks/objectives", "attacks",
    "methods", "harden", "averages", "progress", "precision", "checkpoint", "rundir",
    "evaluate/embed", "evaluate/retrieval", "evaluate/pairs", "evaluate/statistics",
    "evaluate/pareto", "evaluate/measure", "evaluate/sheet", "evaluate/backbones", "evaluate/arena",
    "evaluate/attack_config", "evaluate/robustness",
    "evaluate/pair_attack", "evaluate/gallery_attack", "evaluate/ers",
    "evaluate/checks", "evaluate/audit",
    "evaluate/guard",
    "system", "train", "explain", "tracking_server", "tracking", "pyfunc", "explore", "report",
    "run", "cluster", "commands/models", "commands", "tables",
    "cli/options", "cli",
]  # fmt: skip

ONLY_IN = {
    "ray": ("cluster/",),
    "mlflow": ("tracking", "pyfunc"),
    "tyro": ("cli/",),
}
SEES_A_RUN = ("run", "cluster/", "commands/", "cli/")


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        yield name.removesuffix("/__init__"), path


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names of what a file imports, also inside functions; type-checking blocks are left
    out.
    """
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if not (top_level_only and isinstance(node, ast.FunctionDef)):
            todo += ast.iter_child_nodes(node)
    return found


def position(name: str) -> int | None:
    """A part's place in the data flow: a file's own, else its folder's."""
    for candidate in (name, name.split("/")[0]):
        if candidate in ORDER:
            return ORDER.index(candidate)
    return None


def test_every_file_has_a_place() -> None:
    files = [(name, path) for name, path in modules() if path.name != "__init__.py"]
    assert [name for name, _ in files if position(name) is None] == []


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_a_part_imports_only_parts_before_it(name: str, path: Path) -> None:
    own = position(name)
    for target in imported(path):
        if not target.startswith("flowerray."):
            continue
        part = target.removeprefix("flowerray.").replace(".", "/")
        parts = [
            p
            for p in (part, part.rpartition("/")[0])
            if p and (PACKAGE / f"{p}.py").exists() or (PACKAGE / p / "__init__.py").exists()
        ]
        if not parts or own is None:
            continue
        other = position(parts[0])
        same_folder = "/" in name and parts[0].split("/")[0] == name.split("/")[0]
        if other is None or (same_folder and ORDER[own] == name.split("/")[0]):
            continue
        assert other <= own, f"{name} imports {parts[0]}, which comes after it"


@pytest.mark.parametrize(("library", "places"), list(ONLY_IN.items()))
def test_a_library_stays_in_its_place(library: str, places: tuple[str, ...]) -> None:
    for name, path in modules():
        uses = any(t == library or t.startswith(f"{library}.") for t in imported(path))
        assert not uses or f"{name}/".startswith(places), f"{name} imports {library}"
        if library == "ray" and uses:
            tops = imported(path, top_level_only=True)
            assert not any(t.split(".")[0] == "ray" for t in tops), f"{name}: ray at the top"


def test_only_the_outermost_parts_see_a_run() -> None:
    for name, path in modules():
        if "flowerray.run" in imported(path) or "flowerray.run.Run" in imported(path):
            assert f"{name}/".startswith(SEES_A_RUN), name


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import flowerray", "torch timm ray mlflow optuna matplotlib numpy pydantic tyro"),
        ("from flowerray.cli import dispatch; dispatch(['--help'])", "torch ray mlflow optuna"),
        (
            "from flowerray.cli import dispatch\n"
            "try: dispatch(['train', 'triplet', '--help'])\nexcept SystemExit: pass",
            "ray mlflow optuna",
        ),
    ],
)  # fmt: skip
def test_what_stays_light(code: str, heavy: str) -> None:
    check = f"found = sorted(set({heavy.split()}) & set(sys.modules))\nassert not found, found"
    program = f"{code}\nimport sys\n{check}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_jobs_are_thin() -> None:
    jobs = sorted((ROOT / "jobs").glob("*.py"))
    assert jobs
    for job in jobs:
        assert len(job.read_text().splitlines()) < 10, job
        assert "from flowerray.cli import main" in job.read_text()


def test_a_job_that_a_pool_imports_again_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that decode are spawned, and each loads the file that was started, under this name:
    the whole command would run again in it and wait for its parent's lock for ever.
    """
    called: list[list[str]] = []
    monkeypatch.setattr("flowerray.cli.main", called.append)
    monkeypatch.setattr(sys, "argv", ["job"])
    for job in sorted((ROOT / "jobs").glob("*.py")):
        runpy.run_path(str(job), run_name="__mp_main__")
        assert not called, job
        runpy.run_path(str(job), run_name="__main__")
        assert len(called.pop()) >= 1


@pytest.mark.parametrize(
    "words", [["--resume", "runs/x"], ["--resume=runs/x"], ["--from", "x"], ["--out", "x"]]
)
def test_a_resumed_hardening_keeps_its_own_kind(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr("flowerray.cli.main", called.append)
    for method in ("center", "siamese", "triplet"):
        job = str(ROOT / "jobs" / f"harden_{method}.py")
        monkeypatch.setattr(sys, "argv", [job, *words])
        runpy.run_path(job, run_name="__main__")
        kind = ["--harden.kind", "pgd"] if words[0] == "--out" else []
        assert called.pop() == ["train", method, *kind, *words]
