"""The measures of ProcessBench as a module of the library `evaluate`: see `trl_prime.evaluation.process_bench`."""

import datasets
import evaluate

import trl_prime.evaluation.process_bench as process_bench

_CITATION = """
@article{zheng2024processbench,
  title={ProcessBench: Identifying Process Errors in Mathematical Reasoning},
  author={Zheng, Chujie and others},
  journal={arXiv preprint arXiv:2412.06559},
  year={2024}
}
"""
_INPUTS = """
Args:
    predictions (`list[list[float]]`): For each solution the rewards of its steps.
    references (`list[int]`): Index of the first wrong step of each solution, or -1.
    threshold (`float`): A step below it is called wrong.

Returns:
    `dict[str, float]`: `erroneous` and `correct`, accuracies on wrong and on right solutions, `f1`, their harmonic mean,
    and `auc` of the step rewards.
"""


class ProcessBench(evaluate.Metric):
    """How well step rewards tell the first wrong step of a solution."""

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions, references, threshold):
        found = process_bench.predict_first_error(predictions, threshold)
        scores = process_bench.process_bench_scores(found, references)
        auc = process_bench.step_auc(predictions, references)
        return {**{name: score["value"] for name, score in scores.items()}, "auc": auc}
