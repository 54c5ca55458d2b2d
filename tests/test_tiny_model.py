"""The tiny model and its tokenizer, saved, reloaded and seeded."""

import pytest
import torch

from trl_prime.tasks.running_sums import CHARACTERS, make_dataset
from trl_prime.tasks.tiny_model import build_model, build_tokenizer


@pytest.mark.parametrize("beside_model", [False, True])
def test_tokenizer_round_trip_and_reload(tmp_path, beside_model):
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer(CHARACTERS)
    if beside_model:
        # AutoTokenizer looks at the model's config too, and may choose another class for it.
        build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    row = make_dataset(1)[0]
    for text in [row["prompt"], row["steps"], row["prompt"] + row["steps"], "\n\n 1=", " ", ""]:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert reloaded(text)["input_ids"] == ids
        assert reloaded.decode(ids) == text
    assert reloaded.get_vocab() == tokenizer.get_vocab()
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer("1a2")["input_ids"] == tokenizer("12")["input_ids"]
    for each in (tokenizer, reloaded):
        assert each("3" + each.eos_token)["input_ids"] == [each.get_vocab()["3"], tokenizer.eos_token_id]
        assert each.decode(each("3\n8" + each.eos_token)["input_ids"], skip_special_tokens=True) == "3\n8"
        # A padded batch must be padded on the left, or generation would go on from padding.
        assert each(["1 2=", "1="], padding=True)["input_ids"][1][0] == tokenizer.pad_token_id


def test_model_size_dtype_and_ids():
    tokenizer = build_tokenizer(CHARACTERS)
    state = torch.get_rng_state()
    model = build_model(tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert 350_000 < model.num_parameters() < 500_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    same, other = build_model(tokenizer).state_dict(), build_model(tokenizer, seed=1).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.state_dict()["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    with pytest.raises(ValueError):
        build_model(tokenizer, hidden_size=20, num_heads=4)
