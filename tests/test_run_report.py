"""`trl-prime report`: reading the folders of runs, thinning out curves, and the page."""

import json
import random
import shutil

import pytest
from pages import ATTACKS, Document, assert_no_address, row, write_completions, write_run

from trl_prime.cli import main
from trl_prime.reports.run_report import (
    MAX_POINTS,
    PANELS,
    Panel,
    best_and_worst,
    curve,
    downsample,
    other_panels,
    panel_data,
    read_run,
    result_rows,
    run_names,
    run_report,
    setting_rows,
    start_and_end,
    statistics,
)

NAN = float("nan")


HISTORY = [
    {"step": step, "reward": step / 10, "prm/trust": 0.5, "filter/pass_rate": 0.25, "own/metric": -step}
    for step in range(1, 11)
]


# --- Curves ---


@pytest.mark.parametrize("num_points, max_points", [(5, 4), (2001, 2000), (10_000, 500), (37, 6)])
def test_a_thinned_out_curve_keeps_its_outline(num_points, max_points):
    generator = random.Random(num_points)
    steps = sorted(generator.sample(range(10 * num_points), num_points))
    values = [generator.gauss(0, 1) for _ in steps]
    spike = generator.randrange(1, num_points - 1)
    values[spike] = 100.0
    x, y = downsample(steps, values, max_points)
    assert 2 <= len(x) == len(y) <= max_points
    assert x == sorted(x) and set(zip(x, y, strict=True)) <= set(zip(steps, values, strict=True))
    assert (x[0], y[0], x[-1], y[-1]) == (steps[0], values[0], steps[-1], values[-1])
    assert (steps[spike], 100.0) in set(zip(x, y, strict=True)) and min(y) == min(values)
    # No stretch is left out
    widest = max(steps.index(b) - steps.index(a) for a, b in zip(x, x[1:], strict=False))
    assert widest <= 4 * num_points / max_points + 4


def test_a_short_curve_stays_as_it_is():
    assert downsample([1, 2, 3], [0.5, 0.25, 1.0], 4) == ([1, 2, 3], [0.5, 0.25, 1.0])
    assert downsample([], [], 4) == ([], [])


def test_a_curve_has_finite_numbers_only_and_the_later_of_two_values():
    history = [
        {"step": 2, "reward": 0.1},
        {"step": 1, "reward": 0.2},
        {"step": 2, "reward": 0.3},
        {"step": 3, "reward": NAN},
        {"step": 4, "reward": "high"},
        {"reward": 0.9},
        {"step": 5, "reward": None, "loss": 1.0},
        {"step": 6, "reward": 0},
    ]
    assert curve(history, "reward") == ([1, 2, 6], [0.2, 0.3, 0])
    assert curve(history, "none") == ([], [])


def test_panels_of_several_runs(tmp_path):
    long = [{"step": step, "reward": float(step % 7)} for step in range(5000)]
    runs = [read_run(write_run(tmp_path / str(i), history)) for i, history in enumerate((HISTORY, long, []))]
    panel = panel_data(runs, Panel("t", {"reward": "r", "prm/trust": "t"}))
    assert [(s["run"], s["line"], len(s["x"])) for s in panel["series"]][::2] == [(0, 0, 10), (0, 1, 10)]
    assert panel["series"][1]["run"] == 1 and 1000 < len(panel["series"][1]["x"]) <= MAX_POINTS
    assert panel["series"][0]["y"] == [step / 10 for step in range(1, 11)]
    assert panel_data(runs, Panel("t", {"none": "n"})) is None
    assert [p.title for p in other_panels(runs)] == ["own/metric"]
    metrics = [metric for p in PANELS for metric in p.series]
    assert len(metrics) == len(set(metrics))


# --- Tables ---


def test_statistics_by_hand():
    values = [0.0, 0.2, *[0.5] * 16, 0.9, 1.0]
    history = [{"step": step, "m": value} for step, value in enumerate(values)]
    assert start_and_end(values) == (pytest.approx(0.1), pytest.approx(0.95))
    assert start_and_end([0.25]) == (0.25, 0.25)
    (found,) = statistics(history, {"m": "label", "none": "other"})
    assert found["label"] == "label" and found["mean"] == pytest.approx(sum(values) / 20)
    assert (found["lowest"], found["highest"]) == (0.0, 1.0)


def test_settings_and_results_of_several_runs(tmp_path):
    first = {"prm_beta": 0.5, "seed": 0, "zzz": [1], "aaa": None}
    results = {"before": {"greedy": 0.25}, "prm": {"pairwise_accuracy": 0.75, "first_error_auc": NAN}, "note": "x"}
    runs = [
        read_run(write_run(tmp_path / "a", prime_config=first, results=results)),
        read_run(write_run(tmp_path / "b", prime_config={**first, "zzz": [2]}, results={"before": {"greedy": 0.5}})),
        read_run(write_run(tmp_path / "c")),
    ]
    rows = setting_rows(runs)
    assert [(r["name"], r["differs"]) for r in rows] == [
        ("zzz", True), ("prm_beta", False), ("aaa", False), ("seed", False),
    ]  # fmt: skip
    assert rows[0]["values"] == ["[1]", "[2]", "–"] and rows[2]["values"] == ["null", "null", "–"]
    assert [(r["label"], r["values"]) for r in result_rows(runs)] == [
        ("policy, before: greedy", [0.25, 0.5, None]),
        ("PRM: pairwise accuracy", [0.75, None, None]),
    ]


def test_names_of_runs_differ(tmp_path):
    assert run_names(["x/run", "y/other"]) == ["run", "other"]
    assert run_names(["x/run", "y/run", "y/z"]) == ["x/run", "y/run", "y/z"]
    assert run_names(["x/run", "x/run"]) == ["run", "run"]


# --- Reading ---


def test_an_empty_folder_gives_a_page_with_sentences(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 0
    document = Document((tmp_path / "report.html").read_text())
    printed = capsys.readouterr().out
    for word in ("No metrics", "No results", "No settings", "No completions"):
        assert word in document.text and word in printed
    assert document.data["panels"] == [] and not document.of_class("charts")


def test_broken_files_give_sentences(tmp_path):
    write_run(tmp_path, results="{", prime_config="[1]", trainer_state=json.dumps({"log_history": 3}))
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions" / "completions_00001.parquet").write_bytes(b"no parquet")
    (tmp_path / "prm").mkdir()
    run = read_run(tmp_path)
    assert run.history == [] and run.results == {} and run.settings == {} and run.completions == []
    for word in ("results.json could not be read", "prime_config.json holds no object", "00001.parquet could not"):
        assert any(word in sentence for sentence in run.missing)
    assert "could not be read" in Document(run_report([run], 3)).text


def test_the_last_checkpoint_stands_in_for_the_root(tmp_path):
    for step in (20, 100):
        write_run(tmp_path / f"checkpoint-{step}", HISTORY[: step // 20])
        (tmp_path / f"checkpoint-{step}" / "prm").mkdir()
        (tmp_path / f"checkpoint-{step}" / "prm" / "implicit_prm.json").write_text("{}")
    write_run(tmp_path / "checkpoint-999-old", [])
    run = read_run(tmp_path)
    assert len(run.history) == 5 and run.prm_folder == tmp_path / "checkpoint-100" / "prm"
    write_run(tmp_path, HISTORY)
    assert len(read_run(tmp_path).history) == 10


def test_the_table_of_the_last_step_is_read(tmp_path):
    messages = [{"role": "user", "content": "p", "name": None}]
    for step in (9, 10, 99999, 100000):
        write_completions(tmp_path, step, [row(messages, f"at {step}", 1.0, 0.0, trained=False)])
    (found,) = read_run(tmp_path).completions
    assert found["completion"] == "at 100000" and found["prompt"] == [{"role": "user", "content": "p"}]
    # Completions that were not trained on were not scored: zero is no process reward
    assert found["process_reward"] is None and found["outcome"] == 1.0


# --- Completions ---


def test_best_and_worst_by_outcome_and_by_process_reward():
    rows = [
        row("p", "right, liked", 1.0, 2.0),
        row("p", "right, disliked", 1.0, -2.0),
        row("p", "wrong, liked", 0.0, 3.0),
        row("p", "wrong, disliked", 0.0, -3.0),
        row("p", "half", 0.5, 0.1),
        row("p", "not judged", NAN, 9.0),
        row("p", "not scored", 1.0, None),
        row("p", "right, liked", 1.0, 2.0),
    ]
    random.Random(0).shuffle(rows)
    lists = {title: [r["completion"] for r in chosen] for title, chosen in best_and_worst(rows, 1)}
    assert lists == {
        "Highest outcome": ["right, liked"],
        "Lowest outcome": ["wrong, disliked"],
        "Highest process reward": ["not judged"],
        "Lowest process reward": ["right, disliked"],
    }
    lists = dict(best_and_worst(rows, 3))
    assert [r["completion"] for r in lists["Highest outcome"]] == ["right, liked", "not scored", "right, disliked"]
    shown = [r["completion"] for chosen in lists.values() for r in chosen]
    assert len(shown) == len(set(shown)) == 7
    assert best_and_worst([], 3) == []


def test_what_got_no_reward_is_not_among_the_highest_outcomes():
    rows = [row("p", "half", 0.5, 0.1), row("p", "wrong", 0.0, 0.0), row("p", "punished", -1.0, 0.0)]
    lists = {title: [r["completion"] for r in chosen] for title, chosen in best_and_worst(rows, 3)}
    assert lists["Highest outcome"] == ["half"] and lists["Lowest outcome"] == ["punished", "wrong"]
    assert "Highest outcome" not in dict(best_and_worst(rows[1:], 3))


def test_the_gold_answer_stands_beside_the_completion(tmp_path):
    write_run(tmp_path, HISTORY)
    long = "x" * 1000
    rows = [
        {**row("p", "so it is 4", 0.0, 0.5), "gold": "four\x1b", "answer": "4"},
        {**row("p", "other text", 1.0, -0.5), "gold": long, "answer": None},
        {**row("p", "program", 0.5, -0.5), "gold": None, "answer": None},
    ]
    write_completions(tmp_path, 10, rows)
    text = Document(run_report([read_run(tmp_path)], 3)).text
    assert "gold answerfour<U+001B>" in text and "answer found4" in text
    assert f"gold answer{'x' * 300}" in text and "x" * 301 not in text
    # Without one, as for code, nothing is said
    assert text.count("gold answer") == 2 and text.count("answer found") == 1


def test_without_a_prm_the_completions_are_shown_as_text(tmp_path):
    write_run(tmp_path, HISTORY)
    write_completions(tmp_path, 10, [row("p", "some text", 1.0, 0.5), row("p", "other text", 0.0, -0.5)])
    run = read_run(tmp_path)
    document = Document(run_report([run], 2))
    assert "some text" in document.text and document.data["cards"] == [None, None]
    assert any("No heat maps" in sentence for sentence in run.missing)
    assert not Document(run_report([read_run(tmp_path)], 0)).of_class("card")


def test_a_prm_that_does_not_load_costs_only_the_heat_maps(tmp_path):
    write_run(tmp_path, HISTORY)
    write_completions(tmp_path, 10, [row("p", "some text", 1.0, 0.5)])
    write_run(tmp_path / "prm", implicit_prm={"reference": "no/such-model", "adapter": False})
    document = Document(run_report([read_run(tmp_path)], 2))
    assert "some text" in document.text and "No heat maps: the PRM could not score" in document.text
    assert document.data["panels"]


def test_whatever_a_run_holds_is_text(tmp_path):
    runs = []
    for number, attack in enumerate(ATTACKS[:2]):
        history = [{"step": step, "reward": 0.5, attack: 1.0, "filter/pass_rate": 0.5} for step in (1, 2)]
        files = {"results": {attack: {attack: 1.0}}, "prime_config": {attack: attack, "seed": number}}
        folder = write_run(tmp_path / str(number), history, **files)
        write_completions(folder, 2, [row(attack, attack, 1.0, 0.5), row(attack, ATTACKS[5], 0.0, -0.5)])
        runs.append(read_run(folder, name=attack))
    document = Document(run_report(runs, 2))
    assert len(document.scripts) == 3
    assert not {tag for tag, _ in document.elements} & {"img", "iframe", "a", "base"}
    assert sum(tag == "title" for tag, _ in document.elements) == 1
    assert_no_address(document)
    assert document.data["runs"] == ATTACKS[:2]
    assert {panel["title"] for panel in document.data["others"]} == set(ATTACKS[:2])


# --- A run of its own ---


def test_report_of_a_training(train, tmp_path, capsys):
    trainer = train(log_completions=True, max_steps=3, logging_steps=1)
    trainer.save_model()
    trainer.save_state()
    first = trainer.args.output_dir
    second = tmp_path / "second"
    shutil.copytree(first, second)
    out = tmp_path / "compared.html"
    capsys.readouterr()
    assert main(["report", first, str(second), "--output", str(out), "--score", "1"]) == 0
    assert "No heat maps" not in capsys.readouterr().out
    document = Document(out.read_text())
    assert_no_address(document)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    panel = next(panel for panel in document.data["panels"] if panel["title"] == "Outcome reward")
    assert [series["run"] for series in panel["series"]] == [0, 1]
    assert all(series["y"] == pytest.approx(rewards, rel=1e-4) for series in panel["series"])
    cards = document.data["cards"]
    assert len(cards) >= 4 and all(cards) and cards[: len(cards) // 2] == cards[len(cards) // 2 :]
    for card, shown in zip(cards, document.of_class("card"), strict=True):
        assert sum(card["rewards"]) == pytest.approx(float(shown["data-q"]), abs=1e-3)


def test_wrong_arguments_are_named(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "none' is no folder" in capsys.readouterr().err
    assert main(["report", "--runs", str(tmp_path), "--score=-1"]) == 2
    assert "--score is -1" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "--runs" in capsys.readouterr().err
