"""Rules of the repository: the README's commands exist, nothing of one machine is committed."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from flowerray import cli

ROOT = Path(__file__).parent.parent


def tracked() -> list[Path]:
    """Files that git tracks, without what only lies here."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def readme_lines() -> list[str]:
    """Lines of the bash blocks in the README and its pages, without comments."""
    text = "\n".join(page.read_text() for page in PAGES)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def flowerray_lines() -> list[list[str]]:
    """The words after `flowerray` in each of the README's commands."""
    found = []
    for line in readme_lines():
        if "flowerray " in line and "ray job" not in line:
            found.append(shlex.split(line.split("flowerray ", 1)[1]))
    return found


@pytest.mark.parametrize("words", flowerray_lines(), ids=" ".join)
def test_each_command_of_the_readme_exists(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert words[0] in cli.COMMANDS
    options = [word for word in words if word.startswith("--")]
    second = (
        words[1:2] if words[0] in ("train", "tune", "data", "index") else []
    )  # a RUN would be opened
    with pytest.raises(SystemExit) if options else pytest.MonkeyPatch.context():
        if options:
            cli.dispatch([words[0], *second, "--help"])
    shown = capsys.readouterr().out
    missing = [option for option in options if not re.search(rf"{option}\b", shown)]
    assert not missing, f"`flowerray {' '.join(words)}` has no {missing}"


def test_ci_runs_the_readmes_test_command() -> None:
    lines = readme_lines()
    assert "pip install uv && uv run flowerray demo" in lines
    assert "uv run pytest" in lines
    assert "uv run pytest" in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_wrapped_and_their_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > 110 and not line.startswith("|")]
    assert not long
    links = re.findall(r"\]\(([^)#]+)", text)
    gone = [to for to in links if "://" not in to and not (page.parent / to).exists()]
    assert not gone


def test_nothing_of_one_machine_is_committed() -> None:
    names = ["python" + "hosted", "pypi" + r"\.org", "registry" + r"\.npmjs", r"deb\.debian"]
    hosts = "|".join(names)
    folders = r"(?<![\w./~-])/(?:work|root|home/\w+|opt)/\w"
    for path in tracked():
        assert path.name != "uv.lock"
        if path.suffix in (".png", ".jpg", ".xz"):
            continue
        text = path.read_text()
        for pattern in (rf"https?://[\w.]*(?:{hosts})", folders, r"\.\./" + "shared"):
            found = re.search(pattern, text)
            assert found is None, f"{path.relative_to(ROOT)}: {found.group() if found else ''}"


def test_weights_are_loaded_as_tensors_only() -> None:
    for path in tracked():
        if path.suffix == ".py":
            for call in re.findall(r"torch\.load\([^)]*\)", path.read_text()):
                assert "weights_only=True" in call or path == Path(__file__), f"{path}: {call}"


def test_each_dependency_has_bounds_and_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)
    listed = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    for extra in project["project"].get("optional-dependencies", {}).values():
        listed += extra
    for wanted in listed:
        bounds = "" if wanted.startswith("flowerray[") else r">=[\d.]+(,<[\d.]+)?"
        assert re.fullmatch(rf"[\w-]+(\[[\w,]+\])?{bounds}", wanted), wanted
        assert re.search(rf'^    "{re.escape(wanted)}", +# \w', text, re.MULTILINE), wanted
    assert "override-dependencies" not in text, "pip, which knows no overrides, has to agree"
