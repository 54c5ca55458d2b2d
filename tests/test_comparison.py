"""The paired difference of two evaluations, as a function and by `trl-prime eval --compare`."""

import json

import numpy as np
import pytest
from conftest import build_model

from trl_prime.cli import main
from trl_prime.evaluation.comparison import compare_samples
from trl_prime.evaluation.end_to_end import SampleTable, summarize_samples
from trl_prime.evaluation.statistics import bootstrap_weights


def table(rewards, greedy=(), answers=None):
    """The samples of problems with these rewards, and answers or None."""
    rows = []
    for problem, values in enumerate(rewards):
        if len(greedy):
            rows.append(
                {"problem": problem, "sample": None, "reward": greedy[problem], "tokens": 1, "truncated": False}
            )
        for sample, reward in enumerate(values):
            rows.append({"problem": problem, "sample": sample, "reward": reward, "tokens": 1, "truncated": False})
            if answers and answers[problem]:
                rows[-1]["answer"] = answers[problem][sample]
    return SampleTable(rows, lambda pairs: [False] * len(pairs))


def test_differences_are_those_of_the_problems():
    first = table([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]], greedy=[1.0, 0.0, None, 1.0])
    second = table([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], greedy=[1.0, 1.0, 1.0, 1.0])
    result = compare_samples(first, second, seed=3)
    assert list(result) == ["greedy", "pass@1", "pass@2", "avg@2"]
    differences = {"greedy": [0, 1, 1, 0], "pass@1": [0.5, 0.5, 0, -0.5], "pass@2": [0, 1, 0, -1]}
    ones = {"greedy": 0.5, "pass@1": 0.5, "pass@2": 0.75}
    for name, values in differences.items():
        row = result[name]
        assert row["value"] == pytest.approx(np.mean(values)) and row["first"] == ones[name]
        assert row["second"] == pytest.approx(ones[name] + np.mean(values))
        replicates = bootstrap_weights(4, seed=3) @ values / 4
        assert [row["low"], row["high"]] == pytest.approx(np.quantile(replicates, [0.025, 0.975]).tolist())


def test_pairing_takes_out_how_hard_the_problems_are():
    rng = np.random.default_rng(0)
    hard = (rng.random(200) < 0.5).astype(float)
    better = np.where(rng.random(200) < 0.1, 1.0, hard)
    result = compare_samples(table(hard[:, None]), table(better[:, None]), seed=5)["pass@1"]
    replicates = bootstrap_weights(200, seed=5) @ (better - hard) / 200
    assert [result["low"], result["high"]] == pytest.approx(np.quantile(replicates, [0.025, 0.975]).tolist())
    assert 0 < result["low"] <= result["value"] <= result["high"] < 0.2
    # Each for itself, the two would not be told apart
    one, other = (summarize_samples(table(x[:, None]), [1])["metrics"]["pass@1"] for x in (hard, better))
    assert one["high"] > other["low"]


def test_of_different_numbers_of_samples_what_both_have_is_compared():
    first, second = table([[1.0, 0.0], [0.0, 0.0]]), table([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    result = compare_samples(first, second)
    assert list(result) == ["pass@1", "pass@2"] and result["pass@1"]["value"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="k has 4, .* 2 samples"):
        compare_samples(first, second, [1, 4])
    with pytest.raises(ValueError, match="nothing can be compared"):
        compare_samples(first, table([[], []], greedy=[1.0, 0.0]))


def test_votes_are_compared_where_both_have_answers():
    rewards = [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]
    first = table(rewards, answers=[["a", "a", "b"], ["a", "a", "b"], None])
    second = table(rewards[::-1], answers=[["a", "a", "a"], None, ["a", "a", "b"]])
    result = compare_samples(first, second)["maj@3"]
    # Only the first problem has answers in both
    assert result["first"] == result["second"] == 1.0 and result["value"] == 0.0


# --- The command ---


def sum_reward(completions, solution, log_extra, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    return [float(sum(map(ord, text)) % 2) for text in texts]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Evaluations of two policies on six problems, 0 and 1; of other prompts, 2; of fewer samples, 3."""
    root = tmp_path_factory.mktemp("compared")
    problems = root / "problems.jsonl"
    rows = [{"question": f"{i} plus {i}", "answer": f"so #### {2 * i}"} for i in range(6)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in (1, 2):
        build_model(seed, scale=4.0).save_pretrained(root / f"model{seed}")
        tokenizer.save_pretrained(root / f"model{seed}")
    changes = ({}, {"model_name_or_path": root / "model2"}, {"prompt_suffix": "none"}, {"num_samples": 2, "limit": 5})
    for i, change in enumerate(changes):
        settings = {
            "model_name_or_path": root / "model1",
            "benchmark": "gsm8k",
            "dataset_name": problems,
            "reward_func": f"{__name__}.sum_reward",
            "output_dir": root / str(i),
            "dtype": "float32",
            "max_new_tokens": 8,
            **change,
        }
        assert main(["eval", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]) == 0
    # What a completion may hold, and `str.splitlines` takes for the end of a line
    path = root / "1" / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["completion"] += "\u2028"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return [root / str(i) for i in range(4)]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())["metrics"]


def test_the_command_prints_and_writes_the_difference(folders, tmp_path, capsys):
    first, second = folders[:2]
    words = ["--compare", str(first), str(second / "samples.jsonl"), "--k", "2", "--output_dir", str(tmp_path)]
    assert main(["eval", *words]) == 0
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["compare"] == [str(first), str(second)]
    assert list(written["metrics"]) == ["greedy", "pass@2", "avg@4"]
    for name, row in written["metrics"].items():
        one, other = (summary(folder)[name]["value"] for folder in (first, second))
        assert row["value"] == pytest.approx(other - one) and row["first"] == one and row["low"] <= row["high"]
    # Which of them is not 0 depends on the samples, and these on the version of transformers
    difference = next(row["value"] for row in written["metrics"].values() if row["value"])
    printed = capsys.readouterr().out
    assert f"{100 * difference:+.1f}" in printed and "model_name_or_path" in printed and "model_version" not in printed


@pytest.mark.parametrize(
    "words, said",
    [
        (["0", "2"], "different problems or prompts (prompt_suffix: 'benchmark' and None)"),
        (["0", "3"], "different problems or prompts (limit: None and 5)"),
        (["0", "nowhere"], "nowhere', which holds no samples.jsonl"),
        (["0"], "compare has 1 folders, but takes two"),
        (["0", "1", "--benchmark", "gsm8k"], "benchmark is 'gsm8k', but compare reads two evaluations"),
        (["0", "1", "--overwrite", "true"], "overwrite is True, but compare"),
        (["0", "1", "--k", "8"], "k has 8"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(folders, monkeypatch, capsys, words, said):
    monkeypatch.chdir(folders[0].parent)
    assert main(["eval", "--compare", *words]) == 2
    assert said in capsys.readouterr().err


def test_an_evaluation_that_was_not_finished_is_refused(folders, monkeypatch, capsys):
    path = folders[1] / "samples.jsonl"
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"".join(whole.splitlines(keepends=True)[:-1])):
        path.write_bytes(broken)
        try:
            assert main(["eval", "--compare", *map(str, folders[:2])]) == 2
        finally:
            path.write_bytes(whole)
        assert "was not finished" in capsys.readouterr().err
    (folders[1] / "summary.json").rename(folders[1] / "kept.json")
    assert main(["eval", "--compare", *map(str, folders[:2])]) == 2
    (folders[1] / "kept.json").rename(folders[1] / "summary.json")
    assert "was not finished" in capsys.readouterr().err
