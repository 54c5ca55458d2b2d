"""The named benchmarks: where each is on the Hub, how its rows are adapted, and what is appended to its prompts.

The verifier is the one of training, by the kind of the row: mathematics or code. A local file or folder of the same form
can take the place of the Hub's data set.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """
    A data set to evaluate on.

    Attributes:
        dataset: Name on the Hub.
        split: Its split.
        format: How rows are adapted, see [`~trl_prime.data.formats.DATASET_FORMATS`].
        prompt_suffix: Text that is appended to the prompts: `"math"` or `"code"`, as in the paper's training data.
        config: Configuration on the Hub.
    """

    dataset: str
    split: str
    format: str
    prompt_suffix: str = "math"
    config: str | None = None


def _question_answer(data_source: str) -> str:
    return f"question_answer(data_source='{data_source}')"


BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "test", "gsm8k", config="main"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "math500"),
    # In AIME 2024 the column `solution` is the worked one; `answer` comes first where both are there
    "aime2024": Benchmark("HuggingFaceH4/aime_2024", "train", _question_answer("aime2024")),
    "aime2025": Benchmark("math-ai/aime25", "test", _question_answer("aime2025")),
    "amc2023": Benchmark("math-ai/amc23", "test", _question_answer("amc2023")),
    "minerva_math": Benchmark("math-ai/minervamath", "test", _question_answer("minerva_math")),
    # This data set has the text-only English problems with a final answer
    "olympiadbench": Benchmark(
        "math-ai/olympiadbench", "test", "question_answer(answer='final_answer', data_source='olympiadbench')"
    ),
    "humaneval": Benchmark("openai/openai_humaneval", "test", "humaneval", "code"),
    # These are the contest problems of DeepSeek-Coder, which the paper evaluates on
    "leetcode": Benchmark("TechxGenus/LeetCode-Contest", "train", "leetcode", "code"),
}
# It judges a PRM, not a policy: see `process_bench.py`. Its splits are gsm8k, math, olympiadbench and omnimath.
PROCESS_BENCH = Benchmark("Qwen/ProcessBench", "gsm8k", "process_bench")
