"""`trl-prime score`: the page, the terminal and the numbers."""

import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from pages import ATTACKS, Document, assert_no_address, completion, hostile_completions
from rich.console import Console

from trl_prime import ImplicitPRM
from trl_prime.cli import main
from trl_prime.commands.score import read_rows
from trl_prime.implicit_prm.accuracies import absolute_accuracy, pairwise_accuracy
from trl_prime.reports.heat_map import THEMES, colour
from trl_prime.reports.page import render_page
from trl_prime.reports.score_page import score_page, summarize
from trl_prime.reports.terminal import print_completions

ABOUT = {"prm": "some/prm", "beta": 1.0}


@pytest.fixture
def prm_path(random_prm, tmp_path):
    random_prm(beta=0.5).save_pretrained(tmp_path / "run" / "prm")
    return str(tmp_path / "run")


# --- The page ---


def test_the_page_shows_every_number():
    tokens = ["1", "+", "1\n", "so ", "2\n", "done"]
    rewards = [0.4, -0.2, 0.1, -0.8, 0.3, 0.05]
    html = score_page([completion("what is 1+1", tokens, rewards, 1.0)], **ABOUT)
    document = Document(html)
    (card,) = document.data["cards"]
    assert card["rewards"] == rewards and card["steps"] == [0, 0, 0, 1, 1, 2]
    assert card["stepRewards"] == pytest.approx([0.3, -0.5, 0.05])
    assert card["reference"] == [-1, -2, -3, -4, -5, -6]
    assert card["prm"] == pytest.approx([-i - 1 + reward for i, reward in enumerate(rewards)], abs=5e-4)
    assert len(document.of_class("token")) == 6 and len(document.of_class("step")) == 3
    scale = sorted(map(abs, rewards))[-1] * 0.75 + sorted(map(abs, rewards))[-2] * 0.25  # 95th percentile of 6
    for token, reward in zip(document.of_class("token"), rewards, strict=True):
        shown = float(re.match(r"--t:([-\d.]+);", token["style"])[1])
        assert shown == pytest.approx(max(-1, min(1, reward / scale)), abs=0.006)
    assert ["lowest" in step["class"].split() for step in document.of_class("step")] == [False, True, False]
    total = sum(rewards)
    for text in (f"−{-total:.3f}", f"{100 / (1 + math.exp(-total)):.1f} %", "✓ outcome 1", "what is 1+1", "−0.500"):
        assert text in document.text
    # The line break at a step's end is shown as an arrow and makes no empty row
    assert ">1↵</span>" in html and "↵\n</span>" not in html
    curve = next(a["points"] for tag, a in document.elements if tag == "polyline" and a["class"] == "curve")
    assert len(curve.split()) == 7


def test_completions_of_one_prompt_stand_together_in_the_order_of_their_numbers():
    rows = [completion(p, [t], [r]) for p, t, r in (("a", "x", 0.1), ("b", "y", 0.2), ("a", "z", 0.3))]
    document = Document(score_page(rows, **ABOUT))
    assert [card["rewards"] for card in document.data["cards"]] == [[0.1], [0.3], [0.2]]
    cards = document.of_class("card")
    assert [(card["data-index"], float(card["data-q"])) for card in cards] == [("0", 0.1), ("1", 0.3), ("2", 0.2)]
    assert len(document.of_class("group")) == 2


def test_model_text_is_text_whatever_it_holds():
    harmless = Document(score_page([completion("p", ["a\n", "b"], [0.1, 0.2], 1.0)], **ABOUT))
    document = Document(score_page(hostile_completions(), prm=ATTACKS[0], beta=1.0))
    assert {tag for tag, _ in document.elements} <= {tag for tag, _ in harmless.elements} | {"div"}
    assert len(document.scripts) == len(harmless.scripts) == 2
    assert document.scripts[1] == harmless.scripts[1]
    assert_no_address(document)
    for attack in ATTACKS:
        if "\0" not in attack:
            assert document.text.count(attack) >= 4
    assert "<U+001B>]0;hacked<U+0007>" in document.text and "<U+202E>" in document.text
    assert not any(character in score_page(hostile_completions(), **ABOUT) for character in "\0\x1b\u202e\u2028")


def test_data_in_a_script_cannot_end_it_and_must_be_finite():
    html = render_page("score.html.jinja", ["heat_map.js"], {"x": ATTACKS}, **_empty_context())
    document = Document(html)
    assert document.data == {"x": ATTACKS} and len(document.scripts) == 2
    assert "<" not in document.scripts[0] and ">" not in document.scripts[0]
    with pytest.raises(ValueError, match="JSON"):
        render_page("score.html.jinja", [], {"x": float("nan")}, **_empty_context())


def _empty_context():
    summary = {"lowest": {}, "by_position": [], "accuracy": None, "pairwise_accuracy": None}
    shown = {"summary": summary, "bars": {"lowest": [], "by_position": []}, "groups": [], "num_completions": 0}
    return {"title": "t", "prm": "p", "beta": 1.0, "full_token": 1.0, "full_step": 1.0, **shown}


def test_the_summary_against_the_losses_own_accuracies():
    groups = [
        [completion("a", ["x\n", "y"], [0.1, -0.4], 0.0), completion("a", ["x\n", "y"], [0.3, 0.2], 1.0)],
        [completion("b", ["x\n", "y"], [0.9, 0.8], 0.0), completion("b", ["x\n", "y"], [-0.3, 0.2], 1.0)],
    ]
    scores, outcomes = torch.tensor([-0.3, 0.5, 1.7, -0.1]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    summary = summarize(groups)
    assert summary["accuracy"] == absolute_accuracy(scores, outcomes) == 0.5
    assert summary["pairwise_accuracy"] == pairwise_accuracy(scores, outcomes, 2) == 0.5
    # The lower of two steps: at one quarter or at three quarters of the completion
    assert summary["lowest"] == {"right": [0, 0, 1, 0, 0, 0, 0, 1, 0, 0], "wrong": [0, 0, 0, 0, 0, 0, 0, 2, 0, 0]}
    assert summary["by_position"][2] == pytest.approx((0.1 + 0.3 + 0.9 - 0.3) / 4)
    unknown = summarize([[completion("a", ["x"], [0.1])]])
    assert unknown["accuracy"] is None and unknown["pairwise_accuracy"] is None and unknown["lowest"] == {}


# --- The terminal ---


def test_the_terminal_gets_colours_but_no_commands_from_a_model():
    rows = [completion("p" + ATTACKS[7], ["safe\n", "end"], [-0.5, 0.5], 1.0), *hostile_completions()]
    output = io.StringIO()
    print_completions(rows, Console(file=output, force_terminal=True, color_system="truecolor", width=200), 2)
    printed = output.getvalue()
    commands = re.findall(r"\x1b.?[^a-zA-Z]*[a-zA-Z]", printed)
    assert commands and all(re.fullmatch(r"\x1b\[[\d;]*m", command) for command in commands)
    assert not set(printed) & {"\0", "\x07", "\u202e"}
    for intensity in (-1.0, 1.0):
        red, green, blue = colour(intensity, THEMES["terminal"])
        assert f"48;2;{red};{green};{blue}" in printed
    plain = re.sub(r"\x1b\[[\d;]*m", "", printed)
    assert re.search(r"▶\s+-0.500 \s*safe↵", plain)
    assert "3 more are not shown" in plain and "q +0.000  probability 50.0%  outcome 1 ✓" in plain


# --- The command ---


def test_scores_from_the_command_line(prm_path, tmp_path, capsys):
    files = ["--html", str(tmp_path / "new" / "page.html"), "--json", str(tmp_path / "numbers.json")]
    flags = [
        "--prm_name_or_path",
        prm_path,
        "--prompt",
        "1+1=",
        "--completion",
        "2",
        "a+b+cd",
        "--step_delimiter",
        "+",
    ]
    assert main(["score", *flags, *files]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "numbers.json").read_text())
    expected = ImplicitPRM.from_pretrained(prm_path, step_delimiter="+").score(["1+1="] * 2, ["2", "a+b+cd"])
    assert written["beta"] == 0.5 and written["step_delimiter"] == "+" and written["prm"] == prm_path
    for row, result in zip(written["completions"], expected, strict=True):
        assert row["q"] == pytest.approx(result.reward, abs=1e-6)
        assert row["token_rewards"] == pytest.approx(result.token_rewards.tolist(), abs=1e-6)
        assert row["steps"] == result.steps and row["step_ids"] == result.step_ids
        ratios = [0.5 * (a - b) for a, b in zip(row["prm_logps"], row["ref_logps"], strict=True)]
        assert row["token_rewards"] == pytest.approx(ratios, abs=1e-6)
        assert f"q {result.reward:+.3f}" in printed
    document = Document((tmp_path / "new" / "page.html").read_text())
    assert [len(card["rewards"]) for card in document.data["cards"]] == [2, 7]
    assert document.data["cards"][1]["steps"] == [0, 0, 1, 1, 2, 2, 2]
    assert_no_address(document)


def test_beta_and_delimiter_can_be_given(prm_path, tmp_path):
    flags = ["score", "--prm_name_or_path", prm_path, "--prompt", "1", "--completion", "a+b", "--show", "0", "--json"]
    assert main([*flags, str(tmp_path / "a.json")]) == 0
    assert main([*flags, str(tmp_path / "b.json"), "--beta", "1.5", "--step_delimiter", "+"]) == 0
    first, second = (json.loads((tmp_path / name).read_text())["completions"][0] for name in ("a.json", "b.json"))
    assert second["q"] == pytest.approx(3 * first["q"], rel=1e-4)
    assert first["steps"] == ["a+b<eos>"] and second["steps"] == ["a+", "b<eos>"]


def test_a_prompt_is_the_users_message_for_a_prm_of_messages(prm_path, tmp_path, caplog):
    path = Path(prm_path, "prm")
    settings = json.loads((path / "implicit_prm.json").read_text())
    settings["text_format"]["messages"] = True
    (path / "implicit_prm.json").write_text(json.dumps(settings))
    flags = ["--prompt", "1+1=", "--completion", "2", "--show", "0", "--json", str(tmp_path / "numbers.json")]
    assert main(["score", "--prm_name_or_path", str(path), *flags]) == 0
    (row,) = json.loads((tmp_path / "numbers.json").read_text())["completions"]
    prompts = [[{"role": "user", "content": "1+1="}]], ["1+1="]
    expected, text = (ImplicitPRM.from_pretrained(str(path)).score(prompt, ["2"])[0].reward for prompt in prompts)
    assert row["q"] == pytest.approx(expected, abs=1e-6) and abs(expected - text) > 1e-3


def test_rows_of_a_file(tmp_path):
    user = [{"role": "user", "content": "p"}]
    rows = [
        {"prompt": "p", "completion": "a", "reward": 0.25, "other": [1]},
        {"prompt": user, "completions": ["b", [{"role": "assistant", "content": "c"}]], "label": [True, None]},
        {"prompt": "p", "completions": ["d", "e"]},
        {"prompt": "p", "completion": "f", "reward": None, "outcome": 1},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    read = read_rows(str(path))
    assert [c.outcome for c in read] == [0.25, 1.0, None, None, None, 1.0]
    assert [c.completion for c in read[:2]] == ["a", "b"] and read[2].completion[0]["content"] == "c"
    assert read[1].prompt == user


def test_rows_of_a_file_say_which_completions_were_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "1", "completion": "a", "truncated": True},
        {"prompt": "1", "completions": ["a", "b"], "truncated": [False, True]},
        {"prompt": "1", "completion": "a"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.truncated for row in read_rows(str(path))] == [True, False, True, False]
    path.write_text(json.dumps({"prompt": "1", "completions": ["a", "b"], "truncated": [True]}))
    with pytest.raises(ValueError, match="truncated"):
        read_rows(str(path))


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "is no JSON"),
        ("[1]", "must be an object"),
        ('{"prompt": "p"}', "either a `completion` or `completions`"),
        ('{"prompt": "p", "completion": "a", "completions": ["a"]}', "either a `completion` or `completions`"),
        ('{"prompt": 3, "completion": "a"}', "neither text nor a list of messages"),
        ('{"prompt": [{"content": "a"}], "completion": "a"}', "neither text nor a list of messages"),
        ('{"prompt": "p", "completions": "ab"}', "`completions` that are a list"),
        ('{"prompt": "p", "completions": ["a", "b"], "label": [1]}', "as many outcomes"),
        ('{"prompt": "p", "completions": ["a", "b"], "label": 1}', "as many outcomes"),
        ('{"prompt": "p", "completion": "a", "reward": "good"}', "'good', which is no number"),
        ('{"prompt": "p", "completion": [{"role": "user", "content": "a"}]}', "the first is the assistant"),
        ('{"prompt": "p", "completion": null}', "the first is the assistant"),
    ],
)
def test_a_malformed_row_is_refused_by_its_line(tmp_path, capsys, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "completion": "a"}\n\n' + row + "\n")
    # The file is read first: there is no PRM at that place
    assert main(["score", "--prm_name_or_path", str(tmp_path / "none"), "--input", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Line 3 of" in error


def test_wrong_arguments_are_named(tmp_path, capsys):
    def error_of(*flags):
        assert main(["score", "--prm_name_or_path", str(tmp_path / "none"), *flags]) == 2
        return capsys.readouterr().err

    direct = ["--prompt", "p", "--completion", "c"]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert "either --input" in error_of()
    assert "either --input" in error_of(*direct, "--input", "x")
    assert "go together" in error_of("--prompt", "p")
    assert "no file" in error_of("--input", str(tmp_path / "x.jsonl"))
    assert "no rows" in error_of("--input", str(empty))
    assert "--batch_size is 0" in error_of(*direct, "--batch_size", "0")
    assert "--beta is -1" in error_of(*direct, "--beta=-1")
    assert "no such folder" in error_of(*direct)
