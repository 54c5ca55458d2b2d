"""The PRM and its reference: scores, memory, sharing, saving."""

import json

import pytest
import torch
from conftest import build_model, build_tokenizer, same, slow_log_probs, weights
from helpers import lora, make_trained, ragged_batch, storages
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trl_prime import ImplicitPRM


def train_prm(prm, lr=1.0):
    """A few strong steps on the PRM, without the trainer."""
    optimizer = torch.optim.SGD([p for p in prm.model.parameters() if p.requires_grad], lr=lr)
    prompt_ids, prompt_mask, completion_ids, completion_mask = ragged_batch()
    for _ in range(2):
        loss = prm.model(
            input_ids=torch.cat([prompt_ids, completion_ids], 1),
            attention_mask=torch.cat([prompt_mask, completion_mask], 1),
        ).logits.logsumexp(-1)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def rewards(prm, batch):
    return prm.beta * (prm.log_probs(*batch) - prm.reference_log_probs(*batch))


# --- Building: start equal to the reference, share what can be shared, never more ---


@pytest.mark.parametrize("policy_is_lora", [False, True])
@pytest.mark.parametrize("prm_is_lora", [False, True])
def test_starts_equal_to_reference_and_policy_and_learns_alone(tokenizer, policy_is_lora, prm_is_lora):
    policy = build_model(scale=4.0)
    if policy_is_lora:
        policy = get_peft_model(policy, lora())
    batch, before = ragged_batch(), weights(policy)
    with torch.no_grad():
        expected = slow_log_probs(policy, *batch)
    prm = ImplicitPRM.from_policy(policy, tokenizer, peft_config=lora() if prm_is_lora else None)
    assert not rewards(prm, batch).any()  # exactly
    torch.testing.assert_close(prm.log_probs(*batch), expected, atol=1e-5, rtol=1e-5)

    reference = weights(prm.reference)
    train_prm(prm)
    assert rewards(prm, batch).abs().max() > 1e-5
    assert same(weights(prm.reference), reference) and same(weights(policy), before)
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert not any(parameter.requires_grad for parameter in prm.reference.parameters())
    with torch.no_grad():
        assert torch.equal(slow_log_probs(policy, *batch), expected)
    if prm_is_lora:
        assert all("lora_" in name for name, p in prm.model.named_parameters() if p.requires_grad)
    assert prm.model.generation_config is not None and policy.training


def test_full_copies_share_nothing(tokenizer):
    policy = build_model()
    prm = ImplicitPRM.from_policy(policy, tokenizer)
    assert not storages(policy) & storages(prm.model)
    assert not storages(policy) & storages(prm.reference)
    assert not storages(prm.reference) & storages(prm.model)


def test_two_adapters_share_one_base(tokenizer):
    policy = get_peft_model(build_model(), lora())
    num_base = len(storages(build_model()))
    num_adapter = sum("lora_" in name for name, _ in policy.named_parameters())
    prm = ImplicitPRM.from_policy(policy, tokenizer, peft_config=lora())
    assert len(storages(policy, prm.model, prm.reference)) == num_base + 2 * num_adapter
    assert storages(prm.reference) <= storages(policy)
    adapters = [{p.data_ptr() for n, p in m.named_parameters() if "lora_" in n} for m in (policy, prm.model)]
    assert not adapters[0] & adapters[1]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize(("policy_is_lora", "prm_is_lora"), [(False, True), (True, True), (True, False)])
def test_adapters_that_train_weights_of_the_base_do_not_share_them(tokenizer, policy_is_lora, prm_is_lora, bias):
    """Refused, or trained on a copy: else the PRM would move its reference, and the policy too."""
    policy = build_model(scale=4.0)
    if policy_is_lora:
        policy = get_peft_model(policy, lora(bias=bias))
    before = weights(policy)
    try:
        prm = ImplicitPRM.from_policy(policy, tokenizer, peft_config=lora(bias=bias) if prm_is_lora else None)
    except ValueError as error:
        assert "bias" in str(error)
        return
    reference = weights(prm.reference)
    train_prm(prm)
    assert same(weights(prm.reference), reference) and same(weights(policy), before)
    trainable = {p.data_ptr() for p in policy.parameters() if p.requires_grad}
    assert not trainable & {p.data_ptr() for p in prm.reference.parameters()}


def test_reference_of_a_full_prm_is_the_base_of_a_lora_policy(tokenizer):
    policy = get_peft_model(build_model(), lora())
    prm = ImplicitPRM.from_policy(policy, tokenizer)
    assert storages(prm.reference) <= storages(policy)
    assert not storages(prm.model) & storages(policy)
    assert all(parameter.requires_grad for parameter in prm.model.parameters())


def test_lora_prm_of_a_full_policy_shares_its_base_with_the_reference(tokenizer):
    policy = build_model()
    prm = ImplicitPRM.from_policy(policy, tokenizer, peft_config=lora())
    assert storages(prm.reference) <= storages(prm.model)
    assert not storages(prm.model) & storages(policy)


@pytest.mark.parametrize("prm_is_lora", [False, True])
def test_a_trained_adapter_is_part_of_the_start(tokenizer, prm_is_lora):
    policy = make_trained(get_peft_model(build_model(scale=4.0), lora()))
    batch, before = ragged_batch(), weights(policy)
    with torch.no_grad():
        expected = slow_log_probs(policy, *batch)
    prm = ImplicitPRM.from_policy(policy, tokenizer, peft_config=lora() if prm_is_lora else None)
    torch.testing.assert_close(prm.reference_log_probs(*batch), expected, atol=1e-4, rtol=1e-4)
    assert not rewards(prm, batch).any()
    train_prm(prm)
    assert same(weights(policy), before)


def test_a_peft_model_as_prm_is_measured_against_its_base(tokenizer):
    model = make_trained(get_peft_model(build_model(scale=4.0), lora()))
    prm = ImplicitPRM.from_model(model, tokenizer)
    with torch.no_grad():
        base = slow_log_probs(build_model(scale=4.0), *ragged_batch())
    assert prm.model is model
    torch.testing.assert_close(prm.reference_log_probs(*ragged_batch()), base, atol=1e-5, rtol=1e-5)
    assert rewards(prm, ragged_batch()).abs().max() > 1e-3


def test_policy_as_reference_keeps_no_model(tokenizer):
    prm = ImplicitPRM.from_policy(build_model(), tokenizer, frozen_reference=False)
    assert prm.reference is None
    with pytest.raises(ValueError, match="no reference"):
        prm.reference_log_probs(*ragged_batch())


# --- Saving ---


@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("reference_is_named", [False, True])
@pytest.mark.parametrize("inside_a_run", [False, True])
def test_round_trip(tokenizer, tmp_path, model_path, is_lora, reference_is_named, inside_a_run):
    start = AutoModelForCausalLM.from_pretrained(model_path) if reference_is_named else build_model(7, scale=4.0)
    config = lora() if is_lora else None
    name = model_path if reference_is_named else None
    settings = {"beta": 0.3, "step_delimiter": "=", "reference_name": name}
    prm = ImplicitPRM.from_model(start, tokenizer, peft_config=config, **settings)
    train_prm(prm)
    folder = tmp_path / "run" / "prm" if inside_a_run else tmp_path / "prm"
    prm.save_pretrained(folder)
    assert (folder / "reference").is_dir() is not reference_is_named
    assert (folder / "adapter").is_dir() is is_lora and not (folder / "adapter_config.json").exists()

    loaded = ImplicitPRM.from_pretrained(tmp_path / "run" if inside_a_run else folder)
    assert torch.equal(rewards(loaded, ragged_batch()), rewards(prm, ragged_batch()))
    assert rewards(loaded, ragged_batch()).abs().max() > 1e-3
    assert (loaded.beta, loaded.step_delimiter) == (0.3, "=")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.reference.parameters())
    changed = ImplicitPRM.from_pretrained(folder, beta=2.0, step_delimiter="+", micro_batch_size=3)
    assert (changed.beta, changed.step_delimiter, changed.micro_batch_size) == (2.0, "+", 3)


@pytest.mark.parametrize("is_lora", [False, True])
def test_loaded_for_training_on(tokenizer, tmp_path, is_lora):
    prm = ImplicitPRM.from_model(build_model(), tokenizer, peft_config=lora() if is_lora else None)
    prm.save_pretrained(tmp_path)
    loaded = ImplicitPRM.from_pretrained(tmp_path, trainable=True)
    trainable = {name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in prm.model.named_parameters() if parameter.requires_grad}
    reference = weights(loaded.reference)
    train_prm(loaded)
    assert same(weights(loaded.reference), reference)


def test_round_trip_when_the_policy_has_a_trained_adapter(tokenizer, tmp_path, model_path):
    policy = make_trained(get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), lora()))
    prm = ImplicitPRM.from_policy(policy, tokenizer)
    train_prm(prm)
    prm.save_pretrained(tmp_path / "prm")
    loaded = ImplicitPRM.from_pretrained(tmp_path / "prm")
    torch.testing.assert_close(rewards(loaded, ragged_batch()), rewards(prm, ragged_batch()))


def test_round_trip_when_the_start_was_trained_in_memory(tokenizer, tmp_path, model_path):
    start = AutoModelForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        start.lm_head.weight.mul_(1.5)  # such as a warm-up before the run
    prm = ImplicitPRM.from_policy(start, tokenizer)
    train_prm(prm)
    prm.save_pretrained(tmp_path / "prm")
    loaded = ImplicitPRM.from_pretrained(tmp_path / "prm")
    torch.testing.assert_close(rewards(loaded, ragged_batch()), rewards(prm, ragged_batch()))


def test_any_causal_lm_with_a_given_reference(model_path, tmp_path, tokenizer):
    build_model(3).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for reference in (model_path, AutoModelForCausalLM.from_pretrained(model_path)):
        prm = ImplicitPRM.from_pretrained(tmp_path, reference=reference)
        with torch.no_grad():
            expected = slow_log_probs(build_model(7, scale=4.0), *ragged_batch())
        torch.testing.assert_close(prm.reference_log_probs(*ragged_batch()), expected, atol=1e-5, rtol=1e-5)
        assert prm.beta == 0.05
    with pytest.raises(ValueError, match="reference"):
        ImplicitPRM.from_pretrained(tmp_path)


def test_errors(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"vocabulary of 44 .* 50"):
        ImplicitPRM(build_model(), build_model(vocab_size=50), tokenizer)
    with pytest.raises(ValueError, match=r"beta is 0"):
        ImplicitPRM(build_model(), build_model(), tokenizer, beta=0)
    with pytest.raises(ValueError, match="PeftModel already"):
        ImplicitPRM.from_model(get_peft_model(build_model(), lora()), tokenizer, peft_config=lora())
    ImplicitPRM.from_model(build_model(), tokenizer).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "implicit_prm.json").read_text())
    settings["reference"] = "no/such-model"
    (tmp_path / "implicit_prm.json").write_text(json.dumps(settings))
    with pytest.raises(OSError, match=r"no/such-model.*Pass `reference`"):
        ImplicitPRM.from_pretrained(tmp_path)


# --- Scoring text ---

PROMPTS = ["1+1=", "what is two and two", "3="]
COMPLETIONS = ["two\nso 2", "first\n\nsecond\nthird\n", ""]


def test_score_agrees_with_token_ids_and_with_itself(random_prm, tokenizer):
    prm = random_prm(micro_batch_size=2)
    scored = prm.score(PROMPTS, COMPLETIONS)
    assert len(scored) == 3
    for prompt, completion, result in zip(PROMPTS, COMPLETIONS, scored, strict=True):
        ids = [*tokenizer(completion).input_ids, tokenizer.eos_token_id]
        batch = [torch.tensor([values]) for values in (tokenizer(prompt).input_ids, ids)]
        batch = (batch[0], torch.ones_like(batch[0]), batch[1], torch.ones_like(batch[1]))
        torch.testing.assert_close(result.token_rewards, rewards(prm, batch)[0], atol=1e-5, rtol=1e-4)
        assert len(result.tokens) == len(result.token_rewards) == len(ids)
        for logps, model in ((result.prm_logps, prm.model), (result.ref_logps, prm.reference)):
            with torch.no_grad():
                torch.testing.assert_close(logps, slow_log_probs(model, *batch)[0], atol=1e-5, rtol=1e-4)
        assert "".join(result.tokens) == "".join(result.steps) == completion + tokenizer.eos_token
        assert result.reward == pytest.approx(result.token_rewards.sum().item(), abs=1e-5)
        assert result.reward == pytest.approx(result.step_rewards.sum().item(), abs=1e-5)
        assert result.probability == pytest.approx(torch.tensor(result.reward).sigmoid().item())
        position = 0
        for step, reward in zip(result.steps, result.step_rewards, strict=True):
            length = len(step.replace(tokenizer.eos_token, "$"))
            assert reward.item() == pytest.approx(
                result.token_rewards[position : position + length].sum().item(), abs=1e-5
            )
            position += length
    assert scored[0].steps == ["two\n", "so 2<eos>"]
    assert scored[1].steps == ["first\n\n", "second\n", "third\n", "<eos>"]
    assert scored[1].step_ids == [0] * 7 + [1] * 7 + [2] * 6 + [3]


def test_score_renders_messages_with_the_chat_template(random_prm, tokenizer):
    prm = random_prm()
    messages = [{"role": "user", "content": "1+1="}]
    (as_messages,) = prm.score([messages], [[{"role": "assistant", "content": "2"}]])
    (as_text,) = prm.score(["user:1+1=\nassistant:"], ["2"])
    torch.testing.assert_close(as_messages.token_rewards, as_text.token_rewards)
    (other_prompt,) = prm.score(["user:1+2=\nassistant:"], ["2"])
    assert (other_prompt.token_rewards - as_text.token_rewards).abs().max() > 1e-4
    with pytest.raises(ValueError, match="the first is the assistant"):
        prm.score([messages], [messages])


@pytest.mark.parametrize("after_a_turn", ["", "\n"])
def test_score_shows_turns_and_rewards_only_what_the_policy_wrote(random_prm, tokenizer, monkeypatch, after_a_turn):
    # The second template writes a line break after the token that ends the policy's turn
    role = "{{ message['role'] + ':' + message['content'] }}"
    end = f"{{{{ '<eos>{after_a_turn}' if message['role'] == 'assistant' else '\n' }}}}"
    begin = "{% if add_generation_prompt %}assistant:{% endif %}"
    template = f"{{% for message in messages %}}{role}{end}{{% endfor %}}{begin}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    prm = random_prm()
    turns = [("assistant", "ask 3"), ("tool", "more"), ("user", "go on"), ("assistant", "so\n5")]
    completion = [{"role": role, "content": content} for role, content in turns]
    as_text = "ask 3<eos>", f"{after_a_turn}tool:more\nuser:go on\nassistant:", "so\n5<eos>"
    for prompt, told in (([{"role": "user", "content": "1+1="}], as_text[1]), ("1+1=", "morego on")):
        scored = prm.score([prompt, prompt], [completion, "1"])[0]
        assert "".join(scored.tokens) == as_text[0] + told + as_text[2]
        assert scored.steps == [as_text[0] + told, as_text[2]]
        # Rewards are those of the whole text where the policy wrote it, none elsewhere
        text = prompt if isinstance(prompt, str) else "user:1+1=\nassistant:"
        (whole,) = prm.score([text], [as_text[0] + told + as_text[2]])
        written = torch.ones(len(whole.tokens), dtype=torch.bool)
        first = len(tokenizer(as_text[0]).input_ids)
        written[first : first + len(tokenizer(told).input_ids)] = False
        torch.testing.assert_close(scored.token_rewards, whole.token_rewards * written)
        sums = [scored.token_rewards[:first].sum(), scored.token_rewards[first:].sum()]
        torch.testing.assert_close(scored.step_rewards, torch.stack(sums))
        assert scored.reward == pytest.approx(sum(sums).item(), rel=1e-5)
        (cut_off,) = prm.score([prompt], [completion], truncated=[True])
        assert cut_off.steps == [as_text[0] + told, "so\n5"]
    for other, message in (
        ([completion[1]], "the first is the assistant's"),
        ([{**completion[0], "tool_calls": [1]}, *completion[1:]], "'tool_calls' beside its content"),
    ):
        with pytest.raises(ValueError, match=message):
            prm.score([prompt], [other])


def test_score_refuses_turns_of_a_template_that_rewrites_them(random_prm, tokenizer, monkeypatch):
    template = "{% for message in messages %}{{ message['content'] if loop.last else 'cut' }}<eos>{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    completion = [{"role": role, "content": "so"} for role in ("assistant", "user", "assistant")]
    with pytest.raises(ValueError, match="in another way once others follow it.*one at a time"):
        random_prm().score([[{"role": "user", "content": "1+1="}]], [completion])


def test_score_uses_the_step_delimiter(random_prm):
    (result,) = random_prm(step_delimiter="so").score(["1"], ["aso bso c"])
    assert result.steps == ["aso", " bso", " c<eos>"]


def test_one_prompt_is_that_of_all_completions(random_prm, tokenizer, monkeypatch):
    prm = random_prm()
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0]['content'] }}")
    for prompt in ("1+1=", [{"role": "user", "content": "1+1="}]):
        alone, together = prm.score(prompt, ["2", "3"]), prm.score([prompt] * 2, ["2", "3"])
        assert [result.reward for result in alone] == [result.reward for result in together]
    with pytest.raises(ValueError, match="`completions` is a text"):
        prm.score("1+1=", "23")


def test_score_wants_a_completion_for_each_prompt(random_prm):
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        random_prm().score(["1", "2"], ["1"])
    assert random_prm().score([], []) == []


def test_score_of_a_tokenizer_without_pad_token(random_prm):
    prm = random_prm()
    expected = [result.reward for result in prm.score(PROMPTS, COMPLETIONS)]
    prm.tokenizer = build_tokenizer()
    prm.tokenizer.pad_token = None
    assert [result.reward for result in prm.score(PROMPTS, COMPLETIONS)] == pytest.approx(expected)


def test_an_adapter_is_saved_as_peft_saves_it(tokenizer, tmp_path):
    prm = ImplicitPRM.from_model(build_model(), tokenizer, peft_config=lora())
    make_trained(prm.model)
    prm.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build_model(), tmp_path / "adapter")
    with torch.no_grad():
        expected = slow_log_probs(model, *ragged_batch())
    torch.testing.assert_close(prm.log_probs(*ragged_batch()), expected, atol=1e-5, rtol=1e-5)
