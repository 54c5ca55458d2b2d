"""Text as the token ids of training: chat templates with arguments, ends of turns, truncation, and text of tokens in context."""

import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from trl_prime import ImplicitPRM
from trl_prime.implicit_prm.files import saved_text_format
from trl_prime.texts import TextFormat, encode_prompt, token_texts, tokenize

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<t>' }}{% endif %}{% endif %}"
)
CHAT = [[{"role": "user", "content": text}] for text in ("1+1=", "23+4=")]
EOS, END, THINK = 1, 44, 45


def chat_tokenizer():
    """Characters; a turn ends by `<end>`, which is not the end-of-sequence token."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>", "<t>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def sentencepiece_tokenizer():
    """A tokenizer as of Llama 2, whose decoder takes the space off the beginning of a text."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁The", "▁sum", "▁is", "▁4", ".", "▁Then", "▁add", "▁3", "▁It", "<0x0A>"]
    pieces += [*"Thenabcdfgijklmopqrstuvwxyz0123456789+=:"]
    scores = [(piece, len(piece) * 2 - 10.0 if piece != "<0x0A>" else -5.0) for piece in dict.fromkeys(pieces)]
    backend = Tokenizer(models.Unigram(scores, unk_id=2, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("end", [EOS, END], ids=["eos", "other_end"])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}], ids=["bare", "kwargs"])
@pytest.mark.parametrize("prompts", [CHAT, ["1+1=", "23+4="]], ids=["chat", "text"])
def test_a_saved_prm_reads_text_as_the_ids_of_training(make_trainer, tmp_path, prompts, kwargs, end):
    tokenizer = chat_tokenizer()
    model = build_model(3, vocab_size=len(tokenizer), scale=4.0)
    model.generation_config.eos_token_id = [EOS, END] if end == END else EOS
    is_chat = prompts is CHAT
    # TRL before 1.16 ends completions by the tokenizer's end token alone
    other = END if end == EOS else EOS
    texts, asked = [], []

    def reward(prompts, completions, **_):
        asked.extend(prompts)
        texts.extend(completions)
        return [float(i % 2) for i in range(len(completions))]

    trainer = make_trainer(
        model=model,
        train_dataset=Dataset.from_dict({"prompt": prompts * 8}),
        processing_class=tokenizer,
        reward_funcs=reward,
        chat_template_kwargs=kwargs,
        max_completion_length=12,
        max_steps=2,
        # The tokenizer drops white space, which therefore does not come back
        generation_kwargs={"suppress_tokens": [0, 2, THINK, other, *tokenizer.convert_tokens_to_ids(["\n", " "])]},
    )
    if end == END and not hasattr(trainer, "eos_token_ids"):
        pytest.skip("this TRL does not end completions there")
    trainer.train()
    trainer.save_model(tmp_path / "run")
    prm = ImplicitPRM.from_pretrained(tmp_path / "run")

    assert prm.text_format.messages == is_chat and prm.text_format.turn_end_id == (END if end == END else None)
    rows = [
        [out[f"{part}_ids"][i][out[f"{part}_mask"][i].bool()].tolist() for part in ("prompt", "completion")]
        for out in trainer.outputs
        for i in range(len(out["prompt_ids"]))
    ]
    assert len(rows) == len(texts) == 16
    truncated = [ids[-1] not in (EOS, END) for _, ids in rows]
    assert 0 < sum(truncated) < 16
    checked = 0
    for row, prompt, text, cut in zip(rows, asked, texts, truncated, strict=True):
        if is_chat or end == EOS or cut:  # after plain text the end-of-sequence token is what ends a completion
            assert tokenize(prm.tokenizer, prompt, text, prm.text_format, cut) == tuple(row)
            checked += 1
    assert checked
    # Scored by themselves, the same log-probabilities as of the ids
    prompt_ids, completion_ids = rows[0]
    (scored,) = prm.score([asked[0]], [texts[0]], [truncated[0]])
    ids = torch.tensor([prompt_ids + completion_ids])
    logps = prm.reference(ids).logits[0].log_softmax(-1)[len(prompt_ids) - 1 : -1]
    if is_chat or end == EOS or truncated[0]:
        expected = logps.gather(1, torch.tensor(completion_ids)[:, None])[:, 0]
        assert torch.allclose(scored.ref_logps, expected, atol=1e-5)
    if is_chat:
        form = saved_text_format(str(tmp_path / "run"))
        assert encode_prompt(tokenizer, asked[0], form) == prompt_ids


def test_template_arguments_that_cannot_be_saved_are_refused():
    with pytest.raises(ValueError, match="chat_template_kwargs"):
        TextFormat(chat_template_kwargs={"now": object()})


def test_steps_where_the_decoder_takes_off_the_leading_space():
    tokenizer = sentencepiece_tokenizer()
    text = "The sum is 4. Then add 3. It is 4"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode([ids[4], ids[5]]) == ". Then" and tokenizer.decode([ids[5]]) == "Then"

    assert "".join(token_texts(tokenizer, ids)) == " " + text
    model = build_model(1, vocab_size=len(tokenizer), scale=4.0)
    prm = ImplicitPRM(model, build_model(2, vocab_size=len(tokenizer)), tokenizer, step_delimiter=". ")
    (scored,) = prm.score(["The sum is"], [text])

    assert "".join(scored.steps) == f" {text}</s>" and len(scored.steps) == 3
    steps = prm.step_ids(torch.tensor([ids]))
    assert steps.max() == 2
