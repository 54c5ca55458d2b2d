"""`trl-prime eval` from the command line to the summary, with tiny models and local files."""

import importlib.util
import json

import pytest
from conftest import build_model
from datasets import Dataset

from trl_prime import ImplicitPRM
from trl_prime.cli import main
from trl_prime.commands.evaluate import _load_verifier
from trl_prime.evaluation.benchmarks import BENCHMARKS
from trl_prime.evaluation.end_to_end import SampleTable, sample_problems, summarize_samples
from trl_prime.evaluation.resumable import ResumableRows
from trl_prime.evaluation.sampling import Sample, sample_seed

SETTINGS = {"dtype": "float32", "max_new_tokens": 8, "num_samples": 4, "batch_size": 8}


def digit_reward(completions, solution, log_extra, **kwargs):
    """A stand-in verifier: the first digit of the completion; what starts with a letter cannot be judged."""
    texts = [completion[0]["content"] for completion in completions]
    digits = [next((c for c in text if c.isdigit()), "[none]") for text in texts]
    log_extra("answer", digits)
    return [
        None if text[:1].isalpha() else float(digit in "13579" and text != "")
        for text, digit in zip(texts, digits, strict=True)
    ]


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"question": f"{i} plus {i}", "answer": f"so #### {2 * i}"} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def prm_path(tokenizer, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("prm"))
    reference = build_model(2, scale=4.0).requires_grad_(False)
    ImplicitPRM(build_model(1, scale=4.0), reference, tokenizer, beta=0.5).save_pretrained(folder)
    return folder


def flags(**settings):
    return ["eval", *(part for name, value in settings.items() for part in (f"--{name}", *map(str, _list(value))))]


def _list(value):
    return value if isinstance(value, list) else [value]


@pytest.fixture
def evaluate(tmp_path, problems, model_path):
    def run(expected=0, output="out", **settings):
        given = {
            "model_name_or_path": model_path,
            "benchmark": "gsm8k",
            "dataset_name": problems,
            "reward_func": f"{__name__}.digit_reward",
            "output_dir": tmp_path / output,
            **SETTINGS,
            **settings,
        }
        assert main(flags(**{name: value for name, value in given.items() if value is not None})) == expected
        path = tmp_path / output
        if expected:
            return None, None
        rows = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
        return json.loads((path / "summary.json").read_text()), rows

    return run


def test_samples_and_summary(evaluate, capsys):
    summary, rows = evaluate()
    assert len(rows) == 6 * 5 and [row["sample"] for row in rows[:6]] == [None, 0, 1, 2, 3, None]
    assert set(rows[0]) >= {"problem", "prompt", "completion", "answer", "reward", "tokens", "truncated"}
    # The benchmark's suffix is the paper's
    assert rows[0]["prompt"][0]["content"].startswith("0 plus 0\n\nPresent the answer in LaTex")
    samples = [row for row in rows if row["sample"] is not None]
    correct = [row["reward"] == 1.0 for row in samples]
    metrics = summary["metrics"]
    assert list(metrics) == ["greedy", "pass@1", "pass@2", "pass@4", "avg@4", "maj@4"]
    assert metrics["pass@1"]["value"] == pytest.approx(sum(correct) / 24)
    assert metrics["pass@4"]["value"] == pytest.approx(sum(any(correct[i : i + 4]) for i in range(0, 24, 4)) / 6)
    greedy = [row["reward"] == 1.0 for row in rows if row["sample"] is None]
    assert metrics["greedy"]["value"] == pytest.approx(sum(greedy) / 6)
    assert summary["num_undecided"] == sum(row["reward"] is None for row in rows) > 0
    assert 0 < metrics["pass@1"]["value"] < 1, "or this test would not see much"
    printed = capsys.readouterr().out
    assert "maj@4" in printed and f"{metrics['pass@1']['value']:.1%}" in printed and "count as wrong" in printed


def test_a_resumed_run_equals_an_unbroken_one(evaluate, tmp_path, monkeypatch):
    from trl_prime.evaluation import sampling

    _, unbroken = evaluate(output="unbroken")
    evaluate(output="broken")
    path = tmp_path / "broken" / "samples.jsonl"
    # As if it had been killed in the middle of the second batch's line
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:11]) + lines[11][:20])
    _, resumed = evaluate(output="broken")
    assert resumed == unbroken

    def fail(*arguments, **kwargs):
        raise AssertionError("a finished run loads no model")

    monkeypatch.setattr(sampling, "load_policy", fail)
    summary, again = evaluate(output="broken", k=[3])
    assert again == unbroken and list(summary["metrics"]) == ["greedy", "pass@3", "avg@4", "maj@4"]


def test_what_is_left_is_sampled_in_whole_batches_by_the_seeds_of_its_samples(tmp_path):
    asked = []

    def sampler(prompts, seeds):
        asked.append((list(prompts), list(seeds)))
        return [Sample(prompt, 1, False) for prompt in prompts]

    dataset = Dataset.from_dict({"prompt": list("abcd")})
    rows = ResumableRows(tmp_path / "rows.jsonl", {})
    # A whole batch of five was written, and two rows of the second
    rows.append({"problem": i // 3, "reward": 0.0} for i in range(7))
    settings = {"num_samples": 2, "greedy": True, "seed": 9, "batch_size": 5}
    found = sample_problems(
        dataset, lambda: sampler, lambda completions, **_: [1.0] * len(completions), rows, **settings
    )
    order = [(p, s) for p in range(4) for s in (None, 0, 1)]
    batches = [order[5:10], order[10:12]]
    assert [prompts for prompts, _ in asked] == [["abcd"[p] for p, _ in batch] for batch in batches]
    assert [seeds for _, seeds in asked] == [
        [None if s is None else sample_seed(9, p, s) for p, s in batch] for batch in batches
    ]
    assert [(row["problem"], row["sample"], row["completion"]) for row in found[5:]] == [
        (p, s, "abcd"[p]) for p, s in order[5:]
    ]


def test_a_changed_setting_is_refused_and_can_be_overwritten(evaluate, problems, capsys):
    evaluate(num_samples=1)
    capsys.readouterr()
    evaluate(expected=2, num_samples=1, temperature=0.5)
    message = capsys.readouterr().err
    assert "temperature is 0.5" in message and "1.0" in message and "output_dir" in message and "overwrite" in message
    problems.write_text(problems.read_text().replace("5 plus 5", "5 plus 6"))
    evaluate(expected=2, num_samples=1)
    assert "problems is" in capsys.readouterr().err
    summary, rows = evaluate(num_samples=0, overwrite="true", limit=3)
    assert len(rows) == 3 and list(summary["metrics"]) == ["greedy"]


def test_best_of_n_with_a_prm(evaluate, prm_path, tmp_path, capsys, model_path):
    summary, rows = evaluate(prm_name_or_path=prm_path)
    table = {row["n"]: row for row in summary["best_of_n"]}
    assert list(table) == [1, 2, 4] and table[4]["votes"] == "exact"
    metrics = summary["metrics"]
    assert table[1]["prm_sum"]["value"] == pytest.approx(metrics["pass@1"]["value"])
    assert table[4]["ceiling"] == metrics["pass@4"] and table[4]["majority"] == metrics["maj@4"]
    samples = [row for row in rows if row["sample"] is not None]
    prm = ImplicitPRM.from_pretrained(prm_path)
    scored = prm.score(*([row[name] for row in samples] for name in ("prompt", "completion", "truncated")))
    for name, score in (
        ("prm_sum", lambda s: s.reward),
        ("prm_min", lambda s: min(s.step_rewards)),
        ("prm_last", lambda s: s.step_rewards[-1]),
    ):
        chosen = [max(range(i, i + 4), key=lambda j: float(score(scored[j]))) for i in range(0, 24, 4)]
        expected = sum(samples[j]["reward"] == 1.0 for j in chosen) / 6
        assert table[4][name]["value"] == pytest.approx(expected), name
    assert "PRM-weighted" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("prm_scores-*.jsonl"))) == 1


def test_the_default_verifiers_judge_and_vote(tmp_path, problems, model_path, monkeypatch):
    """Mathematics and code in one data set; a stand-in writes the completions."""
    from trl_prime.evaluation import end_to_end, sampling

    rows = [
        {"prompt": [{"role": "user", "content": "half"}], "solution": r"\frac12", "tests": None, "ability": "math"},
        {
            "prompt": [{"role": "user", "content": "double"}],
            "solution": None,
            "tests": json.dumps({"inputs": [[1], [4]], "outputs": [2, 8], "fn_name": "double"}),
            "ability": "code",
        },
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = "```python\ndef double(x):\n    return x {} 2\n```"
    written = iter(
        [r"\boxed{0.5}", r"\boxed{1}", r"\boxed{\frac{1}{2}}", "?"] + [program.format(o) for o in ("+", "*", "*", "-")]
    )
    monkeypatch.setattr(sampling, "load_policy", lambda *a, **k: None)
    monkeypatch.setattr(
        sampling,
        "TransformersSampler",
        lambda *a: lambda prompts, seeds: [sampling.Sample(next(written), 5, False) for _ in prompts],
    )
    given = {**SETTINGS, "greedy": "false", "output_dir": tmp_path / "out"}
    assert main(flags(model_name_or_path=model_path, dataset_name=problems, **given)) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    assert "answer" in rows[0] and "answer" not in rows[4] and rows[4]["code_verdict"] == "test 1: wrong answer"
    metrics = json.loads((tmp_path / "out" / "summary.json").read_text())["metrics"]
    # Votes are about answers, so only mathematics counts: 0.5 and 1/2 against 1
    assert metrics["maj@4"]["value"] == 1.0 and metrics["pass@1"]["value"] == 0.5
    assert rows[3]["answer"] == end_to_end.NO_ANSWER


def test_process_bench_from_the_command_line(tmp_path, prm_path, capsys, monkeypatch):
    path = tmp_path / "bench.jsonl"
    rows = [
        {"id": f"row-{i}", "problem": f"{i} plus 1", "steps": ["add", f"it is {i}", "done"], "label": i % 4 - 1}
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"benchmark": "processbench", "prm_name_or_path": prm_path, "dataset_name": path, "dtype": "float32"}
    settings |= {"output_dir": tmp_path / "out", "calibration_fraction": 0.5}
    assert main(flags(**settings)) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["num_calibration"] == summary["num_solutions"] == 10
    assert 0 <= summary["auc"] <= 1 and set(summary["metrics"]) == {"erroneous", "correct", "f1"}
    assert "first wrong step found" in capsys.readouterr().out
    step_rewards = [json.loads(line) for line in (tmp_path / "out" / "step_rewards.jsonl").read_text().splitlines()]
    assert [len(row["step_rewards"]) for row in step_rewards] == [3] * 20
    # Another threshold scores nothing again
    monkeypatch.setattr(ImplicitPRM, "from_pretrained", None)
    assert main(flags(**settings, threshold=-1e9)) == 0
    given = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert given["metrics"]["correct"]["value"] == 1.0 and given["metrics"]["erroneous"]["value"] == 0.0
    path.write_text(json.dumps({**rows[0], "label": 3}) + "\n")
    assert main(flags(**settings)) == 2
    assert "Row 0" in capsys.readouterr().err


def test_right_solutions_alone_are_refused_before_they_are_scored(tmp_path, capsys, prm_path):
    path = tmp_path / "bench.jsonl"
    row = {"problem": "1 plus 1", "steps": ["add", "it is 2"], "label": -1}
    path.write_text("".join(json.dumps({**row, "id": f"row-{i}"}) + "\n" for i in range(20)))
    settings = {"benchmark": "processbench", "prm_name_or_path": prm_path, "dataset_name": path}
    assert main(flags(**settings, output_dir=tmp_path / "out")) == 2
    assert "Of 4 solutions 4 are right" in capsys.readouterr().err


def test_what_is_wrong_is_said_before_a_model_is_loaded(evaluate, problems, capsys, monkeypatch):
    monkeypatch.setattr("trl_prime.evaluation.sampling.load_policy", None)
    monkeypatch.setattr("trl_prime.commands.evaluate.is_vllm_available", lambda: False)
    for settings, words in (
        ({"benchmark": "gsm9k"}, "'gsm8k'"),
        ({"benchmark": None, "dataset_name": None}, "dataset_name"),
        ({"model_name_or_path": None}, "model_name_or_path"),
        ({"benchmark": "processbench"}, "prm_name_or_path"),
        ({"k": [8]}, "num_samples, 4"),
        ({"temperature": 0}, "num_samples: 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"limit": 0}, "limit is 0"),
        ({"use_vllm": "true"}, "pip install trl-prime[vllm]"),
        ({"num_samples": 0, "greedy": "false"}, "nothing would be sampled"),
        ({"num_samples": 0, "prm_name_or_path": "x"}, "chooses among samples"),
        ({"benchmark": "math500"}, "problem"),
        ({"dataset_name": "./nowhere.jsonl"}, "no such file"),
        ({"reward_func": "acuracy_reward"}, "'accuracy_reward'"),
    ):
        evaluate(expected=2, **settings)
        assert words in capsys.readouterr().err, settings
    problems.write_text(json.dumps({"prompt": "x", "target": 1}) + "\n")
    evaluate(expected=2, benchmark=None, reward_func="verifier")
    assert "No row says which verifier" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    evaluate(expected=2)
    assert "one process" in capsys.readouterr().err


def test_scores_without_their_settings_are_refused_before_anything_is_sampled(evaluate, prm_path, tmp_path, capsys):
    settings = {"prm_name_or_path": prm_path, "num_samples": 2, "limit": 2}
    evaluate(**settings)
    (scores,) = (tmp_path / "out").glob("prm_scores-*.jsonl")
    for break_it in (lambda path: path.write_text("{"), lambda path: path.unlink()):
        break_it(scores.with_suffix(".settings.json"))
        # More samples would be needed, and none is made
        (tmp_path / "out" / "samples.jsonl").write_text("")
        capsys.readouterr()
        evaluate(expected=2, **settings)
        assert f"'{scores}' exists, but no readable '{scores.stem}.settings.json'" in capsys.readouterr().err
        assert (tmp_path / "out" / "samples.jsonl").read_text() == ""
    evaluate(overwrite="true", **settings)


def silent_reward(completions, **kwargs):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    "reward_func, num_samples, said",
    [
        (f"{__name__}.digit_reward", 4, "num_samples is 4, and votes compare answers"),
        (f"{__name__}.digit_reward", 0, None),
        (f"{__name__}.silent_reward", 4, None),
        ("code", 4, None),
        ("verifier", 4, None),
        ("math", 0, "Judging answers needs Math-Verify"),
        ("majority", 4, "Judging answers needs Math-Verify"),
    ],
)
def test_without_math_verify(reward_func, num_samples, said, problems, monkeypatch):
    """Votes would end in a traceback when all is sampled; code needs none."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find_spec(name))
    monkeypatch.setattr("trl_prime.rewards.registry._make", lambda *_: silent_reward)
    rows = Dataset.from_dict({"prompt": ["x"], "tests": ['{"asserts": ["assert f() == 1"]}'], "ability": ["code"]})
    if said is None:
        assert callable(_load_verifier(reward_func, rows, num_samples))
        return
    with pytest.raises(ValueError, match=f"{said}.*trl-prime.math"):
        _load_verifier(reward_func, rows, num_samples)


def test_the_vote_is_checked_before_anything_is_sampled(evaluate, monkeypatch, tmp_path, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find_spec(name))
    evaluate(expected=2)
    assert "pip install trl-prime[math]. Or give num_samples: 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    summary, _ = evaluate(num_samples=0)
    assert list(summary["metrics"]) == ["greedy"]


def test_a_model_without_a_chat_template_takes_plain_prompts(evaluate, tokenizer, tmp_path, capsys):
    build_model(7, scale=4.0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    settings = {"model_name_or_path": tmp_path / "base", "reward_func": "math", "num_samples": 1, "limit": 2}
    evaluate(expected=2, **settings)
    assert "plain_prompts: true" in capsys.readouterr().err
    _, rows = evaluate(plain_prompts="true", prompt_suffix="none", system_prompt="count", **settings)
    assert rows[0]["prompt"] == "count\n\n0 plus 0"


def test_undecided_samples_count_as_wrong():
    rows = [
        {"problem": 0, "sample": s, "reward": reward, "answer": answer, "tokens": 1, "truncated": False}
        for s, (reward, answer) in enumerate([(None, "1"), (1.0, "2"), (None, "1"), (0.0, "[none]")])
    ]
    samples = SampleTable(rows, lambda pairs: [False] * len(pairs))
    summary = summarize_samples(samples, [1])
    values = {name: metric["value"] for name, metric in summary["metrics"].items()}
    assert values == {"pass@1": 0.25, "avg@4": 0.25, "maj@4": 0.0}
    assert summary["num_undecided"] == 2 and summary["num_without_answer"] == 1


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_name_known_formats(name):
    """Rows as the Hub's data sets have them are adapted; where a data set is can only be checked on the Hub."""
    from trl_prime.data.adapters import adapt_dataset
    from trl_prime.rewards.router import row_kind
    from trl_prime.specs import parse_call

    row = {
        "gsm8k": {"question": "q", "answer": "so\n#### 4"},
        "math500": {"problem": "q", "answer": "4", "solution": r"\boxed{4}"},
        "aime2024": {"problem": "q", "answer": "4", "solution": "worked"},
        "aime2025": {"problem": "q", "answer": "4", "id": "0"},
        "amc2023": {"question": "q", "answer": 4.0, "id": 0},
        "minerva_math": {"question": "q", "answer": "4"},
        "olympiadbench": {"question": "q", "final_answer": ["4"], "solution": ["worked"]},
        "humaneval": {"prompt": "def f(x):\n", "test": "def check(candidate):\n    pass", "entry_point": "f"},
        "leetcode": {"prompt_sft": "q", "test": 'my = Solution()\ni = {"x": 1, "y": [2]}\nassert my.f(**i) == [3]'},
    }[name]
    format_name, options = parse_call(BENCHMARKS[name].format)
    dataset = adapt_dataset(
        Dataset.from_list([row]), format_name, prompt_suffix=BENCHMARKS[name].prompt_suffix, **(options or {})
    )
    kind = BENCHMARKS[name].prompt_suffix
    columns = ("ability", "data_source", "solution", "tests")
    assert row_kind(**{column: dataset[0][column] for column in columns}) == kind
    assert dataset[0]["solution"] == ("4" if kind == "math" else None)


def test_leetcode_problems_are_judged_as_calls():
    from trl_prime.data.adapters import adapt_dataset
    from trl_prime.rewards import code_reward

    test = (
        "\nmy_solution = Solution()\n\n"
        'test_input = { "a": 1, "b": [2, 3] }\nassert my_solution.f(**test_input) == [3, 4]\n\n'
        'test_input = { "a": 5, "b": [-1] }\nassert my_solution.f(**test_input) == [4]\n'
    )
    dataset = adapt_dataset(Dataset.from_list([{"prompt_sft": "add", "test": test, "task_id": "t"}]), "leetcode")
    tests = dataset[0]["tests"]
    assert json.loads(tests) == {"inputs": [[1, [2, 3]], [5, [-1]]], "outputs": [[3, 4], [4]], "fn_name": "f"}
    program = "```python\nclass Solution:\n    def f(self, a, b):\n        return [a {} x for x in b]\n```"
    assert code_reward([program.format("+"), program.format("*")], tests=[tests, tests]) == [1.0, 0.0]
    for broken in (
        "assert f(1) == 2",
        "x = {1: 2}\nassert s.f(**x) < 3",
        "x = {1: 2}\nassert s.f(**x) == y",
        "import os",
    ):
        with pytest.raises(ValueError, match="Row 0 is no 'leetcode' row"):
            adapt_dataset(Dataset.from_list([{"prompt_sft": "add", "test": broken}]), "leetcode")
