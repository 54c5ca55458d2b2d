"""Pushing to the Hub and loading from it, over HTTP against a server on this machine; see `hub_server.py`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
from conftest import build_model, same, weights
from datasets import Dataset
from helpers import lora, make_trained, train_flags
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl.trainer.utils import generate_model_card

from trl_prime import ImplicitPRM
from trl_prime.cli import main
from trl_prime.hub import PAPER, PRM_TAGS, SETTINGS, policy_section, with_section
from trl_prime.implicit_prm.files import downloaded_prm, saved_prm_card

# No blanks: of a Qwen2 model AutoTokenizer makes a Qwen2 tokenizer, which writes them otherwise than that of these tests
PROMPTS, COMPLETIONS = ["1+1=", "whatistwoandtwo", "3="], ["two", "first:second=2", ""]
DTYPE = {"dtype": torch.float32}


def rewards(prm):
    return [result.token_rewards for result in prm.score(PROMPTS, COMPLETIONS)]


def equal(first, second):
    return all(torch.equal(*pair) for pair in zip(rewards(first), rewards(second), strict=True))


def trained(trainer):
    """The trainer, its PRM and policy moved far enough from the start to tell."""
    for model in (trainer.implicit_prm.model, trainer.model):
        make_trained(model) if isinstance(model, PeftModel) else None
    with torch.no_grad():
        for parameter in trainer.implicit_prm.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.2)
    assert max(tensor.abs().max() for tensor in rewards(trainer.implicit_prm)) > 1e-3
    return trainer


def downloaded(hub, repo):
    prefix = f"/{repo}/resolve/"
    return {
        path.removeprefix(prefix).split("/", 1)[1]
        for method, path, _ in hub.requests
        if method == "GET" and path.startswith(prefix)
    }


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def texts(files):
    return {path: content.decode() for path, content in files.items() if not path.endswith((".safetensors", ".bin"))}


# --- Round trips ---


@pytest.mark.parametrize("prm_peft", [None, lora()], ids=["full prm", "lora prm"])
@pytest.mark.parametrize("policy_peft", [None, lora()], ids=["full policy", "lora policy"])
def test_what_is_pushed_loads_again(hub, train, tmp_path, policy_peft, prm_peft):
    trainer = train(
        model="me/base",
        peft_config=policy_peft,
        prm_peft_config=prm_peft,
        max_steps=1,
        push_to_hub=True,
        hub_model_id="me/run",
    )
    assert hub.messages("me/run") == ["initial commit"]  # hub_strategy is "every_save", but nothing was saved
    trained(trainer).push_to_hub(dataset_name="me/problems")

    files = hub.files("me/run")
    prm_files = {path[4:]: content for path, content in files.items() if path.startswith("prm/")}
    assert "implicit_prm.json" in prm_files and "reference/config.json" not in prm_files
    assert ("adapter/adapter_config.json" in prm_files) is (prm_peft is not None)
    settings = json.loads(prm_files["implicit_prm.json"])
    base_commit = hub.repos["me/base"]["branches"]["main"][-1]["oid"]
    assert (settings["reference"], settings["reference_revision"]) == ("me/base", base_commit)
    assert not [path for path, text in texts({**files, **prm_files}).items() if str(tmp_path) in text]

    # A repo of its own, for the PRM alone, is one line
    trainer.implicit_prm.push_to_hub("me/run-prm")
    alone = hub.files("me/run-prm")
    assert {
        path: content for path, content in alone.items() if path not in ("README.md", ".gitattributes")
    } == prm_files
    card = ModelCard(alone["README.md"].decode())
    assert card.data.base_model == "me/base" and card.data.library_name == "trl-prime"
    assert card.data.base_model_relation == ("adapter" if prm_peft else "finetune")
    assert set(PRM_TAGS) <= set(card.data.tags) and str(tmp_path) not in str(card)
    assert "log-odds" in card.text and "beta = 0.5" in card.text and PAPER["citation"] in card.text
    assert f"[me/base](https://huggingface.co/me/base) at commit `{base_commit}`" in card.text
    assert 'ImplicitPRM.from_pretrained("me/run-prm")' in card.text and "by PRIME" in card.text

    # The reference stays what it was when its repo moves on
    hub.commit("me/base", "main", "changed", {**hub.files("me/base"), "config.json": b"{}"})
    hub.clean_cache()
    for repo in ("me/run", "me/run-prm"):
        prm = ImplicitPRM.from_pretrained(repo, **DTYPE)
        assert equal(prm, trainer.implicit_prm)
        assert prm.beta == 0.5 and prm.reference_name == "me/base"
    assert not {path for path in downloaded(hub, "me/run") if not path.startswith("prm/")}

    hub.commit("me/base", "main", "changed back", hub.repos["me/base"]["branches"]["main"][1]["files"])
    hub.clean_cache()
    policy = AutoModelForCausalLM.from_pretrained("me/run", **DTYPE)
    expected = {
        name: tensor for name, tensor in weights(trainer.model).items() if policy_peft is None or "lora_" in name
    }
    loaded = {name.replace("base_model.model.", ""): tensor for name, tensor in weights(policy).items()}
    assert all(torch.equal(loaded[name.replace("base_model.model.", "")], expected[name]) for name in expected)

    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "me/base" and card.data.datasets == "me/problems"
    assert {"trl", "prime", "trl-prime", "generated_from_trainer"} <= set(card.data.tags)
    assert 'ImplicitPRM.from_pretrained("me/run")' in card.text and PAPER["citation"] in card.text
    assert "| `prm_beta` | 0.5 |" in card.text
    assert "| `prm_loss_type` | ce |" in card.text


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_every_strategy_pushes_the_prm_with_the_policy(hub, train, strategy):
    trainer = train(
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_model_id="me/run",
        hub_strategy=strategy,
        hub_always_push=True,
    )
    messages = hub.messages("me/run")
    assert [f"Training in progress, step {step}" in messages for step in (1, 2)] == [True, True]
    files = hub.files("me/run")
    assert "prm/implicit_prm.json" in files and "README.md" in files
    hub.clean_cache()
    assert equal(ImplicitPRM.from_pretrained("me/run"), trainer.implicit_prm)
    checkpoint = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-2"}.get(strategy)
    folders = {path.split("/")[0] for path in files if "checkpoint" in path}
    assert folders == ({"checkpoint-1", checkpoint} if strategy == "all_checkpoints" else {checkpoint} - {None})
    if checkpoint:
        # Whole, so that it can be resumed from
        assert {f"{checkpoint}/prm_state_0.pt", f"{checkpoint}/optimizer.pt"} <= set(files)
        hub.clean_cache()
        assert equal(ImplicitPRM.from_pretrained("me/run", subfolder=checkpoint), trainer.implicit_prm)
        assert all(path.startswith(f"{checkpoint}/prm/") for path in downloaded(hub, "me/run"))


def test_the_end_strategy_pushes_when_the_model_is_saved(hub, train):
    trainer = train(save_strategy="steps", save_steps=1, push_to_hub=True, hub_model_id="me/run", hub_strategy="end")
    assert hub.messages("me/run") == ["initial commit"]
    trainer.save_model()
    assert hub.messages("me/run") == ["initial commit", "Model save"]
    assert equal(ImplicitPRM.from_pretrained("me/run"), trainer.implicit_prm)


def test_a_busy_push_is_not_followed_by_another_unless_asked(hub, train, monkeypatch):
    monkeypatch.setattr(transformers.utils.hub.PushInProgress, "is_done", lambda self: False)
    train(save_strategy="steps", save_steps=1, push_to_hub=True, hub_model_id="me/run")
    assert hub.messages("me/run") == ["initial commit", "Training in progress, step 1"]


def test_hub_settings_are_for_policy_and_prm(hub, train, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    settings = {"hub_token": "hf_me", "hub_private_repo": True, "hub_revision": "second"}
    huggingface_hub.create_repo("me/run", token="hf_me", private=True)
    huggingface_hub.create_branch("me/run", branch="second", token="hf_me")
    trainer = train(push_to_hub=True, hub_model_id="me/run", **settings)
    trainer.push_to_hub()
    trainer.implicit_prm.push_to_hub("me/prm", private=True, token="hf_me", revision="second", commit_message="mine")
    assert all(user == "me" for _, path, user in hub.requests if "/me/" in path)
    for repo, message in (("me/run", "End of training"), ("me/prm", "mine")):
        assert hub.repos[repo]["private"]
        assert hub.messages(repo)[-1] == "initial commit" and hub.messages(repo, "second")[-1] == message
        hub.clean_cache()
        prm = ImplicitPRM.from_pretrained(repo, revision="second", token="hf_me")
        assert equal(prm, trainer.implicit_prm)
        hub.clean_cache()
        with pytest.raises((OSError, HfHubHTTPError), match=repo):
            ImplicitPRM.from_pretrained(repo, revision="second", token="hf_other")
        card = hub.files(repo, "second")["README.md"].decode()
        assert f'ImplicitPRM.from_pretrained("{repo}", revision="second")' in card


# --- The reference ---


@pytest.mark.parametrize("start", ["folder", "instance"])
@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
def test_a_reference_that_is_not_on_the_hub_goes_along(hub, train, model_path, start, peft):
    model = model_path if start == "folder" else build_model(7, scale=4.0)
    trainer = train(
        model=model, peft_config=peft, prm_peft_config=peft, max_steps=1, push_to_hub=True, hub_model_id="me/run"
    )
    trained(trainer).push_to_hub()
    files = hub.files("me/run")
    assert json.loads(files["prm/implicit_prm.json"])["reference"] == "reference"
    assert "prm/reference/model.safetensors" in files
    hub.clean_cache()
    prm = ImplicitPRM.from_pretrained("me/run", **DTYPE)
    assert equal(prm, trainer.implicit_prm)
    # Given another one, that which came along is not downloaded
    hub.clean_cache()
    ImplicitPRM.from_pretrained("me/run", reference="me/base")
    assert not [path for path in downloaded(hub, "me/run") if "reference" in path]
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model is None and "None" not in card.text
    assert ("path/to/the/base/model" in card.text) is (peft is not None)


@pytest.mark.parametrize("settings", [{}, {"prm_reference": "policy"}], ids=["frozen", "policy"])
@pytest.mark.parametrize("push_to_hub", [True, False], ids=["by the run", "by hand"])
def test_where_a_local_base_lies_stays_on_this_machine(
    hub, train, tmp_path, monkeypatch, model_path, push_to_hub, settings
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    os.symlink(model_path, "model")
    settings |= {"save_strategy": "steps", "hub_strategy": "checkpoint"}
    trainer = train(
        model="./model", peft_config=lora(), prm_peft_config=lora(), max_steps=1, push_to_hub=push_to_hub, **settings
    )
    trainer.args.hub_model_id = "me/run"
    trainer.push_to_hub()
    files = hub.files(trainer.hub_model_id)
    named = {
        json.loads(content)["base_model_name_or_path"]
        for path, content in files.items()
        if path.endswith("adapter_config.json")
    }
    assert named == {"./model"}
    assert not [path for path, content in files.items() if str(tmp_path / "here").encode() in content]


def test_without_a_reference_of_its_own_the_loader_has_to_name_one(hub, train, model_path, caplog):
    transformers.utils.logging.enable_propagation()
    trainer = train(model=model_path, prm_reference="policy", max_steps=1, push_to_hub=True, hub_model_id="me/run")
    transformers.utils.logging.disable_propagation()
    assert "has to pass `reference`" in caplog.text
    trainer.push_to_hub()
    assert json.loads(hub.files("me/run")["prm/implicit_prm.json"])["reference"] is None
    assert 'ImplicitPRM.from_pretrained("me/run", reference=' in hub.files("me/run")["README.md"].decode()
    with pytest.raises(ValueError, match="Pass `reference`"):
        ImplicitPRM.from_pretrained("me/run")
    ImplicitPRM.from_pretrained("me/run", reference="me/base")


# --- The PRM by itself ---


@pytest.mark.parametrize("subfolder", [None, "prm"])
@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
def test_a_prm_pushes_itself(hub, tokenizer, model_path, subfolder, peft):
    start = AutoModelForCausalLM.from_pretrained(model_path)
    prm = ImplicitPRM.from_model(start, tokenizer, peft_config=peft, beta=0.25, reference_name=model_path)
    make_trained(prm.model) if peft else prm.model.lm_head.weight.data.mul_(1.5)
    info = prm.push_to_hub("prm", subfolder=subfolder, private=True, commit_message="mine", revision="v1")
    assert info.oid == hub.repos["me/prm"]["branches"]["v1"][-1]["oid"] and hub.repos["me/prm"]["private"]
    assert hub.messages("me/prm", "v1")[-1] == "mine" and prm.reference_name == model_path
    hub.clean_cache()
    loaded = ImplicitPRM.from_pretrained("me/prm", revision="v1")
    assert equal(loaded, prm) and loaded.beta == 0.25
    card = hub.files("me/prm", "v1").get("README.md", b"").decode()
    assert bool(card) is (subfolder is None)
    if card:
        assert "in the folder `reference/` of this repo" in card and ModelCard(card).data.base_model is None
        assert ("an adapter of its reference" in card) is (peft is not None)
    # Nothing has changed: no commit
    prm.push_to_hub("me/prm", subfolder=subfolder, revision="v1")
    assert hub.messages("me/prm", "v1")[-1] == "mine"


def test_a_downloaded_prm_works_offline(hub, train, monkeypatch):
    trainer = train(max_steps=1)
    trainer.implicit_prm.push_to_hub("me/prm")
    huggingface_hub.create_repo("me/run")
    ImplicitPRM.from_pretrained("me/prm")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert equal(ImplicitPRM.from_pretrained("me/prm"), trainer.implicit_prm)
    with pytest.raises(OSError, match="cached snapshot"):
        ImplicitPRM.from_pretrained("me/run")


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
def test_a_pushed_prm_is_trained_on_with_its_own_reference(hub, train, tokenizer, peft):
    prm = ImplicitPRM.from_model(build_model(3), tokenizer, peft_config=peft)
    make_trained(prm.model) if peft else prm.model.lm_head.weight.data.mul_(1.5)
    prm.push_to_hub("me/prm")
    trainer = train(prm_model="me/prm", max_steps=1, prm_learning_rate=0.0)
    assert same(weights(trainer.implicit_prm.reference), weights(prm.reference))
    assert downloaded_prm("me/base") is None


def test_a_model_of_the_hub_that_is_no_saved_prm(hub):
    with pytest.raises(ValueError, match=r"'me/base' does not name its reference model"):
        ImplicitPRM.from_pretrained("me/base")
    assert ImplicitPRM.from_pretrained("me/base", reference="me/base").beta == 0.05
    with pytest.raises(OSError, match="me/nothing"):
        ImplicitPRM.from_pretrained("me/nothing")
    with pytest.raises(OSError, match="no/such/folder"):
        ImplicitPRM.from_pretrained("no/such/folder")


# --- Cards ---


def test_the_section_is_written_once_and_its_settings_are_the_configs(make_config):
    args = make_config(prm_beta=0.125, advantage_estimator="grpo")
    card = generate_model_card("me/base", "run", "me/run", None, ["prime"], None, None, "PRIME", PAPER["citation"])
    section = policy_section(args, "me/run")
    once = with_section(str(card), section)
    assert with_section(once, section) == once
    other = with_section(once, policy_section(args, "me/run", revision="v1"))
    assert other.count("## PRIME\n") == 1 and 'ImplicitPRM.from_pretrained("me/run", revision="v1")' in other
    assert other.index("## PRIME\n") < other.index("## Citations") and other.index("## Quick start") < other.index(
        "## PRIME"
    )
    assert ModelCard(other).data.to_dict() == card.data.to_dict()
    for name in SETTINGS:
        value = getattr(args, name)
        assert (f"| `{name}` |" in once) == (value is not None)
        assert value is None or f"| `{name}` | {value} |" in once
    assert with_section("# Mine\n", section).startswith("# Mine\n\n<!-- trl-prime -->")


def test_a_card_keeps_its_data_set_and_leaves_a_local_one_out(hub, train, tmp_path):
    trainer = train(max_steps=1, push_to_hub=True, hub_model_id="me/run")
    trainer.push_to_hub(dataset_name="me/problems", tags="mine")
    trainer.push_to_hub(dataset_name=str(tmp_path))
    card = ModelCard(hub.files("me/run")["README.md"].decode())
    assert card.data.datasets == "me/problems" and str(tmp_path) not in str(card)
    assert str(card).count("## PRIME\n") == 1


# --- What goes wrong ---


def test_no_right_to_the_repo_is_known_before_training(hub, make_trainer):
    with pytest.raises(HfHubHTTPError, match="403"):
        make_trainer(push_to_hub=True, hub_model_id="other/run")


@pytest.mark.parametrize("status", [500, 403])
def test_a_failing_push_leaves_all_on_disk_and_can_be_repeated(hub, train, tmp_path, caplog, status):
    trainer = train(max_steps=1, push_to_hub=True, hub_model_id="me/run")
    hub.faults.append(("POST", "/api/models/me/run/commit/", status))
    transformers.utils.logging.enable_propagation()
    with pytest.raises(HfHubHTTPError, match=str(status)):
        trainer.push_to_hub()
    transformers.utils.logging.disable_propagation()
    assert f"policy and PRM are saved in output_dir='{tmp_path / 'run'}'" in caplog.text
    assert equal(ImplicitPRM.from_pretrained(tmp_path / "run"), trainer.implicit_prm)
    assert same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run")), weights(trainer.model))
    hub.faults.clear()
    trainer.push_to_hub()
    assert equal(ImplicitPRM.from_pretrained("me/run"), trainer.implicit_prm)


def test_a_failing_push_of_a_checkpoint_does_not_end_training(hub, train, tmp_path, caplog):
    hub.faults.append(("POST", "/api/models/me/run/commit/", 500))
    transformers.utils.logging.enable_propagation()
    trainer = train(
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_model_id="me/run",
        hub_strategy="checkpoint",
        hub_always_push=True,
    )
    transformers.utils.logging.disable_propagation()
    assert trainer.state.global_step == 2
    assert caplog.text.count("A push to the Hub failed") == 4  # models and checkpoint, twice
    for step in (1, 2):
        ImplicitPRM.from_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    hub.faults.clear()
    trainer.push_to_hub()
    assert equal(ImplicitPRM.from_pretrained("me/run"), trainer.implicit_prm)


def test_only_the_main_process_talks_to_the_hub(hub, train, monkeypatch):
    trainer = train(max_steps=1, save_strategy="no", push_to_hub=True, hub_model_id="me/run")
    hub.requests.clear()
    monkeypatch.setattr(type(trainer), "is_world_process_zero", lambda self: False)
    trainer.push_to_hub()
    trainer._push_from_checkpoint("no-such-folder")
    assert not hub.requests


# --- The command line, and the cards' code as a reader runs it ---


def test_a_recipe_pushes_and_the_code_of_both_cards_runs_elsewhere(hub, tmp_path):
    rows = [{"question": f"{i} plus 1", "answer": f"it is {i + 1}\n#### {i + 1}"} for i in range(16)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "push_to_hub": "true",
        "hub_model_id": "me/run",
        "use_peft": "true",
        "prm_use_peft": "true",
        "lora_target_modules": "all-linear",
        "system_prompt": "count",  # as the reward function wants it
        "prompt_suffix": "give the number",
        "max_steps": 1,
    }
    assert main(train_flags(tmp_path, "me/base", data, **settings)) == 0
    ImplicitPRM.from_pretrained(tmp_path / "run").push_to_hub("me/prm")
    cards = {repo: hub.files(repo)["README.md"].decode() for repo in ("me/run", "me/prm")}
    assert ModelCard(cards["me/run"]).data.datasets is None and hub.messages("me/run")[-1] == "End of training"

    code = [snippet for card in cards.values() for snippet in snippets(card)]
    assert len(code) == 4  # TRL's quick start, the policy, and the PRM on both cards
    # The quick start of TRL 1.9 asks for a GPU
    (tmp_path / "reader.py").write_text("\n\n".join(code).replace('device="cuda"', 'device="cpu"'))
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "elsewhere"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    environment.pop("HF_TOKEN")
    result = subprocess.run(
        [sys.executable, "reader.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("chance of a right outcome: ") == 2


@pytest.mark.parametrize("is_chat", [True, False], ids=["chat", "text"])
def test_cards_give_a_prm_prompts_of_the_form_it_was_trained_on(train, tmp_path, is_chat):
    prompts = [[{"role": "user", "content": f"{i}+1="}] if is_chat else f"{i}+1=" for i in range(8)]
    trainer = train(train_dataset=Dataset.from_dict({"prompt": prompts}), max_steps=1)
    trainer.create_model_card("run")
    trainer.save_model(tmp_path / "saved")
    cards = [
        Path(trainer.args.output_dir, "README.md").read_text(),
        saved_prm_card(tmp_path / "saved/prm", "me/prm").text,
    ]
    asked = '[[{"role": "user", "content": "What is 7 * 8?"}]]' if is_chat else '["What is 7 * 8?"]'
    assert all(card.count("prm.score(") == card.count(f"prm.score({asked}, ") == 1 for card in cards)


def test_the_command_line_says_what_the_hub_refused(hub, tmp_path, model_path, capsys):
    (tmp_path / "data.jsonl").write_text((json.dumps({"question": "1 plus 1", "answer": "#### 2"}) + "\n") * 2)
    flags = train_flags(tmp_path, model_path, tmp_path / "data.jsonl", push_to_hub="true", hub_model_id="other/run")
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert "trl-prime: the Hub refused: " in error and "403" in error
