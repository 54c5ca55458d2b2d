"""The command line: recipes, flags that override them, and errors that help."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from trl_prime import ImplicitPRM
from trl_prime.cli import main
from trl_prime.commands.train import parse_train_arguments
from trl_prime.data.running_sums import running_sum_reward
from trl_prime.rewards import load_object, load_reward_func

RECIPES = sorted(
    path
    for path in (Path(__file__).parent.parent / "recipes").rglob("*.yaml")
    if path.parent.name not in ("accelerate_configs", "prm")
)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse_and_validate(recipe, tmp_path):
    flags = ["--use_cpu", "true", "--output_dir", str(tmp_path)]
    _, args, _ = parse_train_arguments(["--config", str(recipe), *flags])
    assert args.output_dir == str(tmp_path)
    given = yaml.safe_load(recipe.read_text())
    assert args.learning_rate == given["learning_rate"]


def test_flags_win_over_the_recipe():
    _, args, _ = parse_train_arguments(["--config", str(RECIPES[0]), "--prm_beta", "0.125", "--use_cpu", "true"])
    assert args.prm_beta == 0.125


def test_a_misspelt_field_is_refused_with_the_nearest_name(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: x\nprm_lerning_rate: 0.1\n")
    assert main(["train", "--config", str(recipe)]) == 2
    message = capsys.readouterr().err
    assert "prm_lerning_rate" in message and "prm_learning_rate" in message


def test_an_unknown_command_and_no_command(capsys):
    assert main(["trian"]) == 2
    assert "'train'" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0


def test_an_unknown_task_names_the_nearest(tmp_path, capsys):
    flags = ["--task", "running_sum", "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    assert main(["train", *flags]) == 2
    assert "running_sums" in capsys.readouterr().err


def test_a_run_needs_a_model_and_data(tmp_path, capsys):
    assert main(["train", "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]) == 2
    assert "dataset_name" in capsys.readouterr().err


def test_reward_functions_by_name():
    from trl.rewards import think_format_reward

    assert load_reward_func("think_format_reward") is think_format_reward
    assert load_reward_func("trl_prime.data.running_sums.running_sum_reward") is running_sum_reward
    with pytest.raises(ValueError, match="'accuracy_reward'"):
        load_reward_func("acuracy_reward")
    with pytest.raises(ValueError, match="'running_sum_reward'"):
        load_object("trl_prime.data.running_sums.running_sum_rewards")
    with pytest.raises(ValueError, match="no_such_module"):
        load_object("no_such_module.reward")


def test_quickstart_end_to_end_in_small(tmp_path, capsys):
    quickstart = next(path for path in RECIPES if path.stem == "quickstart")
    small = {"num_digits": 3, "num_train": 64, "num_test": 8, "warm_up_steps": 3}
    flags = ["--output_dir", str(tmp_path), "--max_steps", "2", "--per_device_train_batch_size", "16"]
    assert main(["train", "--config", str(quickstart), "--task_kwargs", json.dumps(small), *flags]) == 0
    printed = capsys.readouterr().out
    assert "policy accuracy, greedy" in printed and str(tmp_path / "prm") in printed.replace("\n", "")
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["before"]) == set(results["after"]) == {"greedy", "sampled"}
    assert "first_error_auc" in results["prm"]
    assert (tmp_path / "learning_curve.png").stat().st_size > 10_000
    AutoModelForCausalLM.from_pretrained(tmp_path)
    scored = ImplicitPRM.from_pretrained(tmp_path).score(["1 2 3="], ["1\n3\n6"])
    assert [step.strip("\n") for step in scored[0].steps][:2] == ["1", "3"]
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert any("prm/loss" in row for row in history)


def digits_reward(prompts, completions, solution, **kwargs):
    """A stand-in that reads what the adapter makes."""
    for (system, user), answer in zip(prompts, solution, strict=True):
        assert system == {"role": "system", "content": "count"}
        assert user["content"] == f"{int(answer) - 1} plus 1\n\ngive the number"
    return [float(sum(map(ord, completion[0]["content"])) % 2) for completion in completions]


def _train_flags(tmp_path, model_path, data, **settings):
    settings = {
        "model_name_or_path": model_path,
        "dataset_name": data,
        "dataset_format": "gsm8k",
        "reward_funcs": f"{__name__}.digits_reward",
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "max_completion_length": 8,
        "use_cpu": "true",
        "bf16": "false",
        "dtype": "float32",
        "report_to": "none",
        "disable_tqdm": "true",
        "logging_steps": 1,
        "gradient_checkpointing": "false",
        "save_strategy": "no",
        **settings,
    }
    return ["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def test_trains_on_a_local_file_in_gsm8k_form(tmp_path, model_path, capsys):
    rows = [{"question": f"{i} plus 1", "answer": f"it is {i + 1}\n#### {i + 1}"} for i in range(16)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "no answer", "answer": "none"}]))
    suffix = {"system_prompt": "count", "prompt_suffix": "give the number"}
    assert main(_train_flags(tmp_path, model_path, data, **suffix)) == 2
    assert "Row 16 is no 'gsm8k' row" in capsys.readouterr().err
    assert main(_train_flags(tmp_path, model_path, data, on_malformed_row="skip", **suffix)) == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert sum("rewards/digits_reward/mean" in row for row in history) == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_data_that_needs_a_format_says_so(tmp_path, model_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "1+1", "answer": "#### 2"}) + "\n")
    flags = _train_flags(tmp_path, model_path, data)
    position = flags.index("--dataset_format")
    assert main(flags[:position] + flags[position + 2 :]) == 2
    assert "looks like 'gsm8k'" in capsys.readouterr().err
    flags[position + 1] = "eurus2_sft(conversations='question')"
    assert main(flags) == 2
    assert "prompt" in capsys.readouterr().err
