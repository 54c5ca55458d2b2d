"""Imports of the package: none runs up or in a circle, and importing it loads no more than it must.

The graph is drawn from the code. Covered: every import statement, also inside functions, and the modules that a lazy
`__init__.py` names, as `".model"`. Not covered: imports for type checkers only, and names that are put together at run time.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trl_prime

PACKAGE = Path(trl_prime.__file__).parent
GROUND_FLOOR = ("hub", "process_exit", "processes", "specs", "texts", "version")
ABOVE_THE_PRM = ("commands", "evaluation", "offline_prm", "prime_config", "prime_trainer", "reports", "value_model")
# Programs in the sandbox's box have this folder on their path, and import their neighbours by bare names
SCRIPTS = f"{PACKAGE.name}.sandbox.inside"


# --- The graph ---


def import_graph(package):
    """{module: modules of the same package that it imports}, all by their full names."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: sorted((imported_names(name, path, files) & files.keys()) - {name}) for name, path in files.items()}


def imported_names(name, path, modules):
    """The full names that a file imports; `from a import b` counts as `a.b` where that is a module, else as `a`."""
    folder = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names, pending = set(), [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module or "", node.level, folder)
            inner = {f"{base}.{alias.name}" for alias in node.names}
            names |= (inner & modules.keys()) | ({base} if inner - modules.keys() else set())
        elif isinstance(node, ast.Constant) and path.name == "__init__.py" and str(node.value).startswith("."):
            names.add(folder + str(node.value))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)
    return names | {f"{folder}.{bare}" for bare in names if folder == SCRIPTS}


def absolute(module, level, folder):
    """The full name of what `from ..module` means in a module of this folder."""
    if not level:
        return module
    above = folder.split(".")[: len(folder.split(".")) - level + 1]
    return ".".join([*above, *([module] if module else [])])


def room(module):
    """The file or folder at the top of the package that a module belongs to."""
    return ".".join(module.split(".")[:2])


def graph_of_rooms(graph):
    """{room: rooms that it imports}; the lazy face of the package is left out, since all is below it."""
    rooms = {room(module): set() for module in graph if "." in module}
    for module, imported in graph.items():
        if "." in module:
            rooms[room(module)] |= {room(other) for other in imported} - {room(module)}
    return {name: sorted(imported) for name, imported in rooms.items()}


def chain(graph, start, is_goal):
    """The shortest chain of imports from a module to one that `is_goal`, or None: `[start, ..., goal]`."""
    chains, seen = [[start]], {start}
    for path in chains:
        for module in graph.get(path[-1], ()):
            if is_goal(module):
                return [*path, module]
            if module not in seen:
                seen.add(module)
                chains.append([*path, module])
    return None


def circle(graph):
    """A shortest circle of imports of the graph, or None."""
    circles = [chain(graph, module, lambda goal, start=module: goal == start) for module in sorted(graph)]
    return min((found for found in circles if found), key=len, default=None)


def shown(chain):
    return " -> ".join(chain)


@pytest.fixture(scope="module")
def graph():
    return import_graph(PACKAGE)


def test_the_graph_holds_each_kind_of_import(tmp_path):
    files = {
        "__init__": "_MODULES = {'Late': '.late'}",
        "late": "import pack.sub.deep as deep\nimport json",
        "top": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import late\nelse:\n    from . import ground",
        "ground": "WORD = '.late'",
        "sub/__init__": "from ..top import name",
        "sub/deep": "def f():\n    try:\n        from .. import ground, top\n    finally:\n        from . import sibling, nothing",
        "sub/sibling": "from pack.ground import WORD",
    }
    for name, source in files.items():
        path = tmp_path / "pack" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    graph = import_graph(tmp_path / "pack")
    assert graph == {
        "pack": ["pack.late"],
        "pack.late": ["pack.sub.deep"],
        "pack.top": ["pack.ground"],
        "pack.ground": [],
        "pack.sub": ["pack.top"],
        "pack.sub.deep": ["pack.ground", "pack.sub", "pack.sub.sibling", "pack.top"],
        "pack.sub.sibling": ["pack.ground"],
    }
    assert circle(graph) is None
    to_top = ["pack", "pack.late", "pack.sub.deep", "pack.top"]
    assert chain(graph, "pack", lambda module: module == "pack.top") == to_top
    graph["pack.top"].append("pack.late")
    assert circle(graph) == [*to_top[1:], "pack.late"]


def test_two_rooms_import_each_other_without_a_circle_of_modules():
    graph = {"pack.a.x": ["pack.b.y"], "pack.b.y": [], "pack.b.z": ["pack.a.x", "pack.c"], "pack.c": []}
    assert circle(graph) is None
    assert graph_of_rooms(graph) == {"pack.a": ["pack.b"], "pack.b": ["pack.a", "pack.c"], "pack.c": []}
    assert circle(graph_of_rooms(graph)) == ["pack.a", "pack.b", "pack.a"]


def test_the_graph_is_that_of_the_package(graph):
    # One import of each kind: at the top, inside a function, of a lazy face, by a bare name in the box
    for module, imported in (
        ("prime_trainer", "prime_config"),
        ("evaluation", "specs"),
        ("implicit_prm", "implicit_prm.model"),
        ("sandbox.inside.examiner", "sandbox.inside.wire"),
    ):
        assert f"trl_prime.{imported}" in graph[f"trl_prime.{module}"]
    assert "trl_prime.prime_trainer" in graph["trl_prime"]


# --- No import runs up ---


def test_no_circle_of_modules(graph):
    found = circle(graph)
    assert found is None, f"These modules import each other: {shown(found)}"


def test_no_circle_of_rooms(graph):
    found = circle(graph_of_rooms(graph))
    if found:
        edges = [
            f"{module} imports {other}"
            for first, second in zip(found, found[1:], strict=False)
            for module, imported in graph.items()
            for other in imported
            if (room(module), room(other)) == (first, second)
        ]
        pytest.fail(f"These rooms import each other: {shown(found)}; {', '.join(edges)}")


@pytest.mark.parametrize("name", GROUND_FLOOR)
def test_the_ground_floor_imports_nothing_of_ours(graph, name):
    found = chain(graph, f"trl_prime.{name}", lambda module: True)
    assert found is None, f"'{name}' is on the ground floor, but: {shown(found)}"


def test_the_implicit_prm_knows_no_trainer_and_nothing_else_above_it(graph):
    above = {f"trl_prime.{name}" for name in ABOVE_THE_PRM}
    assert above <= {room(module) for module in graph}
    for module in graph:
        if room(module) == "trl_prime.implicit_prm":
            found = chain(graph, module, lambda other: room(other) in above)
            assert found is None, f"The implicit PRM stands below the trainers, but: {shown(found)}"


# --- What is loaded ---


def modules_after(*statements: str) -> list[set[str]]:
    """The modules that are loaded after each of the statements, in one fresh interpreter."""
    code = "import sys\n" + "".join(f"{statement}\nprint(*sys.modules)\n" for statement in statements)
    lines = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [set(line.split(" ")) for line in lines[-len(statements) :]]


def test_importing_the_package_loads_no_framework():
    (loaded,) = modules_after("import trl_prime")
    assert "trl_prime" in loaded
    assert not loaded & {"torch", "transformers", "trl", "peft", "datasets", "matplotlib"}


def test_dir_shows_the_public_names():
    assert set(dir(trl_prime)) == {
        "ImplicitPRM",
        "OfflinePRMConfig",
        "OfflinePRMTrainer",
        "PRIMEConfig",
        "PRIMETrainer",
        "__version__",
        "load_prime_dataset",
    }
    assert all(getattr(trl_prime, name) is not None for name in dir(trl_prime))


def test_importing_the_trainer_loads_little_more_than_trl_does():
    trls, ours = modules_after(
        "from trl import GRPOTrainer, GRPOConfig", "from trl_prime import PRIMETrainer, PRIMEConfig, ImplicitPRM"
    )
    extra = {name.split(".")[0] for name in ours - trls}
    assert "trl_prime" in extra
    assert not extra & {"matplotlib", "math_verify", "sympy", "vllm", "deepspeed", "bitsandbytes"}
    assert len(ours - trls) < 60, sorted(ours - trls)


def test_reading_data_loads_no_trainer():
    of_prompts, of_outcomes = modules_after(
        "import trl_prime.data.adapters, trl_prime.data.formats", "import trl_prime.offline_prm.data"
    )
    assert not of_prompts & {"trl", "torch", "transformers", "peft"}
    # Rows with outcomes take TRL's functions on rows, with which TRL loads torch and transformers, but no trainer
    assert "trl.data_utils" in of_outcomes
    assert not [name for name in of_outcomes if name.startswith(("trl.trainer", "peft"))]
