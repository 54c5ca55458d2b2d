r"""Find the final answers of mathematical text, and judge one against the gold answer with Math-Verify.

Covered: extraction from completions and gold fields in bounded time; numbers, fractions, percentages, units, sets,
intervals, tuples, matrices, equations, words and multiple choice.

Not covered: limits of time and memory. `judge` can run for ever (`9^{9^{9^9}}`), see `worker_pool`. Its worker processes
import this package, so neither torch nor TRL is imported here, and Math-Verify only when it is needed.
"""

from .cleaning import clean
from .equality import judge, quick_verdict
from .extraction import MAX_ANSWER_LENGTH, extract_answer, extract_gold

__all__ = ["MAX_ANSWER_LENGTH", "clean", "extract_answer", "extract_gold", "judge", "quick_verdict"]
