"""Generation at scale stays TRL's: vLLM by stand-ins that answer from a tiny model, rollout functions, tools, environments.

What the stand-ins show: which weights are sent and when, that the sampler's log-probabilities correct the loss of the rows
that they belong to, and which tokens learn. What they cannot show: anything inside vLLM, and NCCL.
"""

import copy
import importlib.util
import os
import types

import pytest
import torch
import transformers
from conftest import build_model, build_tokenizer, distance, parity_reward, row_rewards, same, slow_log_probs, weights
from datasets import Dataset
from helpers import copied, lora
from packaging.version import Version
from peft import PeftModel
from trl.generation import vllm_generation

from trl_prime import ImplicitPRM, prime_config
from trl_prime.implicit_prm.updater import PRMUpdater

INPUTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
MIXED = (1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
PASSES, FAILS = (1.0, 0.0, 0.0, 1.0), (0.0,) * 4
MODES = ("server", "colocate")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CLIP = {"vllm_importance_sampling_clip_min": 0.9, "vllm_importance_sampling_clip_max": 1.1}


class Engine:
    """
    What vLLM does, by a tiny model of its own.

    Its log-probabilities are off from the model's by up to `offset`, as those of another kernel are. With a `script`, a
    function of the ids of the prompt, the completions are given and only scored.
    """

    def __init__(self, vocab_size=44):
        self.model = build_model(99, vocab_size)
        self.generator = torch.Generator().manual_seed(0)
        self.trainer = self.script = None
        self.offset = 0.0
        self.syncs, self.steps, self.calls, self.sampled = [], [], [], {}

    def begin_sync(self):
        self.syncs.append({})
        self.steps.append(self.trainer.state.global_step)

    def load(self, name, tensor):
        self.syncs[-1][name] = tensor.detach().clone()
        with torch.no_grad():
            self.model.get_parameter(name).copy_(tensor)

    @torch.no_grad()
    def complete(self, prompt, max_tokens):
        completion = list(self.script(prompt)) if self.script else []
        while not self.script and len(completion) < max_tokens and completion[-1:] != [1]:
            logits = self.model(torch.tensor([[*prompt, *completion]])).logits[0, -1]
            completion.append(int(torch.multinomial(logits.softmax(-1), 1, generator=self.generator)))
        logits = self.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        logps = logps + self.offset * torch.sin(torch.arange(len(completion)) + 7.0 * sum(completion))
        self.sampled[(tuple(prompt), tuple(completion))] = logps
        return completion, logps.tolist()


class Client:
    """Stands in for TRL's client of a vLLM server."""

    engine = None
    syncing = False

    def __init__(self, base_url, group_port, connection_timeout):
        pass

    def init_communicator(self, device):
        pass

    def reset_prefix_cache(self):
        self.syncing = False

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_param(self, name, tensor):
        """TRL 1.9 sends one at a time, and then resets the cache."""
        if not self.syncing:
            self.engine.begin_sync()
            self.syncing = True
        self.engine.load(name, tensor)

    def update_named_params(self, metadata, named_params):
        self.engine.begin_sync()
        for (name, dtype, shape), (sent_name, tensor) in zip(metadata, named_params, strict=True):
            assert (name, dtype, shape) == (sent_name, "float32", list(tensor.shape))
            self.engine.load(name, tensor)

    def generate(self, prompts, n, max_tokens, **kwargs):
        self.engine.calls.append(len(prompts) * n)
        outputs = [self.engine.complete(prompt, max_tokens) for prompt in prompts for _ in range(n)]
        return {
            "prompt_ids": prompts,
            "completion_ids": [completion for completion, _ in outputs],
            "logprobs": [[[logp] for logp in logps] for _, logps in outputs],
        }


class LLM:
    """Stands in for `vllm.LLM`."""

    engine = None

    def __init__(self, model, **kwargs):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]  # TRL has set them for vLLM; here they would mislead the runs that follow
        worker = types.SimpleNamespace(model_runner=types.SimpleNamespace(model=self))
        executor = types.SimpleNamespace(driver_worker=worker)
        config = types.SimpleNamespace(max_model_len=256)
        self.llm_engine = types.SimpleNamespace(model_executor=executor, model_config=config)
        self.loading = False

    def load_weights(self, named_params):
        if not self.loading:
            self.engine.begin_sync()
            self.loading = True
        for name, tensor in named_params:
            self.engine.load(name, tensor)

    def reset_prefix_cache(self):
        self.loading = False

    def generate(self, prompts, sampling_params, use_tqdm):
        assert sampling_params["n"] == 1
        self.engine.calls.append(len(prompts))
        results = []
        for prompt in prompts:
            ids, logps = self.engine.complete(prompt["prompt_token_ids"], sampling_params["max_tokens"])
            logprobs = [
                {token: types.SimpleNamespace(rank=1, logprob=logp)} for token, logp in zip(ids, logps, strict=True)
            ]
            output = types.SimpleNamespace(token_ids=ids, logprobs=logprobs)
            results.append(types.SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[output]))
        return results


@pytest.fixture
def engine(monkeypatch):
    """An engine in vLLM's place, in both of TRL's modes."""
    engine = Engine()
    monkeypatch.setattr(Client, "engine", engine)
    monkeypatch.setattr(LLM, "engine", engine)
    for module in (prime_config, vllm_generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(vllm_generation, "VLLMClient", Client)
    monkeypatch.setattr(vllm_generation, "LLM", LLM, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", dict, raising=False)
    return engine


class Run:
    """A trained trainer, its policy at each rollout, and what went in and out of each policy loss."""

    def __init__(self, make_trainer, engine=None, reward_funcs=parity_reward, **kwargs):
        self.policies, self.losses, self.engine = [], [], engine

        def reward(**columns):
            self.policies.append(copied(self.trainer.model))
            return reward_funcs(**columns)

        reward.__name__ = reward_funcs.__name__
        self.trainer = make_trainer(reward_funcs=reward, **kwargs)
        compute_loss = self.trainer._compute_loss

        def recorded(model, inputs):
            policy = copied(model)
            loss = compute_loss(model, inputs)
            self.losses.append((policy, dict(inputs), loss.item()))
            return loss

        self.trainer._compute_loss = recorded
        if engine is not None:
            engine.trainer = self.trainer
        self.trainer.train()


@pytest.fixture
def run(make_trainer, engine):
    return lambda mode="server", **kwargs: Run(make_trainer, engine, use_vllm=True, vllm_mode=mode, **kwargs)


def loss_mask(output):
    return output["completion_mask"] * output.get("tool_mask", 1)


def keys(output):
    """Prompt and completion of each row as the engine knows them."""
    prompts, prompt_masks, completions, masks = (output[name] for name in INPUTS)
    return [
        (tuple(prompt[mask.bool()].tolist()), tuple(completion[written.bool()].tolist()))
        for prompt, mask, completion, written in zip(prompts, prompt_masks, completions, masks, strict=True)
    ]


def sampled_logps(engine, output):
    """(B, T) log-probabilities that the engine gave to these completions, zero at padding."""
    result = torch.zeros(output["completion_ids"].shape)
    for row, key in enumerate(keys(output)):
        result[row, : len(key[1])] = engine.sampled[key]
    return result


def ratio(old_logps, sampled, mask, correction):
    """TRL's correction, from its documentation."""
    difference = (old_logps - sampled) * mask
    if correction.startswith("sequence"):
        difference = difference.sum(1, keepdim=True)
    result = difference.exp()
    if correction.endswith("truncate"):
        return result.clamp(0.9, 1.1)
    return result * ((result >= 0.9) & (result <= 1.1))


# --- Weight sync ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prm_peft", [None, lora()], ids=["full prm", "lora prm"])
@pytest.mark.parametrize("policy_peft", [None, lora()], ids=["full", "lora"])
def test_weights_of_the_policy_are_sent_and_none_of_the_prm(run, random_prm, mode, policy_peft, prm_peft):
    kwargs = {"prm_peft_config": prm_peft} if prm_peft else {"prm_model": random_prm()}
    result = run(mode, peft_config=policy_peft, max_steps=3, learning_rate=1e-2, prm_learning_rate=1e-2, **kwargs)
    engine, policies = result.engine, result.policies
    assert engine.steps == [0, 1, 2] and len(policies) == 3
    for sent, policy in zip(engine.syncs, policies, strict=True):
        merged = weights(policy.merge_and_unload() if isinstance(policy, PeftModel) else policy)
        assert sent.keys() == weights(build_model()).keys()
        assert same(sent, merged) if policy_peft is None else distance(sent, merged) < 1e-6
    assert distance(engine.syncs[0], engine.syncs[1]) > 1e-4 and distance(engine.syncs[1], engine.syncs[2]) > 1e-4
    # Merged for the sync, and taken apart again for training
    if policy_peft:
        base = [p for name, p in result.trainer.model.named_parameters() if "lora_" not in name]
        assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(base, build_model().parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"num_iterations": 2}, [0, 2]),
        ({"steps_per_generation": 2, "per_device_train_batch_size": 4}, [0, 2]),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, [0, 1, 2, 3]),
        # Two generations within an optimizer step: nothing has changed for the second
        (
            {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "per_device_train_batch_size": 8},
            [0, 1, 2, 3],
        ),
        ({"steps_per_generation": 2, "num_iterations": 2, "per_device_train_batch_size": 4}, [0]),
    ],
    ids=str,
)
def test_weights_are_sent_when_there_are_rollouts_to_make(run, settings, steps):
    result = run(max_steps=4, learning_rate=1e-2, **settings)
    assert result.engine.steps == steps
    every = 2 if settings.get("steps_per_generation") == 1 else 1
    for sent, policy in zip(result.engine.syncs, result.policies[::every], strict=True):
        assert same(sent, weights(policy))


@pytest.mark.parametrize("mode", MODES)
def test_oversampling_asks_for_more_completions(run, mode):
    result = run(mode, oversample_factor=2, max_steps=2, accuracy_high=0.9)
    assert result.engine.calls == [16, 16]
    assert all(len(output["completion_ids"]) == 8 for output in result.trainer.outputs)


@pytest.mark.parametrize("mode", MODES)
def test_further_rounds_ask_for_other_completions_of_the_same_weights(run, mode):
    band = {"accuracy_low": 0.2, "accuracy_high": 0.8}
    result = run(mode, reward_funcs=row_rewards(FAILS + PASSES), filter_max_rounds=3, max_steps=2, **band)
    assert result.engine.calls == [8] * 4 and result.engine.steps == [0, 1]
    assert all(loss_mask(output).any(1).all() for output in result.trainer.outputs)
    texts = [*result.trainer._logs["completion"]]
    assert len(texts) == 16 and texts[:8] != texts[8:]


# --- Importance-sampling correction ---

SELECTIONS = {
    "plain": {},
    "oversampled": {
        "oversample_factor": 2,
        "reward_funcs": row_rewards(FAILS + PASSES + FAILS + PASSES),
        "accuracy_low": 0.2,
        "accuracy_high": 0.8,
    },
    "too few pass": {
        "oversample_factor": 2,
        "reward_funcs": row_rewards(FAILS + FAILS + FAILS + PASSES),
        "accuracy_low": 0.2,
        "accuracy_high": 0.8,
    },
    "two rounds": {
        "filter_max_rounds": 2,
        "reward_funcs": row_rewards(FAILS + PASSES),
        "accuracy_low": 0.2,
        "accuracy_high": 0.8,
    },
    "two epochs": {"num_iterations": 2},
    "in two steps": {
        "steps_per_generation": 2,
        "per_device_train_batch_size": 4,
        "oversample_factor": 2,
        "reward_funcs": row_rewards(FAILS + PASSES + FAILS + PASSES),
        "accuracy_low": 0.2,
        "accuracy_high": 0.8,
    },
}


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_samplers_log_probabilities_correct_the_loss_of_their_own_rows(
    run, engine, random_prm, selection, correction
):
    engine.offset = 0.1 if correction.startswith("sequence") else 0.3
    result = run(
        prm_model=random_prm(),
        vllm_importance_sampling_mode=correction,
        max_steps=4,
        optim="sgd",
        learning_rate=0.5,
        **CLIP,
        **SELECTIONS[selection],
    )
    assert len(result.losses) == 4
    advantages = {
        key: row
        for output in result.trainer.outputs
        for key, row in zip(keys(output), output["advantages"], strict=True)
    }
    ratios, effects = [], []
    for step, (policy, inputs, loss) in enumerate(result.losses):
        policies = result.policies
        at_rollout = policies[step * len(policies) // 4]
        mask, sampled = loss_mask(inputs), sampled_logps(engine, inputs)
        torch.testing.assert_close(inputs["sampling_per_token_logps"], sampled, atol=1e-5, rtol=0)
        with torch.no_grad():
            old, new = (slow_log_probs(model, *(inputs[name] for name in INPUTS)) for model in (at_rollout, policy))
        written = inputs["completion_mask"].bool()  # TRL 1.9 leaves numbers at padding
        torch.testing.assert_close(inputs["old_per_token_logps"][written], old[written], atol=1e-5, rtol=0)
        # The correction of rows that do not train is of no account
        trains = mask.any(1)
        expected = ratio(old, sampled, mask, correction)
        torch.testing.assert_close(inputs["importance_sampling_ratio"][trains], expected[trains], atol=1e-4, rtol=0)
        ratios.append(expected[trains].expand(-1, mask.shape[1])[mask[trains].bool()])
        for row, key in enumerate(keys(inputs)):
            if trains[row]:
                width = min(inputs["advantages"].shape[1], advantages[key].shape[0])
                assert torch.equal(inputs["advantages"][row, :width], advantages[key][:width])
        coefficient = (new - old).exp()
        objective = torch.min(
            coefficient * inputs["advantages"],
            coefficient.clamp(0.8, 1 + result.trainer.epsilon_high) * inputs["advantages"],
        )
        share = 1 / result.trainer.args.steps_per_generation
        expected_loss = -(objective * expected * mask).sum() / (inputs["num_items_in_batch"] * share)
        assert loss == pytest.approx(expected_loss.item(), abs=1e-5)
        without = -(objective * mask).sum() / (inputs["num_items_in_batch"] * share)
        effects.append(abs(loss - without.item()))
    assert max(effects) > 1e-3
    ratios = torch.cat(ratios)
    outer = (0.9, 1.1) if correction.endswith("truncate") else (0.0,)
    assert any((ratios - bound).abs().min() < 1e-6 for bound in outer) and ((ratios - 1).abs() > 1e-2).any()


@pytest.mark.parametrize("mode", MODES)
def test_without_a_difference_the_correction_changes_nothing(run, engine, mode):
    """And with one, a run without correction ends elsewhere."""
    ends = {}
    for offset in (0.0, 0.3):
        for corrects in (False, True):
            engine.generator.manual_seed(0)
            engine.offset = offset
            result = run(mode, vllm_importance_sampling_correction=corrects, optim="sgd", learning_rate=0.5, **CLIP)
            ends[offset, corrects] = weights(result.trainer.model)
            assert ("importance_sampling_ratio" in result.trainer.outputs[0]) is corrects
    assert distance(ends[0.0, False], ends[0.0, True]) < 1e-6
    assert distance(ends[0.0, False], ends[0.3, False]) < 1e-6 < 1e-4 < distance(ends[0.3, False], ends[0.3, True])


def test_off_policy_masking_looks_at_the_samplers_log_probabilities(run, engine):
    """A sampler that is far off has its completions of negative advantage masked."""
    losses = []
    for threshold in (None, 1e-3):
        engine.generator.manual_seed(0)
        engine.offset = 0.5
        settings = {"off_policy_mask_threshold": threshold, "vllm_importance_sampling_correction": False}
        losses.append(run(max_steps=1, **settings).losses[0][2])
    assert abs(losses[0] - losses[1]) > 1e-3


def test_process_rewards_do_not_know_who_sampled(run, engine, random_prm):
    engine.offset = 0.5
    seen = []
    prm = random_prm()
    start = copy.deepcopy(prm.model)
    result = run(
        prm_model=prm,
        reward_combination=lambda rewards: seen.append(rewards) or rewards.combine(),
        process_reward_norm="none",
        max_steps=1,
    )
    batch = [result.trainer.outputs[0][name] for name in INPUTS]
    with torch.no_grad():
        expected = 0.5 * (slow_log_probs(start, *batch) - slow_log_probs(prm.reference, *batch))
    torch.testing.assert_close(seen[0].process_rewards, expected, atol=2e-5, rtol=1e-4)


def test_evaluation_uses_the_engine_too(run):
    result = run(
        eval_dataset=Dataset.from_list([{"prompt": "1="}] * 2),
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
    )
    assert result.engine.calls == [8, 4, 8, 4]
    assert result.engine.steps == [0, 1, 2]


# --- Continuous batching by transformers ---


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.8"), reason="TRL wants transformers 5.8 for it")
@pytest.mark.parametrize("adapters", [{}, {"peft_config": lora(), "prm_peft_config": lora()}], ids=["full", "lora"])
def test_continuous_batching_generates_by_the_policy_as_it_is(make_trainer, adapters):
    rows, seen = [{"prompt": "12345"[: 1 + i % 5] + f"+{i}="} for i in range(24)], []
    result = Run(
        make_trainer,
        model=build_model(7, scale=4.0),
        reward_funcs=row_rewards(MIXED),
        reward_combination=lambda rewards: seen.append(rewards) or rewards.combine(),
        train_dataset=Dataset.from_list(rows),
        use_transformers_continuous_batching=True,
        # Unset, the cache takes half of the machine's memory
        transformers_continuous_batching_config={"num_blocks": 16, "page_size": 16, "max_batch_tokens": 64},
        process_reward_norm="none",
        num_generations=2,
        top_k=1,
        max_steps=3,
        learning_rate=1e-2,
        **adapters,
    )
    trainer, completions = result.trainer, set()
    assert len(trainer.outputs) == len(result.policies) == len(seen) == 3
    for policy, output in zip(result.policies, trainer.outputs, strict=True):
        for prompt, completion in keys(output):
            # With top_k 1 each token is the policy's first choice after those before it
            logits = policy.eval()(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(completion)[:, None])[:, 0]
            torch.testing.assert_close(chosen, logits.max(1).values, atol=1e-4, rtol=0)
            completions.add(completion)
    assert len(completions) > 3
    # Policy and PRM train with the attention that they had before
    for model in (trainer.model, trainer.implicit_prm.model):
        assert model.config._attn_implementation == "sdpa"
    assert not seen[0].process_rewards.any() and seen[2].process_rewards.any()


# --- rollout_func ---


@pytest.mark.parametrize("vllm", [False, True])
def test_a_rollout_function_gives_tokens_masks_and_columns(make_trainer, engine, random_prm, monkeypatch, vllm):
    """Tokens of its environment learn nothing, and its columns stay with their rows when groups are dropped."""
    batches, update = [], PRMUpdater.update
    monkeypatch.setattr(PRMUpdater, "update", lambda self, batch: batches.append(batch) or update(self, batch))
    engine.offset = 0.3

    def rollout(prompts, trainer):
        prompt_ids = [trainer.processing_class(prompt).input_ids for prompt in prompts]
        if vllm:
            _, ids, logps, _ = trainer.vllm_generation.generate(prompt_ids, None, 4)
            logps = [[values[0] for values in row] for row in logps]
        else:
            ids = [engine.complete(prompt, 8)[0] for prompt in prompt_ids]
            logps = None
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": ids,
            "logprobs": logps,
            "env_mask": [[int(i == 0 or token % 2) for i, token in enumerate(row)] for row in ids],
            "solved": [float(i % 16 in (4, 12, 15)) for i in range(len(prompts))],
        }

    def reward(completions, solved, **kwargs):
        return solved

    result = Run(
        make_trainer,
        engine,
        reward,
        rollout_func=rollout,
        use_vllm=vllm,
        vllm_mode="server",
        vllm_importance_sampling_mode="token_truncate",
        prm_model=random_prm(),
        oversample_factor=2,
        accuracy_low=0.2,
        accuracy_high=0.8,
        max_steps=3,
        **CLIP,
    )
    assert engine.steps == ([0, 1, 2] if vllm else [])
    for output, batch in zip(result.trainer.outputs, batches, strict=True):
        written = output["completion_ids"] % 2 == 1
        written[:, 0] = True
        written &= output["completion_mask"].bool()
        assert torch.equal(loss_mask(output).bool(), written) and torch.equal(batch.policy_mask, written)
        assert not output["advantages"][~written].any() and output["advantages"][written].any()
        assert batch.labels.tolist() == [1, 0, 0, 0, 1, 0, 0, 1]
        if vllm:
            torch.testing.assert_close(
                output["sampling_per_token_logps"], sampled_logps(engine, output), atol=1e-5, rtol=0
            )
            expected = ratio(output["old_per_token_logps"], sampled_logps(engine, output), written, "token_truncate")
            torch.testing.assert_close(output["importance_sampling_ratio"], expected, atol=1e-4, rtol=0)
            assert (output["importance_sampling_ratio"][written] != 1).any()
    assert distance(weights(result.trainer.model), weights(build_model())) > 1e-4


# --- Tools and environments ---

TOOL_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<call>' + call['function']['name'] + call['function']['arguments'] | tojson + '</call>' }}{% endfor %}"
    "{{ '<eos>\n' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant:",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<call>(?P<name>\w+)",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"<eos>|$", "content": "text"},
    },
}
CONVERSATIONS = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i % 7}+{i % 5}="}]} for i in range(40)])


@pytest.fixture
def tool_tokenizer():
    if importlib.util.find_spec("transformers.utils.chat_parsing") is None:
        pytest.skip("needs transformers 5.13, which reads tool calls of any form")
    tokenizer = build_tokenizer('0123456789+=:\nabcdefghijklmnopqrstuvwxyz <>/{}",_().[]-' + "'")
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


@pytest.fixture
def run_with_tools(make_trainer, engine, tool_tokenizer, monkeypatch):
    """Train on conversations that a script writes: a function of the text so far and the number of completions so far."""

    def run(generation, script, **kwargs):
        size, count = len(tool_tokenizer), iter(range(10**6))

        def encoded(prompt):
            return tool_tokenizer(script(tool_tokenizer.decode(prompt), next(count)) + "<eos>").input_ids

        engine.model, engine.script = build_model(99, size), encoded
        policy = build_model(0, size)

        def generate(input_ids, attention_mask, **kwargs):
            rows = [encoded(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
            width = max(map(len, rows))
            completions = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            return torch.cat([input_ids, completions], dim=1)

        policy.generate = generate
        settings = {} if generation == "transformers" else {"use_vllm": True, "vllm_mode": generation}
        return Run(
            make_trainer,
            engine,
            model=policy,
            processing_class=tool_tokenizer,
            train_dataset=CONVERSATIONS,
            max_completion_length=120,
            vllm_importance_sampling_mode="token_truncate",
            **settings,
            **kwargs,
        )

    return run


@pytest.fixture
def updates(monkeypatch):
    """The batches that the PRM is updated on."""
    seen, update = [], PRMUpdater.update
    monkeypatch.setattr(PRMUpdater, "update", lambda self, batch: seen.append(batch) or update(self, batch))
    return seen


def far_prm(tokenizer):
    """A PRM whose rewards are not zero."""
    models = (build_model(seed, len(tokenizer), scale=4.0) for seed in (1, 2))
    model, reference = models
    return ImplicitPRM(model, reference.requires_grad_(False), tokenizer, beta=0.5)


def unwritten(tokenizer, ids, mask):
    """The text of the tokens that the policy did not write."""
    return tokenizer.decode([token for token, written in zip(ids.tolist(), mask.tolist(), strict=True) if not written])


@pytest.mark.parametrize("generation", ["transformers", *MODES])
def test_what_a_tool_says_teaches_nothing(run_with_tools, tool_tokenizer, updates, generation, engine):
    engine.offset = 0.3
    calls, seen = [], []

    def add(a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: The first.
            b: The second.
        """
        calls.append((a, b))
        return a + b

    def script(text, number):
        if "tool:" in text:
            return "it is " + text.rsplit("tool:", 1)[1].split("\n")[0] + "x" * (number % 3)
        return '<call>add{"a": 20, "b": 30}</call>' if number % 2 else "no idea"

    result = run_with_tools(
        generation,
        script,
        reward_funcs=row_rewards(MIXED),
        prm_model=far_prm(tool_tokenizer),
        tools=[add],
        reward_combination=lambda rewards: seen.append(rewards) or rewards.combine(),
        process_reward_norm="none",
        max_steps=2,
    )
    assert calls == [(20, 30)] * 8
    for output, batch, rewards in zip(result.trainer.outputs, updates, seen, strict=True):
        prompt_ids, prompt_mask, ids, mask = (output[name] for name in INPUTS)
        texts = [tool_tokenizer.decode(row[m.bool()]) for row, m in zip(ids, mask, strict=True)]
        assert sum(text == "no idea<eos>" for text in texts) == 4
        called = torch.tensor(["tool:50" in text for text in texts])
        assert called.sum() == 4 and all(
            text.count("it is 50") == 1 for text, c in zip(texts, called, strict=True) if c
        )
        told = mask.bool() & ~output["tool_mask"].bool()
        assert torch.equal(told.any(1), called)
        for row in called.nonzero().flatten().tolist():
            assert unwritten(
                tool_tokenizer, ids[row][mask[row].bool()], output["tool_mask"][row][mask[row].bool()]
            ) == ("\ntool:50\nassistant:")
        written = mask.bool() & ~told
        assert torch.equal(batch.policy_mask, written) and torch.equal(rewards.completion_mask, written)
        assert not rewards.process_rewards[~written].any() and rewards.process_rewards[written].all()
        assert not output["advantages"][~written].any() and (output["advantages"] != 0)[written].float().mean() > 0.9
        assert output["num_items_in_batch"] == written.sum()
        if generation != "transformers":
            correction = output["importance_sampling_ratio"]
            assert (correction[~written] == 1).all() and ((correction[written] - 1).abs() > 1e-3).float().mean() > 0.5
    # The PRM's loss is the cross entropy of scores that leave out what the tool said
    scores, labels = seen[0].process_rewards.sum(1), torch.tensor(MIXED)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels)
    assert result.trainer.state.log_history[0]["prm/loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert result.trainer.state.log_history[0]["tools/call_frequency"] == 0.5


class Guessing:
    """An environment of two turns: guess a number, hear whether it is larger, guess again."""

    instances = []

    def __init__(self):
        self.instances.append(self)

    def reset(self, **kwargs) -> str:
        self.guesses = []
        return "guess a number"

    def guess(self, number: int) -> str:
        """
        Guess the number.

        Args:
            number: The guess.
        """
        self.guesses.append(number)
        return "right" if number == 7 else "larger"

    def get_reward(self) -> float:
        return float(self.guesses[-1:] == [7])


@pytest.mark.parametrize("generation", ["transformers", *MODES])
def test_an_environment_of_two_turns_gives_the_outcome(run_with_tools, tool_tokenizer, updates, generation):
    Guessing.instances.clear()

    def script(text, number):
        assert "guess a number" in text
        heard = text.count("tool:")
        if heard == 2 or "right" in text:
            return "done"
        if heard == 1:
            return f'<call>guess{{"number": {7 if number % 3 else 6}}}</call>'
        return '<call>guess{"number": 3}</call>' if number % 2 else "no"

    result = run_with_tools(
        generation,
        script,
        reward_funcs=row_rewards((None,)),
        environment_factory=Guessing,
        prm_model=far_prm(tool_tokenizer),
        max_steps=2,
    )
    assert len(Guessing.instances) == 8  # one for each completion, used again
    learnt = 0
    for output, batch in zip(result.trainer.outputs, updates, strict=True):
        _, _, ids, mask = (output[name] for name in INPUTS)
        for row in range(8):
            kept = mask[row].bool()
            text = tool_tokenizer.decode(ids[row][kept])
            told = unwritten(tool_tokenizer, ids[row][kept], batch.policy_mask[row][kept])
            assert told.count("tool:") == text.count("tool:") == text.count("<call>")
            assert "<call>" not in told and "<eos>" not in told
            assert batch.labels[row] == float("right" in text)
            learnt += batch.labels[row].item()
        told = mask.bool() & ~batch.policy_mask
        assert told.any() and not output["advantages"][told].any()
        assert output["advantages"][batch.policy_mask].any()
    assert 0 < learnt < 16
    assert result.trainer.reward_func_names == ["row_reward", "Guessing"]
    assert distance(weights(result.trainer.implicit_prm.model), weights(far_prm(tool_tokenizer).model)) > 1e-4
