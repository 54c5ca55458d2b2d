"""Runs a model-written solution: as a script, or serving calls to what it defines.

This process belongs to the solution: it can do to it what it likes. Nothing here is secret, and what it sends is treated
as data by the other side.
"""

import bisect
import builtins
import collections
import copy
import datetime
import fractions
import functools
import heapq
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
import sys
import time
import types
import typing
from typing import Any

import wire

# Solutions of the published data sets take these imports for granted, as their graders do: LeetCode-style solutions annotate with
# `List` and call `heappush` or `lru_cache` without an import.
_MODULES = (
    bisect, collections, copy, datetime, fractions, functools, heapq, io, itertools, json, math, operator, os, random, re,
    statistics, string, sys, time, typing,
)  # fmt: skip
PRELUDE = {module.__name__: module for module in _MODULES}
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
    PRELUDE |= {name: getattr(_module, name) for name in _names.split()}


def open_streams() -> None:
    """Text streams over descriptors 0 to 2 as they are now, not as they were when the interpreter started."""
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = open(fd, mode, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _execute(source: str, name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    module.__dict__.update(PRELUDE)
    exec(compile(source, "<solution>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def run_script(source: str) -> None:
    """Run the solution as `python solution.py` would."""
    open_streams()
    path_open = builtins.open
    # The link behind this name needs /proc, which is hidden
    builtins.open = lambda file, *args, **kwargs: path_open(0 if file == "/dev/stdin" else file, *args, **kwargs)
    _execute(source, "__main__")


def serve(fd: int) -> None:
    """
    Receive the solution over `fd`, import it, then answer calls until the other side hangs up.

    The first answer is `{"names": [...]}`, the functions and classes it defines, or `{"error": [type, text]}`. Requests
    are `["solve", name, args, kwargs]` (a function, or a method of a fresh `Solution`), `["call", target, args, kwargs]`,
    `["attribute", target, name]` and `["method", target, name, args]`; a target is a name or a handle. Answers are
    `{"value": ...}` or `{"error": ...}`, and `"arguments"` where the call changed them. A function among the arguments is
    called back by `{"callback": [index, args]}`.
    """
    open_streams()
    channel = wire.Channel(fd)
    _Server(channel).run(channel.receive())


class _Server:
    def __init__(self, channel: wire.Channel):
        self.channel = channel
        self.namespace: dict[str, Any] = {}
        self.objects: list[Any] = []

    def run(self, source: str) -> None:
        try:
            self.namespace = _execute(source, "solution")
            defined = [
                name
                for name, value in self.namespace.items()
                if callable(value) and value is not PRELUDE.get(name) and not name.startswith("__")
            ]
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
        function = self.find(target) if kind == "solve" else self.target(target)
        arguments = [self.decode(form) for form in rest[0]]
        value = function(*arguments, **{name: self.decode(form) for name, form in rest[1].items()})
        answer = {"value": self.encode(value)}
        if kind == "call":
            after = [
                wire.encode(argument)
                if isinstance(argument, (list, dict, set, bytearray, collections.deque))
                else None
                for argument in arguments
            ]
            if after != [form if changed is not None else None for form, changed in zip(rest[0], after, strict=True)]:
                answer["arguments"] = after
        return answer

    def find(self, name: str) -> Any:
        """A function by name: a method of `Solution`, where there is one, else of the module."""
        solution = self.namespace.get("Solution")
        if isinstance(solution, type) and hasattr(solution, name):
            return getattr(solution(), name)
        return self.namespace[name]

    def target(self, target: Any) -> Any:
        return self.namespace[target] if isinstance(target, str) else self.objects[target]

    def encode(self, value: Any) -> Any:
        return wire.encode(value, self.refer)

    def refer(self, value: Any) -> dict[str, Any]:
        self.objects.append(value)
        return {"handle": len(self.objects) - 1}

    def decode(self, form: Any) -> Any:
        return wire.decode(form, self.resolve)

    def resolve(self, body: Any) -> Any:
        if isinstance(body, int):
            return self.objects[body]
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


def _describe(error: BaseException) -> list[str]:
    try:
        return [type(error).__name__, str(error)[:1000]]
    except BaseException:  # an exception class may misbehave as well
        return ["Exception", ""]
