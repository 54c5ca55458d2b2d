"""Plain Python values as JSON and back, between processes that do not trust each other.

Decoding builds values of built-in and standard-library types only: whatever a hostile process sends, the receiver gets
plain data (or a handle, where it asked for handles), never an object with behaviour of the sender's choosing. Subclasses
arrive as their base: a `Counter` as a dict, a named tuple as a tuple, a NumPy scalar as a number.
"""

import io
import json
import math
from collections import deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

# The tag of each container; a JSON array is a list
_CONTAINERS = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}


class NotPlain(TypeError):
    """The value is not plain data."""


def encode(value: Any, refer: Callable[[Any], Any] | None = None) -> Any:
    """
    A JSON form of a value.

    Args:
        value: Anything.
        refer (`Callable`, *optional*): Makes the JSON form of what is not plain data; without it such values are errors.

    Raises:
        NotPlain: The value is not plain data and there is no `refer`.
        RecursionError: It is nested too deeply or contains itself.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        value = int(value)
        # No limit of digits applies to base 16
        return value if -(2**53) < value < 2**53 else {"int": format(value, "x")}
    if isinstance(value, float):
        value = float(value)
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item, refer) for item in list.__iter__(value)]
    for tag, kind in _CONTAINERS.items():
        if isinstance(value, kind):
            return {tag: [encode(item, refer) for item in kind.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, refer), encode(item, refer)] for key, item in dict.items(value)]}
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__name__ if type(value) in (bytes, bytearray) else "bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, range):
        return {"range": [encode(value.start), encode(value.stop), encode(value.step)]}
    if isinstance(value, Fraction):
        return {"Fraction": [encode(value.numerator), encode(value.denominator)]}
    if isinstance(value, Decimal):
        return {"Decimal": str(value)}
    for kind in (datetime, date, time):  # a datetime is a date, so it comes first
        if isinstance(value, kind):
            return {kind.__name__: kind.isoformat(value)}
    if isinstance(value, timedelta):
        return {"timedelta": [value.days, value.seconds, value.microseconds]}
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return encode(value.item(), refer)
    if refer is None:
        raise NotPlain(f"a value of type {type(value).__name__} is not plain data")
    return refer(value)


def decode(form: Any, resolve: Callable[[Any], Any] | None = None) -> Any:
    """
    The value of a JSON form.

    Args:
        form: What [`encode`] made, or anything a hostile sender wrote.
        resolve (`Callable`, *optional*): Makes a value of a `{"handle": ...}` form.

    Raises:
        ValueError: The form is none that `encode` makes.
    """
    if form is None or isinstance(form, (bool, int, float, str)):
        return form
    try:
        if isinstance(form, list):
            return [decode(item, resolve) for item in form]
        if not isinstance(form, dict) or len(form) != 1:
            raise ValueError("not a value")
        ((tag, body),) = form.items()
        if tag in _CONTAINERS:
            return _CONTAINERS[tag](decode(item, resolve) for item in body)
        if tag == "dict":
            return {decode(key, resolve): decode(item, resolve) for key, item in body}
        if tag == "int":
            return int(body, 16)
        if tag == "float":
            return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[body]
        if tag in ("bytes", "bytearray"):
            return {"bytes": bytes, "bytearray": bytearray}[tag].fromhex(body)
        if tag == "complex":
            return complex(*map(decode, body))
        if tag == "range":
            return range(*map(decode, body))
        if tag == "Fraction":
            numerator, denominator = map(decode, body)
            if not isinstance(numerator, int) or not isinstance(denominator, int):
                raise TypeError("a fraction is of integers")  # of text, "1e999999999" is written out
            return Fraction(numerator, denominator)
        if tag == "Decimal":
            return Decimal(body)
        if tag in ("datetime", "date", "time"):
            return {"datetime": datetime, "date": date, "time": time}[tag].fromisoformat(body)
        if tag == "timedelta":
            return timedelta(*body)
        if tag == "handle" and resolve is not None:
            return resolve(body)
    except (TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"not a value: {error}") from error
    raise ValueError(f"not a value: tag {tag!r}")


class Channel:
    """Messages, one JSON line each, over a file descriptor; bounded, so that a flood ends in an error."""

    def __init__(self, fd: int, max_bytes: int = 1 << 26):
        self._reader = io.BufferedReader(io.FileIO(fd, "rb", closefd=False))
        self._writer = io.FileIO(fd, "wb", closefd=False)
        self._max_bytes = max_bytes

    def send(self, message: Any) -> None:
        """Send one message."""
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[self._writer.write(data) :]

    def receive(self) -> Any:
        """
        The next message.

        Raises:
            EOFError: The other side has ended, or sent more than `max_bytes`.
            ValueError: It sent something that is not JSON.
        """
        line = self._reader.readline(self._max_bytes)
        if not line.endswith(b"\n"):
            raise EOFError("the other side has ended")
        try:
            return json.loads(line)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
