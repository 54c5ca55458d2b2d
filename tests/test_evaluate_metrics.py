"""The metrics as modules of the library evaluate, offline."""

import pytest

pytest.importorskip("evaluate", reason="needs the extra eval: pip install trl-prime[eval]")

from trl_prime.evaluation import load_metric
from trl_prime.evaluation.process_bench import process_bench_scores


def test_pass_at_k():
    metric = load_metric("pass_at_k")
    result = metric.compute(predictions=[[1, 0, 0.5, 0], [1, 1, 1, 1]], k=[1, 2])
    assert result == {"pass@1": pytest.approx(0.625), "pass@2": pytest.approx(0.75)}
    metric.add_batch(predictions=[[0, 0]])
    assert metric.compute() == {"pass@1": 0.0}


def test_math_accuracy():
    predictions = [r"so \boxed{0.5}", "The answer is 7.", "no idea"]
    result = load_metric("math_accuracy").compute(predictions=predictions, references=[r"\frac12", "8", "1"])
    assert result == {"accuracy": pytest.approx(1 / 3), "undecided": 0}


def test_process_bench():
    predictions, labels = [[1.0, -1.0], [1.0], [-1.0, 0.0]], [1, -1, -1]
    result = load_metric("process_bench").compute(predictions=predictions, references=labels, threshold=-0.5)
    scores = process_bench_scores([1, -1, 0], labels)
    assert result["f1"] == scores["f1"]["value"] == pytest.approx(2 / 3) and result["auc"] == pytest.approx(7 / 8)


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(ValueError, match="'pass_at_k'"):
        load_metric("pass_at_1")
