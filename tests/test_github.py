"""Workflows and templates of GitHub: they parse, and what they run exists."""

import re
import runpy
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))


def load(path):
    """As text throughout: in YAML `on` is true and 3.10 is 3.1."""
    return yaml.load(path.read_text(), yaml.BaseLoader)


def commands(workflow):
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_exists(path):
    workflow = load(path)
    assert workflow["name"] and workflow["on"]
    assert workflow["permissions"] == {"contents": "read"}  # a job that needs more says so itself
    targets = [line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if line[:1].isalpha()]
    for command in commands(workflow):
        program, *words = command.split()
        assert program in ("make", "python", "pipx", "sudo"), command
        if program == "make":
            assert words[0] in targets, command
        if program == "python":
            assert (ROOT / words[0]).is_file(), command
    for job in workflow["jobs"].values():
        assert set(job.get("needs", "").split()) <= set(workflow["jobs"])
        assert all("run" in step or "@" in step["uses"] for step in job["steps"])


def test_all_that_a_contributor_runs_is_run_by_a_workflow():
    run = [command for path in WORKFLOWS for command in commands(load(path))]
    for target in ("test", "lint", "docs"):
        assert any(command.split()[:2] == ["make", target] for command in run)


def test_the_versions_of_python_and_trl_are_those_that_are_supported():
    project = (ROOT / "pyproject.toml").read_text()
    pythons = load(GITHUB / "workflows" / "tests.yml")["jobs"]["test"]["strategy"]["matrix"]["python-version"]
    assert f'requires-python = ">={pythons[0]}"' in project
    trls = load(GITHUB / "workflows" / "trl.yml")["jobs"]["test"]["strategy"]["matrix"]["trl"]
    supported = Requirement(next(line.strip(' ,"') for line in project.splitlines() if '"trl>=' in line)).specifier
    assert trls[0] == "trl==" + next(spec.version for spec in supported if spec.operator == ">=")
    assert trls[-1] == "trl"
    for spec in trls[:-1]:
        assert supported.contains(Version(spec.removeprefix("trl==").replace("*", "0"))), spec


def test_the_lowest_and_the_newest_packages_are_tested():
    project = (ROOT / "pyproject.toml").read_text()
    bounds = {
        (name, version)
        for name, version, rest in re.findall(r'"([\w-]+)>=([\d.]+)([^"\n]*)"', project)
        if "python_version >= '3.11'" not in rest
    }
    lines = [line for line in (ROOT / "tests" / "oldest.txt").read_text().splitlines() if line[:1] != "#"]
    assert sorted(tuple(line.split("==")) for line in lines) == sorted(bounds)

    matrix = load(GITHUB / "workflows" / "tests.yml")["jobs"]["test"]["strategy"]["matrix"]
    oldest, newest = matrix["include"]
    pythons = matrix["python-version"]
    assert oldest == {"python-version": pythons[0], "torch": "torch", "constraints": "tests/oldest.txt"}
    assert newest == {"python-version": pythons[-1], "torch": "torch", "constraints": ""}
    (default,) = matrix["torch"]
    assert f"TORCH ?= {default}\n" in (ROOT / "Makefile").read_text()


def test_templates_are_what_github_reads():
    forms = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [path.stem for path in forms] == ["bug", "feature"]
    for path in forms:
        form = load(path)
        assert form["name"] and form["description"]
        ids = [element["id"] for element in form["body"] if element["type"] != "markdown"]
        assert len(ids) == len(set(ids))
        assert all(
            element["attributes"].get("label") or element["attributes"].get("value") for element in form["body"]
        )
    assert "trl-prime env" in (GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text()


@pytest.mark.parametrize(
    ("tag", "heading", "expected"),
    [
        ("v0.2.0", "0.2.0", []),
        ("v0.2.0", "0.2.0 (2026-01-31)", []),
        ("v0.3.0", "0.2.0", ["tag is v0.3.0"]),
        ("0.2.0", "0.2.0", ["tag is 0.2.0"]),
        ("v0.2.0", "Unreleased", ["no section '## 0.2.0'"]),
        ("v0.2.0", "0.2.0\n\n## 0.1.0", ["no section '## 0.2.0'"]),
        ("v0.1.0", "0.2.01", ["tag is v0.1.0", "no section '## 0.2.0'"]),
    ],
)
def test_a_release_needs_a_tag_and_a_changelog_that_agree(tmp_path, tag, heading, expected):
    problems = runpy.run_path(str(GITHUB / "check_release.py"))["problems"]
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "0.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n\n- Something.\n")
    found = problems(tag, tmp_path)
    assert len(found) == len(expected)
    assert all(part in sentence for part, sentence in zip(expected, found, strict=True))
