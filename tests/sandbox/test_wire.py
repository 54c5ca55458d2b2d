"""Plain values between processes that do not trust each other: round trips, and junk."""

import json
import math
import os
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_prime.sandbox.inside import wire
from trl_prime.sandbox.messages import checked_answer, checked_verdict, read_message

hashable = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**52, max_value=2**200)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.fractions()
    | st.decimals(allow_nan=False)
    | st.dates()
    | st.times()
    | st.datetimes()
    | st.timedeltas()
    | st.builds(range, st.integers(), st.integers(), st.integers(min_value=1)),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
plain = st.recursive(
    hashable | st.binary().map(bytearray),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(deque)
        | st.tuples(inner)
        | st.sets(hashable, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4)
    ),
    max_leaves=10,
)
tags = st.sampled_from(
    [
        "tuple",
        "set",
        "frozenset",
        "deque",
        "dict",
        "int",
        "float",
        "bytes",
        "bytearray",
        "complex",
        "range",
        "Fraction",
        "Decimal",
        "datetime",
        "date",
        "time",
        "timedelta",
        "handle",
        "object",
    ]
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["1e999999999", "0x"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(tags, inner, max_size=1) | st.dictionaries(st.text(), inner, max_size=2)
    ),
    max_leaves=20,
)  # fmt: skip


def through_json(value, refer=None):
    return json.loads(json.dumps(wire.encode(value, refer)))


def types_of(value):
    if isinstance(value, dict):
        return type(value), sorted(str((types_of(key), types_of(item))) for key, item in value.items())
    if isinstance(value, (list, tuple, deque)):
        return type(value), [types_of(item) for item in value]
    return type(value)


@given(plain)
@settings(max_examples=300, deadline=None)
def test_plain_values_come_back_as_they_were(value):
    decoded = wire.decode(through_json(value))
    assert decoded == value
    assert str(types_of(decoded)) == str(types_of(value))


@given(junk)
@settings(max_examples=500, deadline=None)
def test_junk_is_a_value_or_a_value_error(form):
    try:
        wire.decode(form, resolve=lambda body: {"of": "handles"}[body])
    except ValueError:
        return


@pytest.mark.parametrize(
    "form",
    [
        {"int": "z"},
        {"int": 3},
        {"float": "1"},
        {"float": []},
        {"tuple": 3},
        {"set": [[1]]},
        {"dict": [[1]]},
        {"dict": [[[1], 2]]},
        {"range": [0, 1, 0]},
        {"Fraction": [1, 0]},
        {"Fraction": ["1e999999999", 1]},
        {"Fraction": ["1e999999999"]},
        {"Decimal": "x"},
        {"timedelta": [10**12]},
        {"timedelta": {"days": 1}},
        {"datetime": "yesterday"},
        {"bytes": "0"},
        {"handle": 0},
        {"__class__": "int"},
        {"int": "1", "float": "nan"},
        {},
    ],
    ids=str,
)
def test_forms_that_encode_does_not_make(form):
    with pytest.raises(ValueError):
        wire.decode(form)


def test_deep_nesting_is_a_value_error():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ValueError):
        wire.decode(nested)
    with pytest.raises(RecursionError):
        wire.encode(nested)
    form = 1
    for _ in range(5_000):
        form = {"tuple": [form]}
    with pytest.raises(ValueError):
        wire.decode(form)


def test_special_numbers():
    assert math.isnan(wire.decode(through_json(math.nan)))
    assert wire.decode(through_json([math.inf, -math.inf])) == [math.inf, -math.inf]
    assert wire.decode(through_json(10**5000)) == 10**5000  # more digits than int() reads
    assert wire.decode(through_json(True)) is True
    moment = datetime(2020, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=1)))
    assert wire.decode(through_json(moment)) == moment


def test_subclasses_arrive_as_their_base():
    class Number(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

        def __repr__(self):
            raise RuntimeError

    class Day(date):
        pass

    point = namedtuple("point", "x y")(1, 2)
    table = defaultdict(list, {1: [2]})
    for value, expected in [
        (Number(3), 3),
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (table, {1: [2]}),
        (point, (1, 2)),
        (Day(2020, 1, 2), date(2020, 1, 2)),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
    ]:
        decoded = wire.decode(through_json(value))
        assert decoded == expected
        assert type(decoded) is type(expected)
    assert wire.decode(through_json({Fraction(1, 3): [time(1), Decimal("0.10")]})) == {
        Fraction(1, 3): [time(1), Decimal("0.10")]
    }


def test_what_is_not_plain_needs_a_handle():
    with pytest.raises(wire.NotPlain):
        wire.encode([object()])
    assert through_json([object(), 1], refer=lambda value: {"handle": 7}) == [{"handle": 7}, 1]
    assert wire.decode([{"handle": 7}], resolve=lambda body: ("resolved", body)) == [("resolved", 7)]


def test_a_channel_ends_floods_and_refuses_junk():
    read_end, write_end = os.pipe()
    channel = wire.Channel(read_end, max_bytes=1000)
    os.write(write_end, b'{"a": 1}\nnot json\n' + b"[" * 900 + b"\n" + b"x" * 2000)
    os.close(write_end)
    assert channel.receive() == {"a": 1}
    with pytest.raises(ValueError):
        channel.receive()
    with pytest.raises(ValueError):
        channel.receive()
    with pytest.raises(EOFError):
        channel.receive()
    os.close(read_end)


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[" * 1_000_000, b"9" * 3_000_000, b"\xff", b'"' * 3], ids=lambda line: line[:4]
)
def test_messages_of_a_program_that_are_none(line):
    with pytest.raises(EOFError):
        read_message(line)


@given(junk)
@settings(max_examples=200, deadline=None)
def test_answers_and_verdicts_have_their_shape_whatever_was_sent(message):
    for sent in (message, {"value": message}, {"error": message}, {"error": [message, message]}):
        answer = checked_answer(sent)
        assert list(answer) in (["value"], ["error"])
        if "error" in answer:
            assert [type(text) for text in answer["error"]] == [str, str]
    for sent in (message, {"passed": message}, {"error": message}):
        verdict = checked_verdict(sent)
        assert verdict["passed"] is (isinstance(sent, dict) and sent.get("passed") is True)
        assert type(verdict["error"]) is str
