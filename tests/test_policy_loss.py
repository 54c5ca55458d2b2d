"""PRIME around TRL's policy loss: decisions by completion, and steps in which nothing is trained."""

import math

import pytest
import torch
from conftest import distance, logged, row_rewards, same, weights
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from trl import GRPOTrainer

from trl_prime import PRIMETrainer
from trl_prime.policy_loss import loss_scales, sequence_advantages, vary_within_rows

PASSES, FAILS = (1.0, 0.0, 0.0, 1.0), (0.0,) * 4
BAND = {"accuracy_low": 0.2, "accuracy_high": 0.8}


def moe_policy():
    config = Qwen2MoeConfig(
        vocab_size=44,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return Qwen2MoeForCausalLM(config)


def test_advantages_of_completions_are_means_over_their_tokens():
    advantages = torch.tensor([[1.0, -1.0, 1.0, -2.0], [2.0, 2.0, 2.0, 9.0], [3.0, 4.0, 5.0, 6.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(sequence_advantages(advantages, mask), torch.tensor([[-0.25], [2.0], [0.0]]))
    assert vary_within_rows(advantages, mask).tolist() == [True, False, False]


def test_weights_of_micro_batches_have_the_mean_one():
    masks = torch.zeros(4, 2, 3, dtype=torch.long)
    masks[0], masks[1, 0], masks[2, 1, 0] = 1, 1, 1  # 2, 1, 1 and 0 of 8 rows are trained on
    for loss_type, factors in (("grpo", [1, 2, 2, 2]), ("dapo", [1] * 4), ("bnpo", [1] * 4)):
        scales = [loss_scales(mask, torch.tensor(8 / 4), loss_type) for mask in masks]
        assert [weight for weight, _ in scales] == [2, 1, 1, 0] and [factor for _, factor in scales] == factors


def test_trl_decides_by_the_advantage_of_the_completion():
    mask, old, new = torch.ones(2, 4), torch.zeros(2, 4), torch.full((2, 4), -2.0)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -2.0], [1.0, -1.0, 1.0, 2.0]])  # means -0.25 and 0.75
    assert PRIMETrainer.get_off_policy_mask(advantages, new, old, mask, 0.5).tolist() == [[0.0], [1.0]]
    parameters = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}
    phi = PRIMETrainer.get_gamma_weights(advantages, torch.full((2, 4), 0.1), mask, None, **parameters)
    w = math.exp(0.4)
    expected = [[math.exp(2) * w**3 * math.exp(-2 * w)], [math.exp(3) * w**2 * math.exp(-3 * w)]]
    torch.testing.assert_close(phi, torch.tensor(expected))


def test_sequence_level_gets_one_advantage_for_each_completion(train, random_prm):
    settings = {"importance_sampling_level": "sequence", "process_weight": 0.0, "max_steps": 1}
    trainer = train(reward_funcs=row_rewards(PASSES), prm_model=random_prm(), **settings)
    assert trainer.outputs[0]["advantages"].shape == (8,) and trainer.outputs[0]["advantages"].any()
    with pytest.raises(ValueError, match="importance_sampling_level='sequence'.*reward_combination"):
        train(
            reward_combination=lambda rewards: (
                rewards.combine() + torch.arange(8.0)[: rewards.completion_mask.shape[1]]
            ),
            **settings,
        )


def test_steps_without_anything_to_learn_are_in_no_average(train):
    """Two steps of which one trains: entropy and clip ratios are those of that one."""

    def every_other(completions, trainer_state, **kwargs):
        values = PASSES if trainer_state.global_step % 2 == 0 else FAILS
        return [values[i % 4] for i in range(len(completions))]

    adaptive = {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 0.2}
    single = train(reward_funcs=every_other, max_steps=2, **BAND, **adaptive)
    averaged = train(reward_funcs=every_other, max_steps=2, logging_steps=2, **BAND)
    assert logged(single, "filter/skipped_steps") == [0, 1] and logged(averaged, "filter/skipped_steps") == [0.5]
    (entropy,) = logged(single, "entropy")
    assert 3 < entropy < math.log(44) + 0.1 and logged(averaged, "entropy") == [pytest.approx(entropy, rel=1e-3)]
    assert len(logged(single, "clip_ratio/region_mean")) == 1
    # Nor does TRL's entropy control take it for an entropy of zero
    assert single._last_world_entropy == pytest.approx(entropy, rel=1e-3)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_router_is_not_trained_where_no_row_is(train, loss_type):
    start = weights(moe_policy())
    settings = {"model": moe_policy(), "process_weight": 0.0, "prm_update": "none", "loss_type": loss_type, **BAND}
    settings["router_aux_loss_coef"] = 0.1
    settings["gradient_accumulation_steps"] = 2
    skipped = train(reward_funcs=row_rewards(FAILS), **settings)
    assert same(weights(skipped.model), start) and logged(skipped, "filter/skipped_steps") == [1, 1]
    trained = train(reward_funcs=row_rewards(PASSES), **{**settings, "model": moe_policy()})
    assert trained.aux_loss_enabled and len(logged(trained, "aux_loss")) == 2
    assert distance(weights(trained.model), start) > 1e-4


def test_a_policy_loss_by_liger_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "compute_liger_loss", None, raising=False)  # which 1.9.2 has
    with pytest.raises(NotImplementedError, match="use_liger_kernel=True"):
        make_trainer(use_liger_kernel=True)
