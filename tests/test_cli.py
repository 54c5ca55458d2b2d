"""The command line: recipes, flags that override them, and errors that help."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import train_flags
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3MoeConfig

import trl_prime
from trl_prime import ImplicitPRM, PRIMEConfig, prime_config
from trl_prime.cli import main
from trl_prime.commands.dataset_arguments import DatasetArguments, load_split
from trl_prime.commands.launching import parse_launched_arguments
from trl_prime.commands.train import PRIMEScriptArguments, _prepare_alone, _types, check_policy_is_whole
from trl_prime.evaluation.held_out import generate
from trl_prime.evaluation.sampling import TransformersSampler
from trl_prime.offline_prm import offline_prm_config
from trl_prime.reports.run_files import save_settings

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"


def test_flags_win_over_the_recipe():
    flags = ["--config", str(QUICKSTART), "--prm_beta", "0.125"]
    _, args, _ = parse_launched_arguments(_types(), flags, "trl-prime train")
    assert args.prm_beta == 0.125
    assert args.prm_replay_batches == 4


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


def hub_error():
    return HfHubHTTPError("403 Forbidden", response=SimpleNamespace(headers={}, request=None, status_code=403))


@pytest.mark.parametrize(
    "error, before, on_the_way",
    [
        (lambda: ValueError("prm_beta is 0"), 2, None),
        (lambda: NotImplementedError("not with ZeRO-3"), 2, None),
        (lambda: ImportError("Judging answers needs Math-Verify"), 2, None),
        (lambda: ModuleNotFoundError("No module named 'x'", name="x"), None, None),
        (lambda: RuntimeError("a bug"), None, None),
        (lambda: OSError(28, "No space left on device"), 1, 1),
        (lambda: FloatingPointError("The policy's loss is not finite"), 1, 1),
        (lambda: torch.OutOfMemoryError("Tried to allocate 2 GiB"), 1, 1),
        (hub_error, 1, 1),
        (KeyboardInterrupt, 130, 130),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_exit_codes(error, before, on_the_way, monkeypatch, capsys):
    """None stands for an error that nobody foresaw: it keeps its traceback, and Python ends with 1."""

    def fail(argv):
        raise error()

    def fail_while_working(argv):
        return lambda: fail(argv)

    for prepare, expected in ((fail, before), (fail_while_working, on_the_way)):
        monkeypatch.setattr("trl_prime.commands.env.prepare", prepare)
        if expected is None:
            with pytest.raises(type(error())):
                main(["env"])
        else:
            assert main(["env"]) == expected
            said = capsys.readouterr().err
            assert said.startswith("trl-prime: ") and "Traceback" not in said
            assert str(error()).split("]")[-1].strip() in said


def breaks_later(completions, log=[], **kwargs):  # noqa: B006
    log.append(1)
    if len(log) > 1:
        raise ValueError("not this time")
    return [float(i % 2) for i in range(len(completions))]


def test_a_value_error_in_the_middle_of_training_is_not_blamed_on_the_recipe(tmp_path, model_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i}+1", "answer": f"#### {i}"}) + "\n" for i in range(8)))
    with pytest.raises(ValueError, match="not this time"):
        main(train_flags(tmp_path, model_path, data, reward_funcs=f"{__name__}.breaks_later"))


@pytest.mark.parametrize("wanted, said", [("true", "no whole checkpoint"), ("runs/nowhere", "it is no checkpoint")])
def test_nothing_to_resume_from_is_told_before_a_model_is_loaded(tmp_path, capsys, wanted, said):
    flags = train_flags(tmp_path, "no/model", "no/data", resume_from_checkpoint=wanted)
    assert main(flags) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", ["model_name_or_path", "prm_model_name_or_path"])
def test_a_folder_that_is_not_there_is_told_before_anything_is_loaded(tmp_path, capsys, model_path, option):
    assert main(train_flags(tmp_path, model_path, "no/data", **{option: "./nowhere"})) == 2
    assert f"{option} is './nowhere', but there is no such folder" in capsys.readouterr().err


def test_resuming_from_the_command_line(tmp_path, model_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i}+1", "answer": f"#### {i}"}) + "\n" for i in range(8)))
    reward = {"reward_funcs": f"{__name__}.length_reward"}
    saving = {"save_strategy": "steps", "save_steps": 1, **reward}
    assert main(train_flags(tmp_path, model_path, data, max_steps=1, **saving)) == 0
    assert main(train_flags(tmp_path, model_path, data, resume_from_checkpoint="true", **reward)) == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "grad_norm" in row] == [1, 2]


def length_reward(completions, **kwargs):
    return [float(len(completion[0]["content"]) % 2) for completion in completions]


def test_rows_of_an_ability_with_short_prompts(tmp_path, model_path):
    arguments = DatasetArguments(dataset_name=str(tmp_path / "data.jsonl"), dataset_ability="math")
    kept = [{"role": "user", "content": "1"}]
    # Versions of transformers read the saved tokenizer as different classes, one of which knows no white space here
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    length = len(tokenizer(tokenizer.apply_chat_template(kept, add_generation_prompt=True, tokenize=False)).input_ids)
    rows = [
        {"prompt": kept, "ability": "math"},
        {"prompt": kept, "ability": "code"},
        {"prompt": [{"role": "user", "content": "12"}], "ability": "math"},
    ]
    Path(arguments.dataset_name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments.max_prompt_length = length
    assert list(load_split(arguments, "train", model_path)) == rows[:1]
    arguments.max_prompt_length = length - 1
    with pytest.raises(ValueError, match=f"max_prompt_length is {length - 1}"):
        load_split(arguments, "train", model_path)


def note_group(output_dir, seed, name):
    (output_dir / name).write_text(
        " ".join(sorted({"RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP", "HOME"} & {*os.environ}))
    )


def test_a_task_of_several_processes_is_made_outside_of_their_group(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP", "HOME"):
        monkeypatch.setenv(name, "2")
    _prepare_alone(f"{__name__}.note_group", str(tmp_path), 0, {"name": "group"})
    assert (tmp_path / "group").read_text() == "HOME"


def test_an_unknown_task_names_the_nearest(tmp_path, capsys):
    flags = ["--task", "running_sum", "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    assert main(["train", *flags]) == 2
    assert "running_sums" in capsys.readouterr().err


def test_arguments_that_a_task_does_not_take(tmp_path, capsys):
    flags = ["--task", "running_sums", "--task_kwargs", '{"digits": 3}', "--output_dir", str(tmp_path)]
    assert main(["train", *flags, "--use_cpu", "true", "--bf16", "false"]) == 2
    assert "task is 'running_sums', which does not take task_kwargs {'digits': 3}" in capsys.readouterr().err


def test_a_run_needs_a_model_and_data(tmp_path, capsys):
    assert main(["train", "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]) == 2
    assert "dataset_name" in capsys.readouterr().err


def test_quickstart_end_to_end_in_small(tmp_path, capsys):
    small = {"num_digits": 3, "num_train": 64, "num_test": 8, "warm_up_steps": 3}
    flags = ["--output_dir", str(tmp_path), "--max_steps", "2", "--per_device_train_batch_size", "16"]
    assert main(["train", "--config", str(QUICKSTART), "--task_kwargs", json.dumps(small), *flags]) == 0
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
    settings = json.loads((tmp_path / "prime_config.json").read_text())
    assert (settings["prm_beta"], settings["max_steps"], settings["task"]) == (0.5, 2, "running_sums")


def test_saved_settings_hold_no_secret(tmp_path):
    args = PRIMEConfig(str(tmp_path), use_cpu=True, bf16=False, hub_token="hf_1", model_init_kwargs={"token": "hf_2"})
    script_args = PRIMEScriptArguments(task_kwargs={"inner": {"api_key": "hf_3", "digits": 4}})
    save_settings(tmp_path, script_args, args)
    text = (tmp_path / "prime_config.json").read_text()
    assert "hf_" not in text
    settings = json.loads(text)
    assert settings["task_kwargs"] == {"inner": {"api_key": "<API_KEY>", "digits": 4}}
    assert settings["prm_beta"] == args.prm_beta


def test_trains_on_a_local_file_in_gsm8k_form(tmp_path, model_path, capsys):
    rows = [{"question": f"{i} plus 1", "answer": f"it is {i + 1}\n#### {i + 1}"} for i in range(16)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "no answer", "answer": "none"}]))
    suffix = {"system_prompt": "count", "prompt_suffix": "give the number"}
    assert main(train_flags(tmp_path, model_path, data, **suffix)) == 2
    assert "Row 16 is no 'gsm8k' row" in capsys.readouterr().err
    assert main(train_flags(tmp_path, model_path, data, on_malformed_row="skip", **suffix)) == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert sum("rewards/digits_reward/mean" in row for row in history) == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


LAST_LAYER = {"prm_use_peft": "true", "prm_lora_layers": 1, "max_steps": 1}


def last_layer_flags(tmp_path, model_path, **settings):
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{i} plus 1", "answer": f"it is {i + 1}\n#### {i + 1}"} for i in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suffix = {"system_prompt": "count", "prompt_suffix": "give the number"}
    return train_flags(tmp_path, model_path, data, **suffix, **{**LAST_LAYER, **settings})


def test_the_prm_may_be_an_adapter_of_the_last_layers(tmp_path, model_path):
    flags = last_layer_flags(tmp_path, model_path)
    assert main(flags) == 0
    saved = load_file(tmp_path / "run" / "prm" / "adapter" / "adapter_model.safetensors")
    layers = {name.split("layers.")[1][0] for name in saved}
    assert layers == {"1"} and len(saved) == 2 * 7  # two factors of each matrix


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prm_lora_layers": 2}, "prm_lora_layers is 2, but must be from 1 to 1: the model has 2 layers."),
        ({"prm_lora_layers": 0}, "prm_lora_layers is 0"),
        ({"prm_lora_layers": 1, "prm_use_peft": "false"}, "Set prm_use_peft: true"),
    ],
)
def test_layers_that_the_prm_cannot_be_an_adapter_of(tmp_path, model_path, capsys, monkeypatch, settings, said):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("loads a model"))
    assert main(last_layer_flags(tmp_path, model_path, **settings)) == 2
    assert said in capsys.readouterr().err


def test_all_linear_of_the_last_layers_is_refused_in_a_mixture_of_experts(tmp_path, tokenizer, capsys):
    """PEFT takes the experts of all layers, whatever it is told to exclude."""
    shape = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = Qwen3MoeConfig(
        **shape, vocab_size=44, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "experts")
    tokenizer.save_pretrained(tmp_path / "experts")
    assert main(last_layer_flags(tmp_path, tmp_path / "experts")) == 2
    assert "Name modules, such as prm_lora_target_modules" in capsys.readouterr().err


def test_data_that_needs_a_format_says_so(tmp_path, model_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "1+1", "answer": "#### 2"}) + "\n")
    flags = train_flags(tmp_path, model_path, data)
    position = flags.index("--dataset_format")
    assert main(flags[:position] + flags[position + 2 :]) == 2
    assert "looks like 'gsm8k'" in capsys.readouterr().err
    flags[position + 1] = "eurus2_sft(conversations='question')"
    assert main(flags) == 2
    assert "prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, config, option, value, extra",
    [
        ("train", prime_config, "deepspeed", "stage2.json", "deepspeed"),
        ("train", prime_config, "use_vllm", "true", "vllm"),
        ("prm", offline_prm_config, "deepspeed", "stage2.json", "deepspeed"),
    ],
)
def test_an_option_whose_package_is_missing_is_told_before_anything_is_made(
    tmp_path, capsys, monkeypatch, command, config, option, value, extra
):
    monkeypatch.setattr(config, f"is_{extra}_available", lambda: False)
    flags = ["--task", "running_sums"] if command == "train" else []
    assert main([command, *flags, "--output_dir", str(tmp_path / "run"), f"--{option}", value]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"trl-prime: {option} is ") and f"`pip install trl-prime[{extra}]`" in said
    assert not (tmp_path / "run").exists()


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trl-prime {trl_prime.__version__}\n"


# --- A held-out part of one file ---

SEEN = []


def noting_reward(prompts, completions, solution, **kwargs):
    """A stand-in that notes what it is asked about."""
    SEEN.append([prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts])
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [float(sum(map(ord, text)) % 2) for text in texts]


@pytest.fixture
def held_out_run(tmp_path, model_path):
    """`trl-prime train` on a file with twelve problems, half of them twice; returns the prompts of each phase."""
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{i}+1", "answer": f"#### {i + 1}"} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[::2]]))

    def run(expected=0, **settings):
        SEEN.clear()
        settings = {
            "reward_funcs": f"{__name__}.noting_reward",
            "eval_split_size": 4,
            "eval_samples": 2,
            "prompt_suffix": "give the number",
            "per_device_eval_batch_size": 8,
            **settings,
        }
        assert main(train_flags(tmp_path, model_path, data, **settings)) == expected
        # Greedy and sampled completions, before and after
        before, after = SEEN[:2], SEEN[-2:]
        return before, [prompt for prompts in SEEN[2:-2] for prompt in prompts], after

    return run


def read(tmp_path, name):
    return json.loads((tmp_path / "run" / name).read_text())


def test_a_held_out_part_is_measured_before_and_after_and_never_trained_on(held_out_run, tmp_path, capsys):
    before, trained, after = held_out_run()
    assert before == after
    greedy, sampled = before
    assert len(set(greedy)) == 4 and sampled == [prompt for prompt in greedy for _ in range(2)]
    assert all(prompt.endswith("+1\n\ngive the number") for prompt in greedy)
    assert trained and not set(trained) & set(greedy)
    results = read(tmp_path, "results.json")
    assert set(results["before"]) == set(results["after"]) == {"greedy", "sampled"}
    assert set(results["prm"]) == {"pairwise_accuracy", "accuracy"}
    printed = capsys.readouterr().out
    assert f"Held out {len(greedy)} rows, {18 - len(greedy)} are left to train on." in printed
    assert "policy accuracy, greedy" in printed and str(tmp_path / "run" / "results.json") in printed.replace("\n", "")
    # What was measured after training is the policy that was saved
    model, tokenizer = (kind.from_pretrained(tmp_path / "run") for kind in (AutoModelForCausalLM, AutoTokenizer))
    messages = [[{"role": "user", "content": prompt}] for prompt in greedy]
    scores = noting_reward(messages, generate(model, tokenizer, messages, max_new_tokens=8), None)
    assert results["after"]["greedy"] == pytest.approx(sum(scores) / len(scores))


def test_a_held_out_part_is_sampled_in_batches_and_rendered_as_in_training(held_out_run, monkeypatch):
    batches, sample = [], TransformersSampler.__call__

    def spy(self, prompts, seeds):
        batches.append((len(prompts), self.text_format.chat_template_kwargs["loud"]))
        return sample(self, prompts, seeds)

    monkeypatch.setattr(TransformersSampler, "__call__", spy)
    held_out_run(chat_template_kwargs='{"loud": true}', per_device_eval_batch_size=4, max_steps=1)
    greedy = len(SEEN[0])
    sizes = [min(4, num - start) for num in (greedy, 2 * greedy) for start in range(0, num, 4)]
    assert batches == [(size, True) for size in sizes] * 2 and max(sizes) == 4


def test_a_held_out_part_of_plain_prompts_is_evaluated_while_training(held_out_run, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "plain_prompts": "true", "eval_split_size": 0.3}
    before, seen, _ = held_out_run(**settings)
    assert len(set(before[0])) == 4, "30 % of twelve prompts, rounded up"
    assert set(before[0]) < set(seen), "evaluations during training are on the same problems"
    history = read(tmp_path, "trainer_state.json")["log_history"]
    assert [row["step"] for row in history if "eval_reward" in row] == [1, 2]


def test_a_resumed_run_keeps_its_held_out_part(held_out_run, tmp_path, capsys):
    before, *_ = held_out_run(max_steps=1, save_strategy="steps", save_steps=1)
    changes = ({"seed": 7}, {"eval_split_size": 5}, {"data_seed": 7}, {"prompt_suffix": "give a number"})
    for change in changes:
        capsys.readouterr()
        held_out_run(expected=2, resume_from_checkpoint="true", **change)
        assert "The held-out problems are not those that the run in" in capsys.readouterr().err
    assert held_out_run(resume_from_checkpoint="true")[0] == before
    assert read(tmp_path, "trainer_state.json")["global_step"] == 2


def test_a_run_that_has_trained_on_everything_gets_no_held_out_part(tmp_path, model_path, held_out_run, capsys):
    flags = train_flags(
        tmp_path, model_path, tmp_path / "data.jsonl", max_steps=1, save_strategy="steps", save_steps=1
    )
    flags[flags.index("--reward_funcs") + 1] = f"{__name__}.noting_reward"
    assert main([*flags, "--prompt_suffix", "give the number"]) == 0
    held_out_run(expected=2, resume_from_checkpoint="true")
    assert "it has trained on some of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"eval_split_size": 0}, "eval_split_size is 0. Give a whole number of prompts, 2 or more, or a share"),
        ({"eval_split_size": 1.0}, "eval_split_size is 1. Give"),
        ({"eval_split_size": 12}, "eval_split_size is 12, which holds out 12 prompts, but the data set has 12"),
        ({"dataset_streaming": "true"}, "of a data set that is streamed"),
        ({"dataset_test_split": "test"}, "dataset_test_split is 'test', but a run has one held-out part"),
        ({"tools": "python"}, "eval_split_size is 4, but a policy with tools"),
        ({"environment_factory": "builtins.object"}, "eval_split_size is 4, but a policy with tools"),
        ({"task": "running_sums"}, "the task 'running_sums' has held-out problems of its own"),
        ({"eval_samples": 0}, "eval_samples is 0"),
        ({"reward_funcs": "majority"}, "reward_funcs begins with 'majority'"),
        ({"fsdp": "full_shard"}, "FSDP shards it"),
    ],
)
def test_a_held_out_part_that_cannot_be_is_refused_before_a_model_is_loaded(
    held_out_run, monkeypatch, capsys, settings, said
):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("loads a model"))
    held_out_run(expected=2, **settings)
    assert said in capsys.readouterr().err


def test_zero3_shards_what_is_to_be_measured(monkeypatch):
    args = SimpleNamespace(fsdp=None, deepspeed_plugin=SimpleNamespace(zero_stage=2))
    check_policy_is_whole(args)
    args.deepspeed_plugin.zero_stage = 3
    with pytest.raises(ValueError, match="ZeRO-3 shards it. Use ddp or zero2"):
        check_policy_is_whole(args)
    args.deepspeed_plugin = None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP shards it"):
        check_policy_is_whole(args)
