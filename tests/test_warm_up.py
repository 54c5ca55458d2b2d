"""The supervised warm-up of tasks: it learns, repeats, and merges an adapter."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_prime.tasks.running_sums import CHARACTERS, make_dataset, make_demonstrations
from trl_prime.tasks.tiny_model import build_model, build_tokenizer
from trl_prime.tasks.warm_up import warm_up

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"steps": 20, "batch_size": 16, "learning_rate": 2e-3}


def completion_loss(model, tokenizer, rows) -> float:
    """Mean loss in nats per completion token, end of sequence included."""
    prompt_length = len(tokenizer(rows[0]["prompt"])["input_ids"])
    text = [row["prompt"] + row["steps"] + tokenizer.eos_token for row in rows]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, :prompt_length] = -100
    with torch.no_grad():
        return model(input_ids=ids, labels=labels).loss.item()


def test_warm_up_lowers_the_loss_and_repeats(tmp_path):
    tokenizer = build_tokenizer(CHARACTERS)
    rows = list(make_dataset(32, num_digits=4, seed=9))
    demonstrations = make_demonstrations(320, num_digits=4)
    weights = []
    for seed in (0, 0, 1):
        model = build_model(tokenizer, hidden_size=32, num_layers=1)
        before = completion_loss(model, tokenizer, rows)
        returned = warm_up(model, tokenizer, demonstrations, tmp_path, **SETTINGS, seed=seed)
        after = completion_loss(model, tokenizer, rows)
        assert after < before - 0.5
        assert 0 < returned < before
        weights.append(model.model.embed_tokens.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_an_adapter_is_merged_into_what_is_saved(tmp_path):
    tokenizer = build_tokenizer(CHARACTERS)
    model = build_model(tokenizer, hidden_size=32, num_layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    warm_up(model, tokenizer, make_demonstrations(64, num_digits=4), tmp_path, **SETTINGS, peft_config=adapter)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert saved.keys() == before.keys()
    assert not torch.equal(saved["model.layers.0.mlp.down_proj.weight"], before["model.layers.0.mlp.down_proj.weight"])
    assert torch.equal(saved["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("setting", [{"steps": 0}, {"batch_size": 0}])
def test_bad_numbers_are_refused(tmp_path, setting):
    tokenizer = build_tokenizer(CHARACTERS)
    model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="must be at least 1"):
        warm_up(model, tokenizer, make_demonstrations(8), tmp_path, **{**SETTINGS, **setting})
