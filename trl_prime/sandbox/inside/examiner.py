"""Runs tests against a solution that lives in another process.

Tests written as Python code (`assert f(2) == 4`) hold the expected results, so they must not share a process with the
solution: it could read them, or replace what compares them. Here every name that the solution defines is a stand-in that
passes calls on; values come back as plain data, on which comparison is Python's own. Objects of the solution's own
classes stay where they are, behind handles. A handle equals no plain value, is not ordered against one, gives no number
when one is added to it or taken from it, and does not say whether it contains one, whatever its class says: a solution
that is told the expected value could answer what the test wants to hear.

Nothing of the solution's is in reach of the tests but the names that they leave to it, see [`prelude.tested_names`].

Not covered: `isinstance` against a class of the solution, and tests that patch the solution's module.
"""

import builtins
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import prelude
import wire


class CandidateError(Exception):
    """An exception of the solution that is not a built-in one."""


class _Remote:
    """The other side of the channel to the solution."""

    def __init__(self, channel: wire.Channel):
        self.channel = channel
        self.functions: list[Any] = []

    def ask(self, *request: Any) -> dict[str, Any]:
        self.channel.send(request)
        while True:
            answer = self.channel.receive()
            if not isinstance(answer, dict):
                raise ValueError("not an answer")
            if "callback" not in answer:
                break
            try:
                index, args = answer["callback"]
                value = self.functions[index](*map(self.decode, args))
                self.channel.send({"value": self.encode(value)})
            except Exception as error:
                self.channel.send({"error": repr(error)[:1000]})
        if "error" in answer:
            name, text = answer["error"]
            kind = getattr(builtins, str(name), None)
            # In a `map` that a test goes through, a StopIteration would end the test early and well
            refused = (AssertionError,) if request[2:3] == ("next",) else (AssertionError, StopIteration)
            if isinstance(kind, type) and issubclass(kind, Exception) and kind not in refused:
                raise kind(str(text))
            raise CandidateError(f"{name}: {text}")
        return answer

    def call(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        answer = self.ask("call", target, list(map(self.encode, args)), {k: self.encode(v) for k, v in kwargs.items()})
        for argument, form in zip((*args, *kwargs.values()), answer.get("arguments") or (), strict=False):
            if form is not None:
                _update(argument, self.decode(form))
        return self.decode(answer["value"])

    def encode(self, value: Any) -> Any:
        return wire.encode(value, self.refer)

    def refer(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Handle):
            return {"handle": value._target}
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)):
            self.functions.append(value)
            return {"handle": [len(self.functions) - 1]}
        kind = prelude.node_kind(value)
        if kind is not None:
            return {"handle": {kind: [self.encode(item) for item in prelude.values_of(value, kind)]}}
        raise wire.NotPlain(f"a value of type {type(value).__name__} cannot be given to the solution")

    def decode(self, form: Any) -> Any:
        return wire.decode(form, self.resolve)

    def resolve(self, body: Any) -> Any:
        if isinstance(body, list):
            return self.functions[body[0]]  # one of our own functions came back
        if isinstance(body, dict):
            return _Nodes(body, self.decode)
        return Handle(self, body)


class _Nodes:
    """The state in which a call left a tree or a linked list."""

    def __init__(self, body: dict[str, Any], decode: Callable[[Any], Any]):
        ((self.kind, forms),) = body.items()
        self.values = [decode(form) for form in forms]


def _update(argument: Any, after: Any) -> None:
    """Make a container equal to what the call left of it."""
    if isinstance(after, _Nodes):
        if prelude.node_kind(argument) == after.kind and after.values:
            prelude.copy_node(prelude.make_nodes(after.values, after.kind, type(argument)), argument, after.kind)
    elif isinstance(argument, (list, bytearray)) and type(argument) is type(after):
        argument[:] = after
    elif isinstance(argument, (dict, set)) and isinstance(after, type(argument)):
        argument.clear()
        argument.update(after)
    elif type(argument) is type(after):
        argument.clear()
        argument.extend(after)


class Handle:
    """Stands for something that lives in the solution's process: a function, a class, or an object."""

    def __init__(self, remote: _Remote, target: Any):
        self.__dict__.update(_remote=remote, _target=target, _told=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._remote.call(self._target, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # Libraries ask a value for these attributes: NumPy takes a memory address from some of them
            raise AttributeError(name)
        return self._remote.decode(self._remote.ask("attribute", self._target, name)["value"])

    def __setattr__(self, name: str, value: Any) -> None:
        self._method("setattr", name, value)

    def _method(self, name: str, *args: Any) -> Any:
        if self._told and name in ("truth", "float"):
            raise TypeError(f"{name} of what the solution made of a plain value")
        answer = self._remote.ask("method", self._target, name, list(map(self._remote.encode, args)))
        return self._remote.decode(answer["value"])

    def __eq__(self, other: Any) -> bool:
        # Only two objects of the solution may be compared by the solution's own rule
        return isinstance(other, Handle) and self._method("eq", other) is True

    def __hash__(self) -> int:
        return hash(self._method("hash"))

    def __bool__(self) -> bool:
        return self._method("truth") is True

    def __iter__(self) -> "Handle":
        return self._method("iter")


def _operation(name: str) -> Any:
    return lambda self, *args: self._method(name, *args)


def _comparison(name: str) -> Any:
    return lambda self, other: self._method(name, other) if isinstance(other, Handle) else NotImplemented


def _arithmetic(name: str) -> Any:
    def operate(self: Handle, other: Any) -> Any:
        value = self._method(name, other)
        if not isinstance(other, Handle):
            if not isinstance(value, Handle):
                raise TypeError(f"{name} of an object of the solution and a plain value gave a plain value")
            value.__dict__["_told"] = True
        return value

    return operate


for _name in ("getitem", "setitem", "delitem", "neg", "next", "len", "str", "repr", "float"):
    setattr(Handle, f"__{_name}__", _operation(_name))
for _name in ("lt", "le", "gt", "ge"):
    setattr(Handle, f"__{_name}__", _comparison(_name))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod"):
    setattr(Handle, f"__{_name}__", _arithmetic(_name))


def serve(verdict_fd: int, candidate_fd: int) -> None:
    """Receive `[solution, tests]` over `verdict_fd` and answer each verdict there; the solution's process is behind
    `candidate_fd`."""
    verdicts = wire.Channel(verdict_fd)
    solution, tests = verdicts.receive()
    for verdict in examine(wire.Channel(candidate_fd), solution, tests):
        verdicts.send(verdict)


def examine(channel: wire.Channel, solution: str, tests: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """
    Run tests against a solution.

    Args:
        channel ([`wire.Channel`]): To a process that runs [`candidate.serve`].
        solution (`str`): Its source.
        tests (`dict`): `{"setup": code, "asserts": [code, ...], "entry_point": name | None, "names"?: [name, ...]}`. `setup`
            runs here and its definitions win over the solution's; `entry_point` is always the solution's, and of its other
            names only `names`, which are worked out of the tests where they are left out.

    Yields:
        `dict`: For each assert `{"passed": bool, "error": str}`.
    """
    try:
        channel.send(solution)
        namespace = _namespace(_Remote(channel), tests)
    except Exception as error:
        for _ in tests["asserts"]:
            yield {"passed": False, "error": _text(error)}
        return
    for code in tests["asserts"]:
        try:
            exec(compile(code, "<test>", "exec", dont_inherit=True), namespace)
            verdict = {"passed": True, "error": ""}
        except BaseException as error:
            verdict = {"passed": False, "error": _text(error)}
        yield verdict


def _namespace(remote: _Remote, tests: dict[str, Any]) -> dict[str, Any]:
    hello = remote.channel.receive()
    if "error" in hello:
        raise CandidateError(f"the solution does not load: {': '.join(hello['error'])}")
    setup, asserts, entry_point = tests["setup"], tests["asserts"], tests["entry_point"]
    names = set(tests.get("names") or prelude.tested_names(setup, asserts, entry_point))
    for name in names & prelude.PRELUDE.keys():
        delattr(builtins, name)  # the tests find the solution's or none
    namespace = {"__name__": "__test__"}
    namespace |= prelude.packaged(set(re.findall(r"\w+", "\n".join([setup, *asserts]))))
    namespace |= {name: Handle(remote, name) for name in names.intersection(filter(_is_text, hello["names"]))}
    exec(compile(setup, "<setup>", "exec", dont_inherit=True), namespace)
    if entry_point:
        name = re.split(r"\W", entry_point)[0]
        # Into the dictionary itself: it is what functions of the setup look names up in
        namespace[name] = Handle(remote, name)
    return namespace


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]
