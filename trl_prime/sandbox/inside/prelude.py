"""This is what solutions and tests take for granted: names without an import, and the nodes of trees and linked lists.

Both sides of the sandbox import this module, and so may the trainer: it holds nothing but the standard library's.
"""

import ast
import bisect
import builtins
import collections
import contextlib
import copy
import datetime
import fractions
import functools
import heapq
import importlib
import io
import itertools
import json
import math
import operator
import os
import random
import re
import statistics
import string
import symtable
import sys
import time
import typing
from collections.abc import Iterator
from typing import Any


class TreeNode:
    """A node of a binary tree, as LeetCode defines it."""

    def __init__(self, val=0, left=None, right=None):
        self.val = val
        self.left = left
        self.right = right


class ListNode:
    """A node of a linked list, as LeetCode defines it."""

    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next


NODES = {"TreeNode": TreeNode, "ListNode": ListNode}
_CHILDREN = {"TreeNode": ("left", "right"), "ListNode": ("next",)}
_MOST_NODES = 1_000_000

# Tests compare by these, and no solution replaces them. Solutions of the published data sets take them for granted too, as
# their graders do: LeetCode-style solutions annotate with `List` and call `heappush` or `lru_cache` without an import.
_MODULES = (
    bisect, collections, copy, datetime, fractions, functools, heapq, io, itertools, json, math, operator, os, random, re,
    statistics, string, sys, time, typing,
)  # fmt: skip
TOOLS: dict[str, Any] = {module.__name__: module for module in _MODULES}
for _module, _names in (
    (typing, "Any Callable Deque Dict Generator Iterable Iterator List Optional Sequence Set Tuple Union"),
    (collections, "ChainMap Counter OrderedDict defaultdict deque namedtuple"),
    (functools, "cache cmp_to_key lru_cache reduce"),
    (itertools, "accumulate chain combinations count cycle groupby islice permutations product zip_longest"),
    (heapq, "heapify heappop heappush heappushpop heapreplace nlargest nsmallest"),
    (bisect, "bisect bisect_left bisect_right insort"),
    (math, "ceil comb cos exp fabs factorial floor gcd inf isqrt log log2 log10 pi sin sqrt tan"),
    (operator, "itemgetter"),
    (copy, "deepcopy"),
):
    TOOLS |= {name: getattr(_module, name) for name in _names.split()}

# These are Python's own names inside the sandbox; elsewhere `site` adds the last two, and more
BUILTINS = frozenset(dir(builtins)) - {"copyright", "credits", "help", "license", "_"} | {"exit", "quit"}
# LeetCode's solutions are published for an environment that has imported all names of these modules
STANDARD: dict[str, Any] = {
    name: value
    for module in (typing, functools, collections, itertools, heapq, bisect, string, operator, math)
    for name, value in vars(module).items()
    if name in getattr(module, "__all__", [name]) and not name.startswith("_") and name not in BUILTINS
}
PRELUDE: dict[str, Any] = STANDARD | TOOLS | NODES
# These packages are looked for where code names what they have
PACKAGES = {
    "np": "numpy",
    "numpy": "numpy",
    "SortedList": "sortedcontainers",
    "SortedDict": "sortedcontainers",
    "SortedSet": "sortedcontainers",
}


class Ambiguous(ValueError):
    """The tests do not say what is under test."""


def tested_names(setup: str, asserts: list[str], entry_point: str | None = None) -> set[str]:
    """
    Tell which names of tests the solution is to define. The tests alone decide that: whatever else a solution defines, the
    tests do not see it.

    These are the names that the tests use without defining them, less Python's own and those that tests compare by. A name
    of the standard library's that is applied to what another one returns compares as well: `isclose` in
    `isclose(area(2), 12.6)`. Where nothing remains, what is under test is named like one of these: `sum` in
    `assert sum(10, 15) == 6`, `permutations` in `assert Counter(permutations(xs)) == Counter(expected)`.

    Args:
        setup (`str`): Code that runs before the asserts.
        asserts (`list[str]`): Statements.
        entry_point (`str`, *optional*): A function, or a call of a method such as `Solution().solve`, that is under test
            whatever it is named like.

    Returns:
        `set[str]`

    Raises:
        Ambiguous: Several names may be under test, or none.
        SyntaxError: The tests are not Python.
    """
    code = "\n".join([setup, *asserts])
    free = {name for name in _free_names(code) if not name.startswith("__")}
    unknown = free - BUILTINS - TOOLS.keys() - NODES.keys() - PACKAGES.keys()
    standard = unknown & STANDARD.keys()
    if entry_point:
        return unknown - standard | {re.split(r"\W", entry_point)[0]}
    if unknown and not standard:
        return unknown
    applied = _applied_names(code)
    tested = unknown - {name for name in standard if applied.get(name, set()) & unknown - {name}}
    if tested:
        return tested
    called = {name for name in applied if name in free and name in TOOLS.keys() | BUILTINS}
    # Builtin types make arguments and expected values
    functions = {name for name in called if not isinstance(getattr(builtins, name, None), type)}
    for names in (functions, called):
        inner = {name for name in names if not applied[name] & names - {name}}
        if len(inner) == 1:
            return inner
    raise Ambiguous("the tests do not say which function is under test. Add its name as `entry_point`")


def _free_names(code: str) -> set[str]:
    """List the names that code uses as global ones and does not define."""
    top = symtable.symtable(code, "<tests>", "exec")
    used, tables = set(), [top]
    while tables:
        table = tables.pop()
        used |= {
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_referenced() and (table is top or symbol.is_global())
        }
        tables += table.get_children()
    defined = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    return used - defined


def _applied_names(code: str) -> dict[str, set[str]]:
    """For each name that code calls, list the names in the arguments of its calls."""
    applied: dict[str, set[str]] = {}
    for call in ast.walk(ast.parse(code)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            names = applied.setdefault(call.func.id, set())
            for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
                names.update(node.id for node in ast.walk(argument) if isinstance(node, ast.Name))
    return applied


def packaged(names: set[str]) -> dict[str, Any]:
    """Import those of the names that installed packages have, see [`PACKAGES`]."""
    found = {}
    for name in PACKAGES.keys() & names:
        with contextlib.suppress(ImportError):
            module = importlib.import_module(PACKAGES[name])
            found[name] = getattr(module, name, module)
    return found


def node_kind(value: Any) -> str | None:
    """Tell whether a value is a node: its kind's name, or None."""
    for kind in type(value).__mro__:
        fields = _CHILDREN.get(kind.__name__)
        if fields and all(hasattr(value, name) for name in ("val", *fields)):
            return kind.__name__
    return None


def values_of(node: Any, kind: str) -> list[Any]:
    """
    List the values of a tree or of a linked list as LeetCode writes it: a tree in level order, with None for a missing child
    and none at the end.

    Raises:
        ValueError: It has a cycle, or more nodes than a test has.
    """
    values = [None if node is None else node.val for node in _nodes(node, kind)]
    while values and values[-1] is None and kind == "TreeNode":
        values.pop()
    return values


def find_node(node: Any, kind: str, value: Any) -> Any:
    """Find the first node with a value in a tree or a linked list; None where there is none."""
    return next((found for found in _nodes(node, kind) if found is not None and found.val == value), None)


def _nodes(node: Any, kind: str) -> Iterator[Any]:
    queue = collections.deque([node])
    for _ in range(_MOST_NODES):
        if not queue:
            return
        node = queue.popleft()
        if node is not None:
            queue.extend(getattr(node, name) for name in _CHILDREN[kind])
        elif kind == "ListNode":
            return
        yield node
    raise ValueError("it has a cycle, or too many nodes")


def make_nodes(values: list[Any], kind: str, node_type: Any) -> Any:
    """Make a tree or a linked list of [`values_of`] it: its first node, or None."""
    if not values:
        return None
    if kind == "ListNode":
        head = None
        for value in reversed(values):
            node = node_type(value)
            node.next = head
            head = node
        return head
    nodes = [None if value is None else node_type(value) for value in values]
    waiting = collections.deque(nodes[:1])
    following = iter(nodes[1:])
    while waiting:
        parent = waiting.popleft()
        if parent is not None:
            parent.left = next(following, None)
            parent.right = next(following, None)
            waiting.extend((parent.left, parent.right))
    return nodes[0]


def copy_node(node: Any, target: Any, kind: str) -> None:
    """Give one node another one's value and children."""
    for name in ("val", *_CHILDREN[kind]):
        setattr(target, name, getattr(node, name))
