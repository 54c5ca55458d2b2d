"""A sandbox behind HTTP: Sandbox Fusion, or a server with its `run_code` call."""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .inside import wire
from .limits import Limits, Result, SandboxUnavailable
from .messages import checked_answer, checked_verdict, read_message

_INSIDE = Path(__file__).parent / "inside"
_MODULES = ("isolation", "wire", "prelude", "candidate", "examiner", "one_shot")
_RETRIED = {429, 500, 502, 503, 504}


class RemoteSandbox:
    """
    Runs model-written Python on a Sandbox Fusion server.

    Its walls are the server's. Solutions and their tests run in processes of their own, but on one machine: on a server
    that runs programs as root, a solution that tries to can read the tests.

    Args:
        url (`str`): Address of the server, without `/run_code`.
        attempts (`int`): How often a request is tried when the server is busy or away, with growing pauses.

    Raises:
        SandboxUnavailable: The server does not answer, or does not run a test program.
    """

    def __init__(self, url: str, attempts: int = 5):
        self.url = url.rstrip("/")
        self.attempts = attempts
        result = self.run("print(6 * 7)")
        if result.stdout != b"42\n":
            raise SandboxUnavailable(f"The sandbox at {self.url} did not run a test program: {result}")

    def run(self, source: str, stdin: str = "", limits: Limits | None = None) -> Result:
        """Run a program to its end, as [`~trl_prime.sandbox.local.LocalSandbox.run`]."""
        limits = limits or Limits()
        answer = self._post(
            {
                "code": source,
                "language": "python",
                "stdin": stdin,
                "run_timeout": limits.wall_seconds,
                "memory_limit_MB": limits.memory_mb,
            },
            # Two streams, a byte of which takes six as JSON
            max_bytes=12 * limits.output_bytes + (1 << 20),
        )
        if answer is None:
            return Result(b"", b"", None, "output")
        result = answer.get("run_result")
        if answer.get("status") == "SandboxError" or not isinstance(result, dict):
            raise SandboxUnavailable(f"The sandbox at {self.url} could not run a program: {answer.get('message')}")
        stdout, stderr = (_encoded(result.get(name)) for name in ("stdout", "stderr"))
        timed_out = result.get("status") == "TimeLimitExceeded"
        reason = "time" if timed_out else "output" if len(stdout) > limits.output_bytes else None
        code = result.get("return_code")
        return Result(
            stdout[: limits.output_bytes], stderr[-(1 << 12) :], code if isinstance(code, int) else None, reason
        )

    def call(
        self, source: str, name: str, calls: list[list[Any]], limits: Limits, total_seconds: float
    ) -> Iterator[dict[str, Any]]:
        """Call a function of a solution, as [`~trl_prime.sandbox.local.LocalSandbox.call`]; all in one request."""
        forms = [[wire.encode(argument) for argument in arguments] for arguments in calls]
        whole = replace(limits, output_bytes=limits.output_bytes * max(1, len(calls)))
        answers = self._one_shot({"kind": "call", "name": name, "calls": forms}, source, whole, total_seconds)
        answers = [checked_answer(answer) for answer in answers]
        yield from (answers + [{"error": ["Error", "time limit"]}] * len(calls))[: len(calls)]

    def examine(
        self, source: str, tests: dict[str, Any], limits: Limits, total_seconds: float
    ) -> Iterator[dict[str, Any]]:
        """Run tests written as Python code, as [`~trl_prime.sandbox.local.LocalSandbox.examine`]."""
        for verdict in self._one_shot({"kind": "examine", "tests": tests}, source, limits, total_seconds):
            yield checked_verdict(verdict)

    def close(self) -> None:
        """Nothing is kept open."""

    def _one_shot(self, request: dict[str, Any], source: str, limits: Limits, total_seconds: float) -> list[Any]:
        nonce = secrets.token_hex(16)
        request |= {
            "nonce": nonce,
            "solution": source,
            "test_seconds": limits.wall_seconds,
            "total_seconds": total_seconds,
        }
        sources = {name: (_INSIDE / f"{name}.py").read_text() for name in _MODULES}
        program = (
            "import sys, types\n"
            f"for name, source in {sources!r}.items():\n"
            "    sys.modules[name] = types.ModuleType(name)\n"
            "    exec(compile(source, name, 'exec'), sys.modules[name].__dict__)\n"
            "sys.modules['one_shot'].main()\n"
        )
        output = self.run(program, json.dumps(request), replace(limits, wall_seconds=total_seconds + 5)).stdout
        for line in reversed(output.splitlines()):
            if line.startswith(f'["{nonce}", '.encode()):
                with contextlib.suppress(EOFError):
                    return read_message(line)[1]
        return []

    def _post(self, body: dict[str, Any], max_bytes: int) -> dict[str, Any] | None:
        """The server's answer; None if it is longer than `max_bytes`."""
        request = urllib.request.Request(
            f"{self.url}/run_code", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        for attempt in range(self.attempts):
            try:
                with urllib.request.urlopen(request, timeout=body["run_timeout"] + 60) as response:
                    data = response.read(max_bytes + 1)
                if len(data) > max_bytes:
                    return None
                answer = json.loads(data)
                if isinstance(answer, dict):
                    return answer
                raise ValueError(f"its answer is a {type(answer).__name__}")
            except urllib.error.HTTPError as error:
                problem: Exception = error
                if error.code not in _RETRIED:
                    break
            except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
                problem = error
            if attempt + 1 < self.attempts:
                time.sleep(0.5 * 2**attempt)
        raise SandboxUnavailable(
            f"The sandbox at {self.url} does not answer ({problem}). Start Sandbox Fusion there, or set another `sandbox`."
        ) from problem


def _encoded(text: Any) -> bytes:
    return text.encode(errors="surrogatepass") if isinstance(text, str) else b""
