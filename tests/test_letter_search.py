"""Letter search: the rules, the demonstrations, and a run over turns with TRL's own loop."""

import importlib.util
import itertools
import json
import re

import pandas
import pytest
import yaml
from transformers import AutoTokenizer

from trl_prime.cli import main
from trl_prime.commands.arguments import recipe_path
from trl_prime.tasks import letter_search
from trl_prime.tasks.letter_search import (
    LETTERS,
    NUM_QUESTIONS,
    LetterSearch,
    answer_reward,
    make_dataset,
    make_demonstrations,
    prepare,
)

reads_tool_calls = pytest.mark.skipif(
    importlib.util.find_spec("transformers.utils.chat_parsing") is None, reason="needs transformers 5.13"
)


def test_the_environment_answers_by_the_alphabet():
    game = LetterSearch()
    for secret, letter in itertools.product(LETTERS, LETTERS):
        assert game.reset(secret=secret, prompt="another column") is None
        assert game.ask(letter) == ("+" if LETTERS.index(secret) > LETTERS.index(letter) else "-")


def test_halving_what_is_left_is_always_right():
    game = LetterSearch()
    for secret in LETTERS:
        game.reset(secret=secret)
        left = LETTERS
        for _ in range(NUM_QUESTIONS):
            half = len(left) // 2
            left = left[half:] if game.ask(left[half - 1]) == "+" else left[:half]
        assert left == secret


def test_only_the_last_turn_is_judged_and_by_every_character():
    turns = [{"role": "assistant", "content": "=c"}, {"role": "tool", "content": "+"}]
    completions = [[*turns, {"role": "assistant", "content": text}] for text in ("=c", "=d", "c", "=cc", "")]
    assert answer_reward(completions, secret=["c"] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_games_are_seeded_and_tell_the_policy_nothing():
    games = make_dataset(400, seed=3)
    assert set(games["secret"]) == set(LETTERS) and len({json.dumps(prompt) for prompt in games["prompt"]}) == 1
    assert games.to_list() == make_dataset(400, seed=3).to_list() != make_dataset(400, seed=4).to_list()


@pytest.mark.parametrize("waste_rate", [0.0, 0.5, 1.0])
def test_demonstrations_keep_the_rules_and_waste_as_told(waste_rate):
    asked = wasted = 0
    for row in make_demonstrations(600, seed=1, waste_rate=waste_rate):
        text = row["completion"]
        found = re.findall(r"\?([a-h])<eos>([+-])>", text)
        assert text == "".join(f"?{letter}<eos>{told}>" for letter, told in found) + text[-2:] and len(found) <= 3
        left = set(LETTERS)
        for letter, told in found:
            after = {other for other in LETTERS if other > letter}
            new = left & after if told == "+" else left - after
            asked, wasted, left = asked + 1, wasted + (new == left), new
        assert text[-2] == "=" and text[-1] in left
    if waste_rate:
        assert 0.2 * waste_rate < wasted / asked < waste_rate
    else:
        assert wasted == 0


def test_a_waste_rate_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"waste_rate must be from 0 to 1, got 1.5"):
        make_demonstrations(1, waste_rate=1.5)


def test_an_old_transformers_is_refused_before_the_warm_up(monkeypatch, tmp_path):
    monkeypatch.setattr(letter_search.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'letter_search'.*cannot read.*5.13 or newer"):
        prepare(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_task_and_an_environment_beside_it_are_refused(capsys):
    flags = ["--config", "letter-search", "--environment_factory", "my_module.Shop"]
    assert main(["train", *flags]) == 2
    assert "environment_factory is 'my_module.Shop', but the task 'letter_search'" in capsys.readouterr().err


@reads_tool_calls
def test_a_run_from_the_recipe_plays_games_of_several_turns(tmp_path):
    flags = {
        "output_dir": tmp_path,
        "task_kwargs": json.dumps({"warm_up_steps": 60, "num_train": 64, "num_test": 16}),
        "max_steps": 1,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 16,
        "log_completions": "true",
        "disable_tqdm": "true",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert main(["train", "--config", "letter-search", *words]) == 0
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    (trained,) = [row for row in history if "grad_norm" in row]
    assert trained["tools/call_frequency"] > 1 and trained["tools/failure_frequency"] == 0
    assert [row["step"] for row in history if "eval_reward" in row] == [0, 1]
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    for completion, rewards in zip(table["completion"], table["prime/turn_rewards"], strict=True):
        assert len(rewards.split()) == sum(message["role"] == "assistant" for message in completion)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sft")
    read = tokenizer.parse_response(tokenizer("?c<eos>").input_ids, prefix=tokenizer("a-h>").input_ids)
    assert read["tool_calls"][0]["function"] == {"name": "ask", "arguments": {"letter": "c"}}
    # Pages of the run show the turns
    assert main(["report", str(tmp_path), "--score", "1"]) == 0
    assert "process rewards of the turns then" in (tmp_path / "report.html").read_text()

    # The same game with a model and data of one's own
    data = tmp_path / "games.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_dataset(32).to_list()))
    recipe = yaml.safe_load(recipe_path("letter-search").read_text())
    own = {
        **{name: value for name, value in recipe.items() if name != "task" and not name.startswith("eval_")},
        "model_name_or_path": str(tmp_path / "sft"),
        "dataset_name": str(data),
        "environment_factory": "trl_prime.tasks.letter_search.LetterSearch",
        "reward_funcs": ["trl_prime.tasks.letter_search.answer_reward"],
        "output_dir": str(tmp_path / "own"),
        "max_steps": 1,
        "per_device_train_batch_size": 32,
        "disable_tqdm": True,
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    assert main(["train", "--config", str(tmp_path / "own.yaml")]) == 0
    history = json.loads((tmp_path / "own" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["tools/call_frequency"] > 1 and history[0]["filter/judged"] == 1
