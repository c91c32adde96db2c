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

# The house, from below: a part imports only parts that stand before it, on its floor and in its
# folder too. "folder: files" is a folder with its files in their order.
FLOORS = [
    "errors text system memory description",
    "config files pool statistics calibration cache gpu",
    "model: modes fold config weights embedder averages precision",
    "rendered: species sprites scenery painter synthetic",
    "attacks: pgd logits objectives library bank",
    "data: dataset splits download images store resident folder listing oxford source batches"
    " augment",
    "methods: _base center siamese triplet",
    "losses",
    "show: style interval columns charts contact page",
    "training: config rundir harden progress checkpoint optimizer loop run curves table",
    "tracking: address server registry state sync",
    "opening",
    "retrieval: search neighbours pairs decisions embed views measure floor pictures table command",
    "index: contents table command",
    "robustness: config journal victim verification attack checks score audit guard"
    " record table pictures command",
    "explain: layers baselines decompose cam faithfulness localise sanity judge concepts tcav"
    " draw table examples pictures pair named command",
    "explore: align scan counts duplicates likeness leaks maps exploration pictures results"
    " chapters command",
    "report: gather numbers sections attacked evidence command",
    "cluster: session worker trainer watch driver tasks embedding",
    "tuning: space trial config pictures database study searcher heads confirm command",
    "comparison: plan pictures command",
    "backbones: bench remote pictures command",
    "export: portable card command",
    "serve: pyfunc service app deployment follow",
    "cli: options attack backbones cache compare data embed explain explore export index report"
    " retrieval review serve training tune",
    "api",
]


def placed(floors: list[str]) -> list[str]:
    """Every file in the order of the data flow; a folder's own file comes last of it."""
    order: list[str] = []
    for floor in floors:
        folder, colon, files = floor.partition(": ")
        order += (
            [f"{folder}/{file}" for file in files.split()] + [folder] if colon else floor.split()
        )
    return order


ORDER = placed(FLOORS)

ONLY_IN = {
    "ray": ("cluster/", "tuning/", "backbones/remote", "serve/deployment"),
    "mlflow": ("tracking/", "serve/pyfunc"),
    "tyro": ("cli/",),
}
SEES_A_RUN = (
    "training/run", "opening", "retrieval/command", "robustness/command", "robustness/record",
    "explain/command", "report/command", "report/gather", "comparison/", "tuning/",
    "cluster/", "cli/", "api",
)  # fmt: skip
ROLES = ("__init__", "config", "command", "table", "pictures")
"""Names of files that may stand in every topic."""


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


def inside(target: str) -> str | None:
    """The file that a dotted name of ours is, or is in."""
    part = target.removeprefix("flowerray").lstrip(".").replace(".", "/")
    for name in (part, part.rpartition("/")[0]):
        if name and (
            (PACKAGE / f"{name}.py").exists() or (PACKAGE / name / "__init__.py").exists()
        ):
            return name
    return None


def arrows(path: Path) -> set[str]:
    """Files of ours that a file imports."""
    found = {inside(t) for t in imported(path) if t.split(".")[0] == "flowerray"}
    folders = {f.rpartition("/")[0] for f in found if f}  # `from folder import file` names both
    return {f for f in found if f and f not in folders}


def test_every_file_has_a_place() -> None:
    names = [name for name, _ in modules() if name != "__init__"]
    assert sorted(names) == sorted(ORDER)


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_a_part_imports_only_parts_before_it(name: str, path: Path) -> None:
    own = len(ORDER) if name == "__init__" else ORDER.index(name)
    above = [other for other in arrows(path) if other != name and ORDER.index(other) > own]
    assert not above, f"{name} imports {above}, which come after it"


def test_a_file_name_stands_once() -> None:
    """Roles stand in many topics, and the command line has a file a command."""
    names = [n.rpartition("/")[2] for n, p in modules() if "/" in n and p.name != "__init__.py"
             and not n.startswith("cli/")]  # fmt: skip
    assert [n for n in set(names) if names.count(n) > 1 and n not in ROLES] == []


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
        if "training/run" in arrows(path):
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
