"""A hook of one's own: it decides how outcome and process rewards become advantages. No network is needed, and no GPU.

Run it by `python examples/own_hook.py`: the built-in task makes its own data and a model of 0.4 million parameters, and every
step of a solution is known to be right or wrong. So you see in minutes whether the hook teaches anything.
"""

from pathlib import Path

import torch

from trl_prime import PRIMEConfig, PRIMETrainer
from trl_prime.advantages import RolloutRewards
from trl_prime.tasks import running_sums

RAMP = 20  # steps over which process rewards come in


def blame_only(rewards: RolloutRewards) -> torch.Tensor:
    """
    Process rewards tell a wrong completion where it went wrong, more and more in the course of the run; a right one is
    credited evenly.

    Args:
        rewards (`RolloutRewards`): The rewards of B completions of up to T tokens.

    Returns:
        `torch.Tensor`: `(B, T)` advantages.
    """
    wrong = rewards.outcome_rewards < 0.5  # NaN, which could not be judged, is not below
    ramp = min(1.0, rewards.trainer_state.global_step / RAMP)
    # `combine` goes on with the configured computation: baselines, discount, whitening
    return rewards.combine(
        process_rewards=rewards.process_rewards * wrong[:, None],
        process_weight=ramp * rewards.settings["process_weight"],
    )


def main():
    task = running_sums.prepare(Path("runs/own-hook"))
    trainer = PRIMETrainer(
        model=task.model,
        reward_funcs=task.reward_funcs,
        args=PRIMEConfig(
            "runs/own-hook",
            # The model is tiny: learning rates are a thousand times those of a language model
            learning_rate=5e-4,
            prm_learning_rate=5e-4,
            prm_beta=0.5,
            prm_replay_batches=4,
            per_device_train_batch_size=256,
            num_generations=8,
            max_completion_length=24,
            max_steps=60,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=task.train_dataset,
        reward_combination=blame_only,  # in a recipe: reward_combination: own_hook.blame_only
    )
    trainer.train()
    trainer.save_model()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    print(f"Right answers in the rollouts: {rewards[0]:.1%} at first, {rewards[-1]:.1%} at last")


if __name__ == "__main__":
    main()
