"""pass@k as a module of the library `evaluate`: see `trl_prime.evaluation.statistics.pass_at_k`."""

import datasets
import evaluate

import trl_prime.evaluation.statistics as statistics

_CITATION = """
@article{chen2021evaluating,
  title={Evaluating Large Language Models Trained on Code},
  author={Chen, Mark and others},
  journal={arXiv preprint arXiv:2107.03374},
  year={2021}
}
"""
_INPUTS = """
Args:
    predictions (`list[list[float]]`): For each problem the rewards of its samples; a sample is right where it is 1.
    k (`list[int]`): How many samples are drawn.

Returns:
    `dict[str, float]`: `pass@k` for each k, the mean over problems.
"""


class PassAtK(evaluate.Metric):
    """Chance that at least one of k samples is right, by the unbiased estimator."""

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, predictions, k=(1,)):
        num_correct = [sum(reward >= 1 for reward in rewards) for rewards in predictions]
        num_samples = [len(rewards) for rewards in predictions]
        return {f"pass@{size}": float(statistics.pass_at_k(num_samples, num_correct, size).mean()) for size in k}
