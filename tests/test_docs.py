"""README and docs: their code runs, their recipes and commands exist, their links lead somewhere, and they name everything."""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import json
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap
from collections import defaultdict
from functools import cache
from pathlib import Path

import peft
import pytest
import transformers
import trl
import yaml
from transformers import Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

import trl_prime
from trl_prime.cli import COMMANDS, main
from trl_prime.prime_config import PRIMEConfig
from trl_prime.rewards.registry import trl_rewards

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "benchmarks").glob("*.md"))
TOP = [
    ROOT / file for file in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "recipes/README.md", "examples/README.md")
]
PAGES = [*TOP, *DOCS, *NOTEBOOKS]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)


def blocks(page, language):
    """The fenced blocks of a language, in order."""
    return [textwrap.dedent(m["code"]) for m in FENCE.finditer(page.read_text()) if m["language"] == language]


def name(page):
    return str(page.relative_to(ROOT))


def pages_with(language):
    return [page for page in PAGES if blocks(page, language)]


# --- Python ---


@pytest.mark.parametrize("page", pages_with("python"), ids=name)
def test_python_blocks_run_in_order(page, stand_ins):
    namespace = {"__name__": "__main__"}
    for i, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, block {i + 1}", "exec"), namespace)


@pytest.mark.parametrize("page", pages_with("diff"), ids=name)
def test_diffs_turn_code_that_runs_into_code_that_runs(page, stand_ins):
    for i, diff in enumerate(blocks(page, "diff")):
        lines = diff.splitlines()
        assert all(line[:1] in ("-", "+", " ") for line in lines if line)
        for sign in "-+":
            code = "\n".join(line[1:] for line in lines if line[:1] in (sign, " ", ""))
            exec(compile(code, f"{page.name}, diff {i + 1}, {sign}", "exec"), {"__name__": "__main__"})


# --- Recipes and commands ---


@cache
def fields(command):
    """The fields of a command, by its help."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([command, "--help", "all"])
    launching = {"accelerate_config", "num_processes"} if command in ("train", "prm") else set()
    return set(re.findall(r"--(\w+)", shown.getvalue())) | launching


@pytest.mark.parametrize("page", pages_with("yaml"), ids=name)
def test_recipes_set_fields_that_exist(page):
    for code in blocks(page, "yaml"):
        if "!function" in code:
            continue  # a task of lm-eval
        recipe = yaml.safe_load(code)
        unknown = [set(recipe) - fields(command) for command in ("train", "prm")]
        assert set() in unknown, unknown


def shell_commands(page):
    """The words of each command in a page's shell blocks."""
    for code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


@pytest.mark.parametrize("page", pages_with("bash"), ids=name)
def test_shell_blocks_use_commands_fields_targets_and_files_that_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in shell_commands(page):
        if words[0] == "make":
            assert all(word in targets for word in words[1:] if "=" not in word), words
        # `trl-prime`, or what accelerate and torchrun start in its place
        start = words.index("trl_prime.cli") if "trl_prime.cli" in words else 0
        if words[start] in ("trl-prime", "trl_prime.cli"):
            command, *flags = words[start + 1 :]
            assert command in COMMANDS, words
            given = {flag.removeprefix("--") for flag in flags if flag.startswith("--")}
            assert given - {"config", "help"} <= fields(command), words
        for word in words:
            if word.startswith(("recipes/", "examples/", "benchmarks/", "docs/", "tests/")):
                assert (ROOT / word).exists(), word


# --- Names in the text ---

# Pages tell a reader to write these, or name them as an example
OF_THE_READER = {"my_module.py", "tasks/verify.py"}
FOLDERS = ("trl_prime", "recipes", "examples", "benchmarks", "docs", "tests")
OPTIONS_OF_BENCHMARKS = {
    flag for path in (ROOT / "benchmarks").glob("*.py") for flag in re.findall(r'"--([\w-]+)"', path.read_text())
}
# Where names of pages may be defined
SOURCES = [path for folder in ("trl_prime", "recipes", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
INHERITED = [Path(inspect.getfile(cls)) for cls in (GRPOTrainer, GRPOConfig, Trainer, TrainingArguments)]


def prose(page):
    """A page without its fenced blocks and formulas."""
    return re.sub(r"\$`.*?`\$", "", FENCE.sub("", page.read_text()), flags=re.DOTALL)


def code_spans(page):
    """The texts between backticks on a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


@cache
def definitions():
    """
    What the package, TRL's and transformers' trainers and the benchmarks define: all names, and the members of each class. A
    name in a comment or a string is no definition.
    """
    names, members = set(), defaultdict(set)
    for path in [*SOURCES, *INHERITED]:
        for node in ast.walk(ast.parse(path.read_text())):
            names |= defined_by(node)
            if isinstance(node, ast.ClassDef):
                # Its methods and fields, and what methods set on `self`; not the variables within methods
                within = [part for child in node.body for part in (child, *getattr(child, "targets", ()))]
                within += [child.target for child in node.body if isinstance(child, ast.AnnAssign)]
                within += [child for child in ast.walk(node) if isinstance(child, ast.Attribute)]
                members[node.name] |= {word for child in within for word in defined_by(child)}
    return names, members


def defined_by(node):
    """The names that a node of a syntax tree defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
        return {node.id if isinstance(node, ast.Name) else node.attr}
    return {node.arg} if isinstance(node, ast.arg) else set()


def has_member(cls, member):
    """Whether a class of the package, TRL, transformers or PEFT has a member, inherited ones included."""
    if member in definitions()[1].get(cls, ()):
        return True
    found = [getattr(package, cls) for package in (trl_prime, trl, transformers, peft) if hasattr(package, cls)]
    return any(hasattr(each, member) or member in getattr(each, "__dataclass_fields__", {}) for each in found)


def missing_names(span):
    """Find the names in a code span that nobody defines: private names, files, members of classes, dotted names of the package."""
    missing = set(re.findall(r"(?<![\w.])_[a-z]\w*", span)) - definitions()[0]
    files = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    for file in re.findall(r"[\w./-]+\.py\b", span):
        if file not in OF_THE_READER and not any(f"/{path}".endswith(f"/{file}") for path in files):
            missing.add(file)
    if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", span) and not (ROOT / span).exists():
        missing.add(span)
    for cls, member in re.findall(r"(?<![\w.-])([A-Z]\w*[a-z]\w*)\.([a-z_]\w*)\b(?!\.)", span):
        if not has_member(cls, member):
            missing.add(f"{cls}.{member}")
    for path in re.findall(r"(?<![\w.-])trl_prime(?:\.\w+)+", span):
        try:
            pkgutil.resolve_name(path)
        except (ImportError, AttributeError):
            missing.add(path)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_code_spans_name_exists(page):
    assert {span: missing for span in code_spans(page) if (missing := missing_names(span))} == {}


@pytest.mark.parametrize(
    ("span", "missing"),
    [
        ("_update_prm", {"_update_prm"}),
        ("_rewards_per_func", set()),
        ("_calculate_rewards", set()),
        ("implicit_prm/updater.py", set()),
        ("implicit_prm/scoring.py: PRMUpdater", {"implicit_prm/scoring.py"}),
        ("advantages.py, prompt_filters.py", {"prompt_filters.py"}),
        ("benchmarks/results/steps.json", {"benchmarks/results/steps.json"}),
        ("ImplicitPRM.from_pretrained", set()),
        ("ImplicitPRM.load", {"ImplicitPRM.load"}),
        ("PRMUpdater.updates", {"PRMUpdater.updates"}),
        ("PRMUpdater.chunks", {"PRMUpdater.chunks"}),  # a variable of one of its methods
        ("PRIMETrainer.save_model", set()),
        ("GRPOConfig.scale_reward", {"GRPOConfig.scale_reward"}),
        ("trl_prime.rewards.math_rewarded", {"trl_prime.rewards.math_rewarded"}),
    ],
)
def test_the_guard_of_names_sees(span, missing):
    assert missing_names(span) == missing


def test_names_in_the_text_exist():
    """Settings, metrics, functions and columns that pages name are fields, or occur in the package, recipes, benchmarks or TRL."""
    files = [path for folder in ("trl_prime", "recipes", "benchmarks") for path in (ROOT / folder).rglob("*.*")]
    files = [path for path in files if path.suffix in (".py", ".yaml")]
    files.append(Path(inspect.getfile(GRPOTrainer)))
    known = fields("train") | set(trl_rewards())
    known |= {word for path in files for word in re.findall(r"\w+", path.read_text())}
    for page in PAGES:
        named = set(re.findall(r"`([a-z]+_\w+)(?:: [^`]*|\(.*?\))?`", prose(page))) - {"stand_ins"}
        assert named <= known, (page.name, named - known)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_in_the_text_exist(page):
    # `name: value` and `--name value`
    known = {field for command in COMMANDS for field in fields(command)} | OPTIONS_OF_BENCHMARKS | {"help"}
    named = {match[1] for span in code_spans(page) if (match := re.fullmatch(r"([a-z]\w*): \S.*", span))}
    named |= {flag for span in code_spans(page) for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", span)}
    assert named <= known, named - known


def test_every_command_that_is_named_exists_and_every_command_is_named():
    # Templates and workflows name commands too
    pages = [*PAGES, *(ROOT / ".github").rglob("*.*")]
    named = set(re.findall(r"`(?:HF_HUB_OFFLINE=1 )?trl-prime (\w+)", "".join(page.read_text() for page in pages)))
    assert named == set(COMMANDS)


# --- What the docs have to name ---


def test_every_setting_is_described():
    fields_of_trl = {field.name for field in dataclasses.fields(GRPOConfig)}
    own = [field for field in dataclasses.fields(PRIMEConfig) if field.name not in fields_of_trl]
    assert "prm_beta" in {field.name for field in own}
    for field in own:
        assert f"{field.name} (`" in PRIMEConfig.__doc__, field.name
        assert field.metadata.get("help"), field.name


def test_every_metric_is_in_the_docs(train):
    sources = "".join(path.read_text() for path in (ROOT / "trl_prime").rglob("*.py"))
    metrics = set(re.findall(r"(?:_log|log_metric)\(\s*\"([\w/]+)\"", sources))
    # The learner's names have no prefix where they are written
    logs = train(bf16=True, prm_num_epochs=2, max_steps=1, advantage_estimator="gae").state.log_history
    metrics |= {name for row in logs for name in row if name.startswith(("prm/", "value/"))}
    assert {"prm/precision", "prm/loss", "prm/trust", "prm/pairwise_accuracy_after_update"} <= metrics
    assert {"value/loss", "value/explained_variance", "value/process_explained_variance"} <= metrics
    assert "filter/pass_rate" in metrics and "math_reward/undecided" in metrics
    settings = (ROOT / "docs" / "settings.md").read_text()
    assert {metric for metric in metrics if f"`{metric}`" not in settings} == set()


# --- Links ---


def anchor(heading):
    """The anchor of a heading, as GitHub and MkDocs make it."""
    text = re.sub(r"[`*]|\]\(.*?\)|\[", "", heading).lower()
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text).strip())


def documented(page):
    """Dotted paths that a page of the API reference documents, which are anchors too."""
    text = page.read_text()
    paths = set(re.findall(r"^::: ([\w.]+)", text, re.MULTILINE))
    for path, options in re.findall(r"^::: ([\w.]+)\n((?:    .*\n)+)", text, re.MULTILINE):
        members = re.search(r"members: \[(.*?)\]", options)
        paths |= {f"{path}.{member}" for member in members[1].split(", ")} if members else set()
    return paths


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_line_turns_into_a_heading_by_chance(page):
    # "#12" at the start of a wrapped line is one to MkDocs, and text to GitHub
    assert re.findall(r"^#+[^#\s].*$", FENCE.sub("", page.read_text()), re.MULTILINE) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_within_the_project_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "mailto:")):
            continue
        file, _, fragment = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        if fragment and linked.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", linked.read_text()), re.MULTILINE)
            assert fragment in {*map(anchor, headings), *documented(linked)}, target


def test_what_the_api_reference_documents_exists():
    for path in documented(ROOT / "docs" / "api.md"):
        parts = path.split(".")
        for i in range(len(parts), 0, -1):
            with contextlib.suppress(ModuleNotFoundError):
                found = importlib.import_module(".".join(parts[:i]))
                break
        for part in parts[i:]:
            found = getattr(found, part)
        assert found.__doc__, path


def test_every_page_is_in_the_navigation():
    # Other tags than those of data name Python objects
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)
    navigation = re.findall(r"[\w-]+\.md", json.dumps(config["nav"]))
    assert sorted(navigation) == sorted(page.name for page in DOCS)


@pytest.mark.skipif(not importlib.util.find_spec("mkdocstrings_handlers"), reason="needs trl-prime[docs]")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    concepts = (tmp_path / "concepts" / "index.html").read_text()
    assert concepts.count("<math") > 20 and "```math" not in concepts and "$`" not in concepts
    api = (tmp_path / "api" / "index.html").read_text()
    assert "*optional*" not in api and "[`" not in api
    # No script, style or font from elsewhere
    pages = "".join(page.read_text() for page in tmp_path.rglob("*.html"))
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?https?://(?!localhost)[^>]*>", pages)
