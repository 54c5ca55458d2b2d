"""The scripts and the notebook of `examples/` run as they are, with a tiny model and tiny data in the place of their own."""

import dataclasses
import functools
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch

from trl_prime import ImplicitPRM
from trl_prime.tasks import running_sums

FOLDER = Path(__file__).parent.parent / "examples"
(NOTEBOOK,) = FOLDER.glob("*.ipynb")
SCRIPTS = {"math_lora.py": "math-lora", "code_mbpp.py": "code-mbpp", "own_hook.py": "own-hook"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_trains_and_saves_policy_and_prm(script, stand_ins, monkeypatch, capsys):
    small = functools.partial(running_sums.prepare, num_digits=3, num_train=64, num_test=8, warm_up_steps=3)
    monkeypatch.setattr(running_sums, "prepare", small)
    namespace = runpy.run_path(str(FOLDER / script), run_name="__main__")
    run = Path("runs", SCRIPTS[script])
    assert f'"{run}"' in (FOLDER / script).read_text()
    is_adapter = script == "math_lora.py"
    assert (run / "adapter_config.json").is_file() == is_adapter
    assert (run / "model.safetensors").is_file() != is_adapter
    assert isinstance(ImplicitPRM.from_pretrained(run), ImplicitPRM)
    printed = capsys.readouterr().out
    said = {
        "math_lora.py": "Held-out accuracy: ",
        "code_mbpp.py": "code_reward/no_program: ",
        "own_hook.py": "Right answers",
    }
    assert said[script] in printed and callable(namespace["main"])


def test_the_hook_blames_wrong_completions_alone_and_more_and_more(rollout_rewards):
    hook = runpy.run_path(str(FOLDER / "own_hook.py"))["blame_only"]
    outcomes_alone = rollout_rewards.combine(process_weight=0.0)
    for step, ramp in ((0, 0.0), (10, 0.5), (20, 1.0), (50, 1.0)):
        rewards = dataclasses.replace(rollout_rewards, trainer_state=SimpleNamespace(global_step=step))
        process = rollout_rewards.process_rewards * torch.tensor([[0.0], [1.0], [0.0], [0.0]])
        expected = rollout_rewards.combine(process_rewards=process, process_weight=0.3 * ramp)
        assert torch.equal(hook(rewards), expected)
        assert torch.equal(expected, outcomes_alone) == (ramp == 0)


def test_cells_of_the_notebook_run_in_order(stand_ins, capsys):
    matplotlib.use("agg")
    namespace = {"__name__": "__main__"}
    for i, cell in enumerate(json.loads(NOTEBOOK.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {i}", "exec"), namespace)
    matplotlib.pyplot.close("all")
    assert [scored.reward for scored in namespace["before"]] == [0.0, 0.0]
    assert len(namespace["samples"]) == 4 and namespace["trainer"].state.global_step == 1
    printed = capsys.readouterr().out
    assert "[0.0, 0.0]" in printed and printed.count("chance of a right outcome") == 2


def test_the_notebook_is_of_the_format_and_has_no_output():
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        of_code = {"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else {}
        rest = {"cell_type": cell["cell_type"], "id": cell["id"], "metadata": {}, "source": cell["source"]}
        assert cell == {**rest, **of_code} and all(isinstance(line, str) for line in cell["source"])


def test_the_list_names_every_example():
    listed = {line.split("`")[1] for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| `")}
    assert listed == {path.name for path in FOLDER.iterdir()} - {"README.md"} == {*SCRIPTS, NOTEBOOK.name}
