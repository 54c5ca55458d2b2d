"""Every recipe is parsed, validated and trained for two steps, with a tiny model and tiny data in the place of its own."""

import json
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from conftest import build_model, build_tokenizer
from datasets import Dataset
from trl import ModelConfig, ScriptArguments, SFTConfig
from trl.chat_template_utils import qwen2_5_chat_template
from trl.scripts import sft

from trl_prime import ImplicitPRM, OfflinePRMConfig, PRIMEConfig
from trl_prime.cli import main
from trl_prime.commands import arguments, launching
from trl_prime.commands.arguments import recipe_path
from trl_prime.commands.prm import OfflinePRMScriptArguments
from trl_prime.commands.train import PRIMEScriptArguments
from trl_prime.tasks.task import Task

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
# A stand-in may change these fields of a recipe; the others are trained with as they are written
REPLACED = {
    "prm_lora_layers": 1,  # of the two that the tiny model has
    "lora_target_modules": "all-linear",  # or those of certain layers
    "output_dir": None,
    "model_name_or_path": None,
    "dataset_name": None,
    "dataset_config": None,
    "task": f"{__name__}.tiny_task",
    "task_kwargs": "{}",
    "load_in_4bit": "false",
    "dtype": "float32",
    "bf16": "false",
    "use_cpu": "true",
    "use_vllm": "false",
    "max_steps": "2",
    "num_train_epochs": "1",
    "per_device_train_batch_size": None,
    "gradient_accumulation_steps": "1",
    "steps_per_generation": "2",
    "max_completion_length": "8",
    "max_length": "256",
    "report_to": "none",
    "save_strategy": "no",
    "save_steps": "100",
    "logging_steps": "1",
    "gradient_checkpointing": "false",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model that speaks in characters and has the chat template of most recipes' models."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = qwen2_5_chat_template
    build_model(7, scale=4.0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny_vision(tmp_path_factory):
    """The same of one that sees images, and problems with images."""
    pytest.importorskip("transformers", "5.13", reason="tiny processors cannot be built with older ones")
    from vision import build_vision_model, picture

    folder, data = tmp_path_factory.mktemp("tiny_vision"), tmp_path_factory.mktemp("problems")
    model, processor = build_vision_model("idefics3")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    problems = [{"images": [picture(i)], "problem": f"<image>{i} plus 1", "answer": str(i + 1)} for i in range(16)]
    Dataset.from_list(problems).save_to_disk(data)
    return str(folder), data


def rows(dataset_format):
    """Rows as the data set of the recipe has them."""
    if dataset_format == "gsm8k":
        return [{"question": f"{i} plus 1", "answer": f"so\n#### {i + 1}"} for i in range(16)]
    if dataset_format == "eurus2_sft":
        turns = [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]
        return [{"conversations": turns, "system": "count", "id": str(i)} for i in range(16)]
    if dataset_format == "gsm8k_solutions":
        solved = {f"model{i}": {"solution": f"so {i}", "is_correct": bool(i)} for i in range(2)}
        return [{"question": f"{i} plus 1", **solved} for i in range(16)]
    tests = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
    return [
        {
            "prompt": [{"role": "system", "content": "count"}, {"role": "user", "content": f"{i} plus 1"}],
            "reward_model": {"ground_truth": tests if i % 2 else str(i + 1), "style": "rule"},
            "ability": "code" if i % 2 else "math",
            "data_source": "taco" if i % 2 else "numina_olympiads",
            "extra_info": {"index": i, "split": "train"},
        }
        for i in range(16)
    ]


def tiny_task(output_dir, seed, model):
    data = Dataset.from_list([{"prompt": f"{i}+{i}=", "solution": str(2 * i % 10)} for i in range(8)])
    return Task("tiny", model, data, data, [reward_digit])


def reward_digit(completions, solution, **kwargs):
    return [float(answer in completion) for completion, answer in zip(completions, solution, strict=True)]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: "-".join(path.relative_to(FOLDER).with_suffix("").parts))
def test_recipe_trains_for_two_steps(recipe, tiny, request, tmp_path, monkeypatch):
    monkeypatch.setenv(launching._LAUNCHED, "1")  # its processes are not started
    given = yaml.safe_load(recipe.read_text())
    command = recipe.parent.name if recipe.parent.name in ("sft", "prm") else "train"
    flags = {name: value for name, value in REPLACED.items() if name in given}
    flags |= {name: REPLACED[name] for name in ("use_cpu", "bf16", "report_to", "max_steps", "gradient_checkpointing")}
    flags |= {"output_dir": tmp_path / "run", "disable_tqdm": "true", "logging_steps": "1", "save_strategy": "no"}
    if command == "sft":
        flags["save_strategy"] = "epoch"
    flags["per_device_train_batch_size"] = given.get("num_generations", 4)
    if given.get("dataset_name") == "hiyouga/geometry3k":
        model_and_data = request.getfixturevalue("tiny_vision")
        flags |= dict(zip(("model_name_or_path", "dataset_name"), model_and_data, strict=True))
    elif "task" in given:
        flags["task_kwargs"] = json.dumps({"model": tiny})
    else:
        data = tmp_path / "data.jsonl"
        dataset_format = "eurus2_sft" if command == "sft" else given["dataset_format"]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows(dataset_format)))
        if command == "sft":
            data = converted(recipe, data)
        flags |= {"model_name_or_path": tiny, "dataset_name": data}
        flags.pop("dataset_config", None)
    assert set(flags) <= {*REPLACED, "disable_tqdm"}

    settings = {}
    for name in ("train", "prm"):
        monkeypatch.setattr(f"trl_prime.commands.{name}.parse_launched_arguments", recorded(settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = [
            "--config",
            str(recipe),
            *(word for name, value in flags.items() for word in (f"--{name}", str(value))),
        ]
        if command == "sft":
            train_by_trl(words, settings)
        else:
            assert main([command, *words]) == 0

    for name, value in given.items():
        if name not in flags and name in settings:
            # TRL's ModelConfig takes the only one out of a list of names
            assert settings[name] in (value, *(value if isinstance(value, list) else ())), name
    # `trl sft` leaves the state in its checkpoints only
    folder = tmp_path / "run" / ("checkpoint-2" if command == "sft" else "")
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["step"] == 2 and sum("grad_norm" in row for row in history) == 2
    if command == "train":
        judged = [row["filter/judged"] for row in history if "filter/judged" in row]
        if given.get("reward_funcs") == ["majority"]:
            # A tiny model's completions rarely agree
            assert len(judged) == 2 and any("majority_reward/labelled" in row for row in history)
        else:
            # The reward could read every row that the format made
            assert judged == [1.0] * (1 if "steps_per_generation" in given else 2)
        assert ("tools/call_frequency" in history[0]) == ("tools" in given)
        assert isinstance(ImplicitPRM.from_pretrained(tmp_path / "run"), ImplicitPRM)


def converted(recipe, data):
    """The folder that the recipe's own `trl-prime data` command writes."""
    command = shlex.split(re.search(r"^#   trl-prime (data .*)", recipe.read_text(), re.M)[1])
    folder = data.with_name(yaml.safe_load(recipe.read_text())["dataset_name"])
    assert command[:2] == ["data", "convert"] and command[-1] == f"{folder.name}/train.jsonl"
    command[2], command[-1] = str(data), str(folder / "train.jsonl")
    assert main(command) == 0
    return folder


def train_by_trl(words, settings):
    """`trl sft` in this process."""
    *parsed, others = sft.make_parser().parse_args_and_config(words, return_remaining_strings=True)
    # They are for accelerate's launcher
    assert set(others[::2]) <= {"--accelerate_config", "--num_processes"}
    for part in parsed:
        settings.update(vars(part))
    sft.main(*parsed)


def recorded(settings):
    def parse(*arguments):
        parsed = launching.parse_launched_arguments(*arguments)
        for part in parsed:
            settings.update(vars(part))
        return parsed

    return parse


def known_fields(recipe):
    types = {"sft": [ScriptArguments, SFTConfig], "prm": [OfflinePRMScriptArguments, OfflinePRMConfig]}.get(
        recipe.parent.name, [PRIMEScriptArguments, PRIMEConfig]
    )
    launcher = {action.dest for action in launching._launcher()._actions} | {"accelerate_config"}
    return {name for cls in [*types, ModelConfig] for name in cls.__dataclass_fields__} | launcher


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_header_names_the_command_and_batches_add_up(recipe):
    text, given = recipe.read_text(), yaml.safe_load(recipe.read_text())
    assert set(given) <= known_fields(recipe)
    if recipe.parent != FOLDER:
        assert f"--config {recipe.relative_to(FOLDER.parent)}" in text
    counted = re.search(
        r"(?:(\d+) (?:prompts|problems) x (\d+) completions|^# (\d+)) = (\d+) x (\d+)(?: x (\d+) GPUs)?", text, re.M
    )
    if counted:
        prompts, completions, total, per_device, accumulation, processes = (int(n or 1) for n in counted.groups())
        assert prompts * completions * total == per_device * accumulation * processes
        assert per_device == given["per_device_train_batch_size"]
        assert accumulation == given.get("steps_per_generation", given["gradient_accumulation_steps"])
        assert processes == given.get("num_processes", 1)
        assert completions == given.get("num_generations", 1)
    else:
        assert "gradient_accumulation_steps" not in given


def test_readme_lists_every_recipe():
    listed = set(re.findall(r"^\| `([^`]+\.yaml)`", (FOLDER / "README.md").read_text(), re.M))
    assert listed == {str(path.relative_to(FOLDER)) for path in RECIPES}


# --- By name ---


def test_a_recipe_is_found_by_its_name_and_a_file_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.yaml", "recipes/quickstart.yaml"):
        assert recipe_path(name) == FOLDER / "quickstart.yaml"
    names = [path.relative_to(FOLDER).with_suffix("").as_posix() for path in RECIPES]
    assert [recipe_path(name) for name in names] == RECIPES
    Path("quickstart").mkdir()  # the folder of a run, say
    assert recipe_path("quickstart") == FOLDER / "quickstart.yaml"
    for name in ("quickstart.yaml", "recipes/quickstart.yaml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("seed: 1\n")
        assert recipe_path(name) == Path(name)
    with pytest.raises(ValueError, match=r"qwen2.5/prime/full of --config cannot .* mean 'qwen2.5-1.5b/prime/full'\?"):
        recipe_path("qwen2.5/prime/full")
    with pytest.raises(ValueError, match="no recipe has this name.$"):
        recipe_path("my-run.yaml")


def test_commands_take_the_name_of_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "quickstart", "--prm_beta", "0"]) == 2
    assert "prm_beta is 0.0" in capsys.readouterr().err
    assert main(["prm", "--config=gsm8k/prm/offline-ce", "--beta", "0", "--use_cpu", "true", "--bf16", "false"]) == 2
    assert "beta is 0.0" in capsys.readouterr().err
    assert main(["train", "--config", "quikstart"]) == 2
    assert "Did you mean 'quickstart'?" in capsys.readouterr().err


def test_the_wheel_brings_the_recipes(tmp_path, monkeypatch):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=FOLDER.parent, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    packed = tmp_path / "site" / "trl_prime" / "recipes"
    assert {path.relative_to(packed) for path in packed.rglob("*.yaml")} == {p.relative_to(FOLDER) for p in RECIPES}
    # As the installed package would find it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arguments, "__file__", str(tmp_path / "site" / "trl_prime" / "commands" / "arguments.py"))
    assert recipe_path("quickstart") == packed / "quickstart.yaml"
