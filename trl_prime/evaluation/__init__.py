"""How good a policy and its PRM are: the held-out measure of a task, benchmarks, best of N, ProcessBench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluate import EvaluationModule

METRICS = ("pass_at_k", "math_accuracy", "process_bench")


def load_metric(name: str, **kwargs: Any) -> EvaluationModule:
    """
    One of this package's metrics as a module of the library `evaluate`. No network is needed.

    Args:
        name (`str`): `"pass_at_k"`, `"math_accuracy"` or `"process_bench"`.
        **kwargs: Passed to `evaluate.load`.

    Returns:
        [`~evaluate.EvaluationModule`]

    Raises:
        ValueError: There is no such metric.
        ImportError: `evaluate` is not installed.

    Example:
    ```python
    >>> load_metric("pass_at_k").compute(predictions=[[1, 0], [0, 0]], k=[1, 2])
    {'pass@1': 0.25, 'pass@2': 0.5}
    ```
    """
    from ..specs import nearest

    if name not in METRICS:
        raise ValueError(f"The metric {name!r} is unknown. {nearest(name, METRICS)}")
    try:
        import evaluate
    except ImportError as error:
        raise ImportError("Metrics need the library evaluate: pip install trl-prime[eval]") from error
    return evaluate.load(str(Path(__file__).parents[1] / "metrics" / name), **kwargs)
