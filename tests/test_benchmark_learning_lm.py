"""The benchmark of learning on a language model: its oracle, what it measures of a PRM, and its curve."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from trl_prime import PRIMETrainer
from trl_prime.advantages import RolloutRewards
from trl_prime.tasks.number_chains import answer_reward, make_splits, step_labels
from trl_prime.tasks.task import Task
from trl_prime.tasks.tiny_model import build_model, build_tokenizer

PROMPT = "Start with 5, add 9, subtract 11.\n"
RECIPES = Path(__file__).parent.parent / "recipes"
RIGHT = "5+9=14\n14-11=3\nAnswer: 3"


@pytest.fixture(scope="module")
def learning_lm(benchmarks):
    import learning_lm

    return learning_lm


@pytest.fixture(scope="module")
def characters():
    return build_tokenizer("".join(sorted(set(PROMPT + RIGHT + "doubleit0123456789+-="))))


@pytest.mark.parametrize(
    ("completion", "token"),
    [
        (RIGHT, None),
        (RIGHT + "\n", None),
        (RIGHT.replace("14", "15"), RIGHT.index("4")),
        (RIGHT.replace("Answer: 3", "Answer: 4"), len(RIGHT) - 1),
        ("5+9", len("5+9") - 1),
        (RIGHT + "0", len(RIGHT)),
    ],
)
def test_the_first_wrong_token_is_where_the_right_completion_is_left(learning_lm, completion, token):
    assert learning_lm.first_wrong_token(PROMPT, list(completion)) == token


def rewards_of(tokenizer, completions, process_rewards=None):
    """A group of completions, the last of which was left out."""
    ids = [tokenizer(text)["input_ids"] for text in completions]
    num_tokens = max(map(len, ids))
    completion_ids = torch.full((len(ids), num_tokens), tokenizer.pad_token_id)
    mask = torch.zeros(len(ids), num_tokens, dtype=torch.bool)
    for row, tokens in enumerate(ids):
        completion_ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = row < len(ids) - 1
    return RolloutRewards(
        outcome_rewards=torch.tensor(answer_reward(completions, ["3"] * len(ids))),
        process_rewards=torch.zeros(mask.shape) if process_rewards is None else process_rewards(ids, mask),
        completion_mask=mask,
        reward_mask=mask,
        num_generations=len(ids),
        settings={"process_gamma": 0.0, "outcome_weight": 0.0, "whiten": False},
        completion_ids=completion_ids,
        prompts=[PROMPT] * len(ids),
        completions=completions,
    )


def test_the_oracle_blames_the_first_wrong_token(learning_lm, characters):
    completions = [RIGHT, RIGHT.replace("14", "15"), RIGHT.replace("=3\n", "=0\n"), RIGHT]
    advantages = learning_lm.oracle_combination(rewards_of(characters, completions), characters)
    lowest = advantages.argmin(1)
    assert advantages[1, lowest[1]] < -1
    assert advantages[2, lowest[2]] < -1
    assert lowest[1:3].tolist() == [RIGHT.index("4"), RIGHT.index("3")]
    assert advantages[0].min() > advantages[1].min() / 2
    assert not advantages[3].any()


def test_the_auc_of_a_prm_is_that_of_its_steps(learning_lm, characters):
    completions = [RIGHT, RIGHT.replace("14", "15"), RIGHT.replace("Answer: 3", "Answer: 4"), RIGHT]

    def blame(ids, mask):
        # The sum over a wrong step is -2, over one right step -3
        values = torch.zeros(mask.shape)
        values[1, RIGHT.index("14") : RIGHT.index("14") + 2] = -1.0
        values[2, len(RIGHT) - 1 :] = -2.0
        values[0, :1] = -3.0
        return values

    found = {}
    rewards = rewards_of(characters, completions, blame)
    advantages = learning_lm.measured_combination(rewards, characters, found)
    assert torch.equal(advantages, rewards.combine())
    # Five right steps come before the first wrong ones, one of which has less than the wrong two
    assert found["first_error_auc"] == pytest.approx(4 / 5)


def test_the_curve_has_means_of_windows(learning_lm):
    run = {
        "history": [{"reward": value, "first_error_auc": None if value else 0.5} for value in [0, 0, 1, 1, 1, 1, 1]]
    }
    assert learning_lm.windows(run, "reward") == [0.6, 1.0]
    assert learning_lm.windows(run, "first_error_auc")[0] == 0.5
    assert learning_lm.steps_to(run, 0.6) == 5
    assert learning_lm.steps_to(run, 0.7) == 6
    assert learning_lm.steps_to(run, 0.9) == 7
    assert learning_lm.steps_to(run, 1.1) is None


def test_steps_are_counted_to_the_best_final_accuracy_of_outcome_rewards(learning_lm):
    def run(method, rate, rewards):
        history = [{"reward": value} for value in rewards for _ in range(learning_lm.WINDOW)]
        end = {"greedy": 0.5, "sampled": 0.25}
        about = {"method": method, "rate": rate, "beta": 0.0, "seed": 0, "steps": 15, "seconds": 1}
        return {**about, "history": history, "end": end}

    slow, best, prime = (
        ("rloo", 1e-4, [0.1, 0.1, 0.2]),
        ("rloo", 3e-4, [0.1, 0.2, 0.4]),
        ("prime", 3e-4, [0.1, 0.4, 0.6]),
    )
    table = learning_lm.report_table([run(*each) for each in (slow, best, prime)])
    column = [line.split(" | ")[8] for line in table.splitlines() if "|---" not in line]
    assert column == ["steps to the last of rloo", "never", "15", "10"]


def test_the_recipe_has_the_settings_of_the_benchmark(learning_lm):
    recipe = yaml.safe_load((RECIPES / "smollm2-135m/prime/lora-cpu.yaml").read_text())
    prime = {**learning_lm.COMMON, **learning_lm.PRM, **learning_lm.SHARED}
    prime |= learning_lm.PRIME_METHODS["prime, calibrated"]
    # What is only about the form of a run
    form = ("model_init_kwargs", "disable_tqdm", "save_steps", "save_total_limit")
    assert {name: recipe[name] for name in prime if name not in form} == {
        name: value for name, value in prime.items() if name not in form
    }
    assert recipe["task_kwargs"] == learning_lm.TASK
    assert recipe["prm_lora_layers"] == learning_lm.PRM_LAYERS
    policy = learning_lm.adapter(30, learning_lm.POLICY_LAYERS)
    assert (recipe["lora_r"], recipe["lora_alpha"], recipe["lora_dropout"]) == (
        policy.r,
        policy.lora_alpha,
        policy.lora_dropout,
    )
    layers = [i for i in range(30) if re.fullmatch(*recipe["lora_target_modules"], f"model.layers.{i}.mlp.up_proj")]
    assert layers == policy.layers_to_transform


def test_methods_train_resume_and_are_reported(learning_lm, characters, tmp_path, monkeypatch, capsys, one_thread):
    base = tmp_path / "base"
    build_model(characters, seed=0).save_pretrained(base)
    characters.save_pretrained(base)
    train, test = make_splits(32, 4, num_steps=1)
    task = Task("chains", str(base), train, test, [answer_reward], step_labels)
    monkeypatch.setattr(learning_lm, "make_task", lambda folder: task)
    monkeypatch.setattr(learning_lm, "MAX_COMPLETION_LENGTH", 8)
    shared = {**learning_lm.SHARED, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    monkeypatch.setattr(learning_lm, "SHARED", {**shared, "max_completion_length": 8, "save_steps": 1})
    monkeypatch.setattr(learning_lm, "PRM_LAYERS", 1)
    monkeypatch.setattr(learning_lm, "POLICY_LAYERS", 2)
    (tmp_path / "base.json").write_text(json.dumps({"greedy": 0.25, "sampled": 0.125}))
    methods, steps = ("rloo", "oracle", "prime"), []
    training_step = PRIMETrainer.training_step
    monkeypatch.setattr(
        PRIMETrainer,
        "training_step",
        lambda self, *args: (steps.append(self.state.global_step), training_step(self, *args))[1],
    )
    for method in methods:
        output = tmp_path / "runs" / f"{method}.json"
        trained = learning_lm.make_trainer(method, 0, 1e-3, 0.25, 2, task, output.with_suffix(""))[0]
        assert trained.args.beta == 0.25
        assert trained.args.scale_rewards == "none"
        if method == "prime":  # it was stopped after its first step
            trained.args.max_steps = 1
            trained.train()
        steps.clear()
        learning_lm.train(method, 0, 1e-3, 0.25, 2, tmp_path, output)
        if method == "prime":
            assert set(steps) == {1}
        run = json.loads(output.read_text())
        assert [row["step"] for row in run["history"]] == [1, 2]
        assert not output.with_suffix("").exists()
        assert ("prm/loss" in run["history"][-1]) == method.startswith("prime")
    # A longer run of a method is a curve of its own
    longer = {**run, "steps": 10, "history": run["history"] * 5}
    (tmp_path / "runs" / "longer.json").write_text(json.dumps(longer))
    monkeypatch.setattr(
        sys,
        "argv",
        ["learning_lm.py", "report", "--folder", str(tmp_path)]
        + [f"--output={tmp_path / 'all.json'}", f"--image={tmp_path / 'curves.png'}"],
    )
    draw_curves, labels = learning_lm.draw_curves, []
    monkeypatch.setattr(
        learning_lm, "draw_curves", lambda curves, *rest: (labels.extend(curves), draw_curves(curves, *rest))
    )
    learning_lm.main()
    assert sorted(labels) == ["oracle, steps 2", "prime, steps 10", "prime, steps 2", "rloo, steps 2"]
    printed = capsys.readouterr().out
    assert "base: greedy 25.0%, sampled 12.5%" in printed
    assert all(f"| {method} |" in printed for method in methods)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "all.json").read_text())["runs"]) == len(methods) + 1


def test_runs_that_are_not_there_yet_are_made(learning_lm, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "rloo-0-0.001-0.5-7.json").write_text("{}")
    commands = []
    monkeypatch.setattr(learning_lm.subprocess, "run", lambda command, check: commands.append(command[2:]))
    words = ["--methods", "rloo", "prime", "--seeds=0", "--rates=1e-3", "--betas", "0", "0.5", "--steps=7"]
    monkeypatch.setattr(sys, "argv", ["learning_lm.py", "run", *words, f"--folder={tmp_path}"])
    learning_lm.main()
    made = [(command[2], command[5]) for command in commands]
    assert made == [("rloo", "--betas=0.0"), ("prime", "--betas=0.0"), ("prime", "--betas=0.5")]
