"""Accuracy of final answers as a module of the library `evaluate`: see `trl_prime.rewards.math_rewards`."""

import datasets
import evaluate

import trl_prime.rewards.math_rewards as math_rewards

_INPUTS = r"""
Args:
    predictions (`list[str]`): Completions, whose final answer is extracted.
    references (`list[str]`): Right answers: bare LaTeX, `$...$`, with `\boxed{}`, or ending in `#### 42`.

Returns:
    `dict`: `accuracy`, and `undecided`, how many could not be judged; they count as wrong.
"""


class MathAccuracy(evaluate.Metric):
    """Share of completions whose final answer equals the right one, by the verifier that PRIME trains with."""

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        rewards = math_rewards.math_reward(predictions, references)
        return {"accuracy": sum(reward or 0.0 for reward in rewards) / len(rewards), "undecided": rewards.count(None)}
