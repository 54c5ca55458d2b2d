"""Runs a model-written solution: as a script, or serving calls to what it defines.

This process belongs to the solution: it can do to it what it likes. Nothing here is secret, and what it sends is treated
as data by the other side.
"""

import ast
import builtins
import collections
import inspect
import operator
import re
import sys
import types
from collections.abc import Iterable, Mapping, Set
from typing import Any

import prelude
import wire

# The interpreter starts without `site`, which defines these
builtins.exit = builtins.quit = sys.exit
# What solutions and tests take for granted is found where Python's own names are: nothing is copied for each of them
vars(builtins).update(prelude.PRELUDE)


def open_streams() -> None:
    """Text streams over descriptors 0 to 2 as they are now, not as they were when the interpreter started."""
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = open(fd, mode, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _execute(source: str, name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    if "Sorted" in source:
        module.__dict__.update(prelude.packaged({"SortedList", "SortedDict", "SortedSet"}))
    exec(compile(source, "<solution>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def run_script(source: str) -> None:
    """Run the solution as `python solution.py` would."""
    path_open = builtins.open
    # The link behind this name needs /proc, which is hidden
    builtins.open = lambda file, *args, **kwargs: path_open(0 if file == "/dev/stdin" else file, *args, **kwargs)
    _execute(source, "__main__")


def serve(fd: int) -> None:
    """
    Receive the solution over `fd`, import it, then answer calls until the other side hangs up.

    The first answer is `{"names": [...]}`, the functions and classes it defines, or `{"error": [type, text]}`. Requests
    are `["solve", name, args, kwargs]` (a function, or a method of a fresh `Solution`; the answer is of the forms that
    [`~trl_prime.rewards.programs.same_value`] compares), `["call", target, args, kwargs]`,
    `["attribute", target, name]` and `["method", target, name, args]`; a target is a name or a handle. Answers are
    `{"value": ...}` or `{"error": ...}`, and `"arguments"` where the call changed them. A function among the arguments is
    called back by `{"callback": [index, args]}`.
    """
    channel = wire.Channel(fd)
    _Server(channel).run(channel.receive())


class _Server:
    def __init__(self, channel: wire.Channel):
        self.channel = channel
        self.namespace: dict[str, Any] = {}
        self.words: set[str] = set()
        self.objects: list[Any] = []
        self.handles: dict[int, int] = {}

    def run(self, source: str) -> None:
        try:
            self.namespace = _execute(source, "solution")
            self.words = set(re.findall(r"\w+", source))
            defined = [name for name in self.namespace if not name.startswith("__") and callable(self.namespace[name])]
            defined = [name for name in defined if not self.is_taken_for_granted(name)]
        except BaseException as error:  # SystemExit too: the solution is asked, it does not run the show
            self.channel.send({"error": _describe(error)})
            return
        self.channel.send({"names": defined})
        while True:
            try:
                request = self.channel.receive()
            except EOFError:
                return
            try:
                answer = self.answer(*request)
            except BaseException as error:
                answer = {"error": _describe(error)}
            self.channel.send(answer)

    def answer(self, kind: str, target: Any, *rest: Any) -> dict[str, Any]:
        if kind == "attribute":
            return {"value": self.encode(getattr(self.target(target), rest[0]))}
        if kind == "method":
            method = getattr(operator, rest[0], None) or getattr(_Functions, rest[0])
            return {"value": self.encode(method(self.target(target), *map(self.decode, rest[1])))}
        arguments = [self.decode(form) for form in rest[0]]
        named = {name: self.decode(form) for name, form in rest[1].items()}
        if kind == "solve":
            return {"value": self.solve(target, arguments)}
        value = self.encode(self.target(target)(*arguments, **named))
        before = [*rest[0], *rest[1].values()]
        after = [
            self.changed(argument, form) for argument, form in zip((*arguments, *named.values()), before, strict=True)
        ]
        if after == [form if changed is not None else None for form, changed in zip(before, after, strict=True)]:
            return {"value": value}
        return {"value": value, "arguments": after}

    def changed(self, argument: Any, form: Any) -> Any:
        """Encode what a call may have changed of an argument that came in this form; None for everything else."""
        if isinstance(argument, (list, dict, set, bytearray, collections.deque)):
            return self.encode(argument)
        if isinstance(form, dict) and isinstance(form.get("handle"), dict):
            (kind,) = form["handle"]
            return {"handle": {kind: [self.encode(value) for value in prelude.values_of(argument, kind)]}}
        return None

    def solve(self, target: str, arguments: list[Any]) -> Any:
        """
        Call a function with values that came from JSON, and encode what it returned for a comparison with such a value.

        Its types say which lists stand for trees or linked lists, and that a function which returns nothing changes its
        first argument. They are the function's annotations, or those of the row, which follow the name:
        `"invertTree(root: Optional[TreeNode]) -> Optional[TreeNode]"`.
        """
        name = target.partition("(")[0]
        function = self.find(name)
        declared, returned = _types_of_text(target) if name != target else _types_of_function(function)
        declared += [_ValueType()] * len(arguments)
        values = [self.nodes(argument, of) for argument, of in zip(arguments, declared, strict=False)]
        for i, of in enumerate(declared[: len(values)]):
            # A node of the tree before it is given by its value: lowestCommonAncestor([3, 5, 1], 5, 1)
            if of.node and i and isinstance(values[i], (int, str)) and prelude.node_kind(values[0]):
                values[i] = prelude.find_node(values[0], of.node, values[i])
        value = function(*values)
        if value is None and returned.nothing and values:
            value, returned = values[0], declared[0]
        return _plain(value, returned)

    def nodes(self, argument: Any, of: "_ValueType") -> Any:
        """Make the tree or linked list that a list stands for where a node is declared."""
        if of.node is None:
            return argument
        if of.many and isinstance(argument, list):
            return [self.make(item, of.node) for item in argument]
        return self.make(argument, of.node)

    def make(self, values: Any, kind: str) -> Any:
        if not isinstance(values, list):
            return values
        return prelude.make_nodes(values, kind, self.namespace.get(kind, prelude.NODES[kind]))

    def find(self, name: str) -> Any:
        """A function by name: a method of `Solution`, where there is one, else of the module."""
        solution = self.namespace.get("Solution")
        if isinstance(solution, type) and hasattr(solution, name):
            return getattr(solution(), name)
        return self.target(name)

    def target(self, target: Any) -> Any:
        if not isinstance(target, str):
            return self.objects[target]
        if target not in self.namespace or self.is_taken_for_granted(target):
            raise NameError(f"the solution does not define {target!r}")
        return self.namespace[target]

    def is_taken_for_granted(self, name: str) -> bool:
        """Tell whether a name is the prelude's and the solution does not even mention it, as it would to import it."""
        return name not in self.words and self.namespace[name] is prelude.PRELUDE.get(name)

    def encode(self, value: Any) -> Any:
        return wire.encode(value, self.refer)

    def refer(self, value: Any) -> dict[str, Any]:
        if id(value) not in self.handles:
            self.handles[id(value)] = len(self.objects)
            self.objects.append(value)  # which also keeps its identity from being given to another one
        return {"handle": self.handles[id(value)]}

    def decode(self, form: Any) -> Any:
        return wire.decode(form, self.resolve)

    def resolve(self, body: Any) -> Any:
        if isinstance(body, int):
            return self.objects[body]
        if isinstance(body, dict):
            ((kind, forms),) = body.items()
            return self.make([self.decode(form) for form in forms], kind)
        (index,) = body  # a function of the other side

        def call_back(*args: Any) -> Any:
            self.channel.send({"callback": [index, [self.encode(argument) for argument in args]]})
            answer = self.channel.receive()
            if "error" in answer:
                raise RuntimeError(answer["error"])
            return self.decode(answer["value"])

        return call_back


class _Functions:
    """Operations on handles that the operator module lacks."""

    iter = staticmethod(iter)
    next = staticmethod(next)
    len = staticmethod(len)
    str = staticmethod(str)
    repr = staticmethod(repr)
    float = staticmethod(float)
    hash = staticmethod(hash)
    setattr = staticmethod(setattr)


class _ValueType:
    """An annotation says of a value whether it is a node, a list of nodes, or nothing."""

    def __init__(self, annotation: str = ""):
        found = re.search(r"\b(TreeNode|ListNode)\b", annotation)
        self.node = found.group() if found else None
        self.many = re.search(r"\blist\s*\[", annotation, re.IGNORECASE) is not None
        self.nothing = annotation in ("None", "NoneType", "void")


def _types_of_function(function: Any) -> tuple[list[_ValueType], _ValueType]:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return [], _ValueType()
    # LeetCode's heads for Python 2 have types in the docstring
    documented = dict(re.findall(r":type +(\w+): *(.*)", getattr(function, "__doc__", None) or ""))
    (returned,) = re.findall(r":rtype: *(\w.*)", getattr(function, "__doc__", None) or "")[:1] or [""]
    parameters = [
        _type_of(parameter.annotation, documented.get(name, "")) for name, parameter in signature.parameters.items()
    ]
    return parameters, _type_of(signature.return_annotation, returned.partition(" ")[0])


def _type_of(annotation: Any, documented: str) -> _ValueType:
    if annotation is inspect.Signature.empty:
        return _ValueType(documented)
    if isinstance(annotation, str):
        return _ValueType(annotation)
    # For instance typing.Optional[solution.TreeNode], a class of typing with one of the solution
    return _ValueType(annotation.__name__ if type(annotation) is type else repr(annotation))


def _types_of_text(text: str) -> tuple[list[_ValueType], _ValueType]:
    (head,) = ast.parse(f"def {text}: pass").body
    parameters = [ast.unparse(argument.annotation) if argument.annotation else "" for argument in head.args.args]
    return list(map(_ValueType, parameters)), _ValueType(ast.unparse(head.returns) if head.returns else "")


def _plain(value: Any, of: _ValueType) -> Any:
    """Encode a returned value: nodes as their values, and everything else that can be iterated over as a list."""
    if of.node and value is None:
        return {of.node: []}
    if of.node and of.many and isinstance(value, list):
        return [{of.node: []} if item is None else wire.encode(item, _plain_object) for item in value]
    return wire.encode(value, _plain_object)


def _plain_object(value: Any) -> Any:
    kind = prelude.node_kind(value)
    if kind is not None:
        return {kind: [wire.encode(item, _plain_object) for item in prelude.values_of(value, kind)]}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return wire.encode(value.tolist(), _plain_object)
    if isinstance(value, Mapping):
        return wire.encode(dict(value), _plain_object)
    if isinstance(value, Set) and not isinstance(value, collections.abc.MappingView):
        return wire.encode(set(value), _plain_object)
    if isinstance(value, Iterable):
        return wire.encode(list(value), _plain_object)
    raise wire.NotPlain(f"a value of type {type(value).__name__} is not plain data")


def _describe(error: BaseException) -> list[str]:
    try:
        return [type(error).__name__, str(error)[:1000]]
    except BaseException:  # an exception class may misbehave as well
        return ["Exception", ""]
