"""README's plain commands are those of the Makefile; citation, templates and workflows agree with the package."""

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import wejepa

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
START = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Start\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```\n(.*?)```", START, flags=re.DOTALL)
# What make adds that changes nothing but how much is printed and how many tests run at a time.
ADDED = {"-q", "--disable-pip-version-check", "-n", "logical", "--maxprocesses=8", "--dist=worksteal"}
COMMANDS = ("setup", "tutorial", "lab", "test", "test-quick")


def plain_commands() -> dict[str, list[str]]:
    """README's commands without make, by the target that does the same."""
    lines = [re.split(r" {2,}# ", line) for line in BLOCKS[1].splitlines()]
    found: dict[str, list[str]] = {}
    for command, *comment in lines:
        if "requirements.lock" in command:
            target = "setup"
        elif comment and comment[0].startswith("make "):
            target = re.match(r"make ([\w-]+)", comment[0])[1]
        elif comment:
            continue  # an operating system's own line
        found.setdefault(target, []).append(command)
    return found


def words(command: str) -> list[str]:
    """A command's words, whichever Python runs it."""
    return shlex.split(re.sub(r"(?:\.\./)?\S*bin/python", "python", command))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, list[str]]:
    """What make would run for each target, beside what it runs for setup."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    venv = tmp_path_factory.mktemp("make") / "venv"
    (venv / "bin").mkdir(parents=True)

    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "PYTEST_ARGS")}  # make may have begun this

    def lines(target: str) -> list[str]:
        done = subprocess.run(["make", "-n", f"VENV={venv}", target], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        return [line for line in done.stdout.splitlines() if line.startswith((str(venv), "cd notebooks"))]

    setup = lines("setup")
    (install,) = (line for line in setup if " pip install " in line)
    return {"setup": [install]} | {target: [line for line in lines(target) if line not in setup] for target in COMMANDS[1:]}


@pytest.mark.parametrize("target", COMMANDS)
def test_readmes_plain_commands_do_what_make_does(made, target):
    plain, by_make = ([words(command) for command in commands[target]] for commands in (plain_commands(), made))
    assert [[word for word in command if word not in ADDED] for command in by_make] == plain


def test_readme_names_every_way_and_each_leads_somewhere():
    assert set(plain_commands()) == set(COMMANDS)
    assert re.findall(r"^make ([\w-]+)", BLOCKS[0], flags=re.MULTILINE) == ["lab", "tutorial"]
    for system in ("Linux", "macOS", "Windows"):
        assert len(re.findall(rf"^.*venv.*# {system}", BLOCKS[1], flags=re.MULTILINE)) == 1
    for extra in re.findall(r"\.\[([\w,]+)\]", START):
        assert set(extra.split(",")) <= set(PROJECT["project"]["optional-dependencies"])
    for file in re.findall(r"scripts/\w+\.py|environment\.yml|requirements\.lock", START):
        assert (ROOT / file).is_file()
    for module in re.findall(r"python -m wejepa\.(\w+)", START):
        assert (ROOT / "wejepa" / f"{module}.py").is_file()


def test_uv_installs_what_the_notebooks_need_and_leaves_no_lock():
    assert PROJECT["dependency-groups"]["dev"] == ["wejepa[notebooks]"]
    assert "uv.lock" in (ROOT / ".gitignore").read_text().splitlines()


def test_every_make_target_is_explained():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)[1].split())
    assert targets - {"help"} == set(re.findall(r"echo 'make ([\w-]+) ", text))
    assert all(re.search(rf"^{target}:", text, flags=re.MULTILINE) for target in targets)
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`make ([\w-]+)`", contributing)) <= targets


def test_the_citation_is_of_this_version_and_names_the_paper():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == wejepa.__version__ and set(citation["license"]) == set(PROJECT["project"]["license"].split(" AND "))
    (paper,) = citation["references"]
    assert paper["url"].endswith("2301.08243") and len(paper["authors"]) == 8
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"({wejepa.__version__})" in changelog


def test_workflows_say_that_they_were_not_run_and_take_the_oldest_torch():
    yaml = pytest.importorskip("yaml")
    paths = {name: ROOT / ".github" / "workflows" / f"{name}.yml" for name in ("tests", "release", "site")}
    for path in paths.values():
        text = path.read_text()
        assert "Not run where it was written" in text.splitlines()[0]
        for job in yaml.safe_load(text)["jobs"].values():
            for file in re.findall(r"\S+/\S+\.py|\.ci/run", " ".join(step.get("run", "") for step in job["steps"])):
                assert (ROOT / file).is_file()
    rows = yaml.safe_load(paths["tests"].read_text())["jobs"]["versions"]["strategy"]["matrix"]["include"]
    assert {row["os"] for row in rows} == {"ubuntu-latest", "windows-latest", "macos-latest"}
    lowest = {re.match(r"[\w.-]+", need)[0]: re.search(r">=([\d.]+)", need)[1] for need in PROJECT["project"]["dependencies"]}
    oldest = [row for row in rows if "==" in row["torch"]]
    assert [row["torch"] for row in oldest] == [f"torch=={lowest['torch']}.* torchvision=={lowest['torchvision']}.*"]
    assert PROJECT["project"]["requires-python"] == f">={oldest[0]['python']}"


def test_issue_templates_ask_for_the_doctor():
    yaml = pytest.importorskip("yaml")
    templates = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")}
    assert set(templates) == {"bug", "claim", "unclear"}
    for name, template in templates.items():
        assert {"name", "description", "body"} <= set(template)
        labels = " ".join(part["attributes"]["label"] for part in template["body"])
        assert ("wejepa.doctor" in labels) == (name != "unclear")
