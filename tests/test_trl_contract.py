"""PRIME relies on this in TRL's policy loss, for every loss of the installed TRL: run this first with a new TRL.

TRL documents advantages of shape (B,); those of PRIME are (B, T), which TRL's loss takes "to support subclasses". Each test
calls the loss itself with made-up inputs, so that all losses and levels together take seconds.
"""

import itertools

import pytest
import torch
from conftest import build_model, parity_reward
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from trl_prime.prime_config import trl_choices

LOSSES = trl_choices("loss_type")
LEVELS = trl_choices("importance_sampling_level")


def gradient(trainer, batches, steps=1, **settings):
    """Loss and gradient of the policy, summed over the micro-batches of each step, as means over the steps."""
    # A KL term and an entropy bonus too; without them in between, the gradient of both would hide in that of the policy
    settings = {"beta": 0.1, "entropy_coef": 0.1, "_entropy_bonus_enabled": True, **settings}
    for name, value in settings.items():
        assert hasattr(trainer, name)
        setattr(trainer, name, value)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = len(batches) // steps
    trainer.args.steps_per_generation = len(batches)
    trainer.model.zero_grad()
    losses = [trainer._compute_loss(trainer.model, dict(batch)) for batch in batches]
    (sum(losses) / steps).backward()
    parameters = [parameter.grad.flatten() for parameter in trainer.model.parameters()]
    return sum(losses).item() / steps, torch.cat(parameters)


def rollouts(lengths, seed=0, **more):
    """A batch as TRL hands it to its loss: rows of random tokens, by a policy that has moved since."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), 6)
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    logps = {
        # Ratios in and beyond TRL's bounds
        name: -3.8 + 0.3 * torch.randn(shape, generator=generator)
        for name in ("old_per_token_logps", "ref_per_token_logps")
    }
    return {
        "prompt_ids": torch.randint(3, 44, (len(lengths), 3), generator=generator),
        "prompt_mask": torch.ones(len(lengths), 3, dtype=torch.long),
        "completion_ids": torch.randint(3, 44, shape, generator=generator),
        "completion_mask": mask,
        "tool_mask": torch.ones_like(mask).index_fill(1, torch.tensor([1]), 0),
        "advantages": torch.randn(shape, generator=generator),
        "num_items_in_batch": (mask.sum() - len(lengths)).clamp(min=1),
        **logps,
        **more,
    }


def take(batch, rows):
    return {key: value[rows] if value.ndim else value for key, value in batch.items()}


@pytest.fixture(scope="module")
def grpo(tokenizer, tmp_path_factory):
    args = GRPOConfig(
        str(tmp_path_factory.mktemp("grpo")),
        per_device_train_batch_size=8,
        max_completion_length=8,
        bf16=False,
        use_cpu=True,
        report_to=[],
        gradient_checkpointing=False,
    )
    dataset = Dataset.from_list([{"prompt": "1+1="}] * 8)
    return GRPOTrainer(build_model(7, scale=4.0), parity_reward, args, dataset, processing_class=tokenizer)


@pytest.fixture
def prime(make_trainer):
    return make_trainer(model=build_model(7, scale=4.0))


def test_losses_and_levels_of_the_installed_trl_are_found():
    assert {"grpo", "dr_grpo", "dapo", "bnpo"} <= {*LOSSES} and {"token", "sequence"} <= {*LEVELS}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_both_shapes_of_advantages_give_the_same_loss_and_gradient(grpo, loss_type):
    batch = rollouts([6, 3, 4, 5])
    by_row = torch.tensor([1.5, -0.7, 0.0, -0.2])
    for level, threshold in itertools.product(LEVELS, (None, 0.01)):
        settings = {
            "loss_type": loss_type,
            "importance_sampling_level": level,
            "off_policy_mask_threshold": threshold,
        }
        loss, expected = gradient(grpo, [{**batch, "advantages": by_row}], **settings)
        dense_loss, dense = gradient(grpo, [{**batch, "advantages": by_row[:, None].expand(4, 6).clone()}], **settings)
        assert dense_loss == pytest.approx(loss, rel=1e-5) and expected.norm() > 1e-2
        torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_each_token_is_credited_with_its_own_advantage(grpo, loss_type):
    """On policy the gradient is linear in the advantages, so that of two tokens is the sum of both, and they differ."""
    batch = rollouts([6, 3, 4, 5])
    del batch["old_per_token_logps"]
    settings = {"loss_type": loss_type, "importance_sampling_level": "token", "off_policy_mask_threshold": None}
    settings |= {"beta": 0.0, "entropy_coef": 0.0, "_entropy_bonus_enabled": False}
    gradients = []
    for columns in ([0], [2], [0, 2], [1]):
        advantages = torch.zeros(4, 6).index_fill(1, torch.tensor(columns), 1.0)
        gradients.append(gradient(grpo, [{**batch, "advantages": advantages}], **settings)[1])
    first, second, both, masked = gradients
    torch.testing.assert_close(both, first + second, rtol=1e-4, atol=1e-6)
    assert torch.cosine_similarity(first, second, dim=0) < 0.9 and first.norm() > 1e-2 < second.norm()
    # A token that the policy did not write has none (1.9.2's luspo at the token level counts it: PRIME's there is 0)
    assert not masked.any() or loss_type == "luspo"


@pytest.mark.parametrize("loss_type", LOSSES)
def test_rows_that_are_left_out_do_not_change_the_step(prime, loss_type):
    """Half of the rows masked, in one micro-batch or several, as if they had never been there."""
    # With a single length, the mean over the tokens of a micro-batch does not depend on which rows are in it
    for lengths, num_batches in (([6, 3, 4, 5, 2, 6, 3, 4], 1), ([5] * 8, 2), ([5] * 8, 4)):
        whole = rollouts(lengths, rows_per_trained_row=torch.tensor(2.0))
        trained = torch.tensor([True, False, False, True, True, True, False, False])
        whole["tool_mask"] = whole["tool_mask"] * trained[:, None]
        whole["advantages"] = whole["advantages"] * whole["tool_mask"] * whole["completion_mask"]
        whole["num_items_in_batch"] = (whole["tool_mask"] * whole["completion_mask"]).sum()
        alone = take(whole, trained) | {"rows_per_trained_row": torch.tensor(1.0)}
        # The last two rows are together in a micro-batch in which nothing is trained
        batches = [take(whole, rows) for rows in torch.arange(8).chunk(num_batches)]
        assert num_batches < 4 or not batches[-1]["tool_mask"].any()
        settings = {"loss_type": loss_type, "importance_sampling_level": "token", "off_policy_mask_threshold": None}
        loss, expected = gradient(prime, [alone], **settings)
        # Also where one generation lasts for several steps
        for steps in {1, num_batches // 2 or 1}:
            masked_loss, masked = gradient(prime, batches, steps=steps, **settings)
            assert masked_loss == pytest.approx(loss, rel=1e-4, abs=1e-6) and expected.norm() > 1e-2
            torch.testing.assert_close(masked, expected, rtol=1e-3, atol=1e-6)


def test_without_rows_left_out_the_loss_is_that_of_trl(prime, grpo):
    batch = rollouts([6, 3, 4, 5])
    for loss_type in LOSSES:
        settings = {"loss_type": loss_type, "importance_sampling_level": "token", "off_policy_mask_threshold": None}
        theirs = gradient(grpo, [batch], **settings)
        ours = gradient(prime, [batch | {"rows_per_trained_row": torch.tensor(1.0)}], **settings)
        if loss_type != "vespo":  # which decides by the sign of the completion
            assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
