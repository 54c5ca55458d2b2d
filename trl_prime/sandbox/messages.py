"""Messages out of a sandbox: a hostile program may have written them, so reading takes bounded effort and checks their shape."""

from __future__ import annotations

import json
from typing import Any


def read_message(line: bytes) -> Any:
    """
    A message of [`~trl_prime.sandbox.inside.wire.Channel`].

    Raises:
        EOFError: It is none.
    """
    try:
        return json.loads(line, parse_int=_small_int)
    except (ValueError, RecursionError) as error:
        raise EOFError("the program sent no message") from error


def _small_int(digits: str) -> int:
    if len(digits) > 20:  # reading many digits takes long; the wire has another form for what is large
        raise ValueError("not a number of the wire")
    return int(digits)


def checked_answer(message: Any) -> dict[str, Any]:
    """An answer to a call: `{"value": form}` or `{"error": [type, text]}`, whatever was sent."""
    if isinstance(message, dict):
        if "value" in message:
            return {"value": message["value"]}
        error = message.get("error")
        if isinstance(error, list) and len(error) == 2 and all(isinstance(text, str) for text in error):
            return {"error": error}
    return {"error": ["Error", "the program sent no answer"]}


def checked_verdict(message: Any) -> dict[str, Any]:
    """A verdict of the examiner: `{"passed": bool, "error": str}`, whatever was sent."""
    message = message if isinstance(message, dict) else {}
    return {"passed": message.get("passed") is True, "error": str(message.get("error", "no verdict"))[:1000]}
