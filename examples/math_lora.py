"""Mathematics with LoRA: policy, PRM and reference share one base model, so that three models take the memory of one.

Run it by `python examples/math_lora.py`, or on several GPUs by `accelerate launch examples/math_lora.py`. It needs
`pip install "trl-prime[math]"`. Batch and lengths are a start for one GPU of 24 GB; they have not been tried on one.
"""

from peft import LoraConfig

from trl_prime import ImplicitPRM, PRIMEConfig, PRIMETrainer, load_prime_dataset
from trl_prime.rewards import math_reward

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
# A file of your own: load_prime_dataset("problems.csv", "question_answer(answer='gold')", prompt_suffix="math")
DATA = {"name_or_path": "openai/gsm8k", "format": "gsm8k", "config": "main", "prompt_suffix": "math"}


def main():
    adapter = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    test = load_prime_dataset(**DATA, split="test")
    trainer = PRIMETrainer(
        model=MODEL,
        reward_funcs=math_reward,
        args=PRIMEConfig(
            "runs/math-lora",
            # 16 problems x 4 completions = 8 x 8
            per_device_train_batch_size=8,
            gradient_accumulation_steps=8,
            num_generations=4,
            max_completion_length=512,
            # Not given, learning_rate, prm_learning_rate and prm_beta follow what is trained and how long completions are
            max_steps=200,
            logging_steps=1,
            # Accuracy on held-out problems, before the first step and after every 50
            eval_strategy="steps",
            eval_steps=50,
            eval_on_start=True,
            num_generations_eval=1,
            save_steps=50,
            log_completions=True,
        ),
        train_dataset=load_prime_dataset(**DATA),
        eval_dataset=test.select(range(min(256, len(test)))),
        peft_config=adapter,
        prm_peft_config=adapter,
    )
    trainer.train()
    trainer.save_model()  # the policy's adapter, and the PRM in prm/

    accuracies = [row["eval_reward"] for row in trainer.state.log_history if "eval_reward" in row]
    print(f"Held-out accuracy: {accuracies[0]:.1%} before, {accuracies[-1]:.1%} after")

    if trainer.accelerator.is_main_process:
        prm = ImplicitPRM.from_pretrained("runs/math-lora")
        (scored,) = prm.score(
            [{"role": "user", "content": "What is 7 * 8?"}], ["7 * 8 = 56\nThe answer is \\boxed{56}."]
        )
        for step, reward in zip(scored.steps, scored.step_rewards.tolist(), strict=True):
            print(f"{reward:+.3f} {step!r}")


if __name__ == "__main__":
    main()
