"""Running sums modulo 10: the built-in task, on which a PRIME run works with no network on a CPU.

A prompt lists one-digit numbers, `3 5 2 7=`. The completion is the sum modulo 10 of the numbers so far, one per line,
`3\\n8\\n0\\n7`, and its last line is the answer. Every line is a step whose truth is known, so what an implicit
process reward says about a step can be compared with whether the step is right.

It is not a reasoning benchmark. It shows that training works and lets it be measured; a gain here says nothing about
gains on mathematics or code. The base model is made here too, and is made imperfect on purpose: see `warm_up`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

STEP_DELIMITER = "\n"
PAD_TOKEN, EOS_TOKEN, UNK_TOKEN = "<pad>", "<eos>", "<unk>"
SPECIAL_TOKENS = [PAD_TOKEN, EOS_TOKEN, UNK_TOKEN]
VOCABULARY = [*SPECIAL_TOKENS, *"0123456789", " ", "=", STEP_DELIMITER]

# A (sum so far, next number) pair mapped to the digit that stands for their sum.
WrongSums = dict[tuple[int, int], int]


def _prompt(digits: Collection[int]) -> str:
    return " ".join(map(str, digits)) + "="


def _true_sums(prompt: str) -> list[int]:
    if not re.fullmatch(r"[0-9]( [0-9])*=", prompt):
        raise ValueError(f"not a running-sum prompt: {prompt!r}")
    sums, total = [], 0
    for digit in prompt[:-1].split(" "):
        total = (total + int(digit)) % 10
        sums.append(total)
    return sums


def _draw_prompts(count: int, num_digits: int, rng: random.Random, taken: Collection[str] = ()) -> list[str]:
    if count < 0:
        raise ValueError(f"the number of problems must not be negative, got {count}")
    if num_digits < 1:
        raise ValueError(f"num_digits must be at least 1, got {num_digits}")
    seen = set(taken)
    if count > 10**num_digits - len(seen):
        raise ValueError(f"there are not {count} distinct problems of {num_digits} digits left to draw")
    prompts = []
    while len(prompts) < count:
        prompt = _prompt([rng.randrange(10) for _ in range(num_digits)])
        if prompt not in seen:
            seen.add(prompt)
            prompts.append(prompt)
    return prompts


def _to_dataset(prompts: list[str]) -> Dataset:
    from datasets import Dataset

    sums = [_true_sums(prompt) for prompt in prompts]
    return Dataset.from_dict(
        {
            "prompt": prompts,
            "solution": [str(row[-1]) for row in sums],
            "steps": [STEP_DELIMITER.join(map(str, row)) for row in sums],
        }
    )


def make_dataset(num_problems: int, *, num_digits: int = 10, seed: int = 0) -> Dataset:
    """Draw distinct problems.

    Args:
        num_problems: How many problems.
        num_digits: Numbers in each prompt, which is also the number of steps.
        seed: Same seed, same problems.

    Returns:
        Data set with the columns `prompt`, `solution` (the final digit) and `steps` (the reference completion), all
        strings.

    Raises:
        ValueError: If a count is out of range, or there are fewer than `num_problems` distinct problems.
    """
    return _to_dataset(_draw_prompts(num_problems, num_digits, random.Random(seed)))


def make_splits(num_train: int, num_test: int, *, num_digits: int = 10, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Draw a train and a held-out set that share no prompt.

    Args:
        num_train: Problems to train on.
        num_test: Held-out problems.
        num_digits: Numbers in each prompt.
        seed: Same seed, same problems. The held-out set does not depend on `num_train`.

    Returns:
        The train and the held-out set, with the columns of `make_dataset`.

    Raises:
        ValueError: If a count is out of range, or there are too few distinct problems for both sets.
    """
    # The held-out problems come first, so that a larger train set does not change them.
    rng = random.Random(seed)
    test = _draw_prompts(num_test, num_digits, rng)
    train = _draw_prompts(num_train, num_digits, rng, taken=test)
    return _to_dataset(train), _to_dataset(test)


def build_tokenizer(vocabulary: Sequence[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    """Build a character-level tokenizer: one character, one token.

    Args:
        vocabulary: `SPECIAL_TOKENS` and the characters; those of this task by default.

    Returns:
        Tokenizer with distinct padding, end-of-sequence and unknown tokens, padding on the left. It adds no tokens of
        its own, and decoding gives back exactly the text. Other characters are dropped.
    """
    from transformers import Qwen2Tokenizer

    # Beside a Qwen2 model, AutoTokenizer loads a Qwen2Tokenizer whatever was saved, so this has to be one. Without
    # merges it is character-level; its vocabulary names a space and a newline the byte-level way.
    names = [token.replace(" ", "Ġ").replace("\n", "Ċ") for token in vocabulary]
    return Qwen2Tokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=[],
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    hidden_size: int = 96,
    num_layers: int = 3,
    num_heads: int = 4,
) -> Qwen2ForCausalLM:
    """Build an untrained model of about 0.4 million parameters (at the default sizes).

    Args:
        tokenizer: Gives the vocabulary size and the special token ids.
        seed: Seed of the initial weights; the global random state is left as it was.
        hidden_size: Width; a multiple of `2 * num_heads`.
        num_layers: Number of decoder layers.
        num_heads: Number of attention heads.

    Returns:
        Model in float32.

    Raises:
        ValueError: If `hidden_size` is not a multiple of `2 * num_heads`.
    """
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    if hidden_size % (2 * num_heads):
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of 2 * num_heads = {2 * num_heads}")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=512,
        # Fit for a short context and a narrow model: with the usual 10000 and 0.02, training on right demonstrations
        # did not get beyond the first line in 650 steps.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).float()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def _draw_wrong_sums(count: int, rng: random.Random) -> WrongSums:
    pairs = [(total, digit) for total in range(10) for digit in range(10)]
    return {(a, b): (a + b + rng.randint(1, 9)) % 10 for a, b in rng.sample(pairs, count)}


def _demonstration(prompt: str, wrong_sums: WrongSums, wrong_rate: float, rng: random.Random) -> str:
    first, *rest = (int(digit) for digit in prompt[:-1].split(" "))
    lines = [first]
    for digit in rest:
        pair = (lines[-1], digit)
        wrong = pair in wrong_sums and rng.random() < wrong_rate
        # A wrong line is carried on from: it is the step that is wrong, not the rule of adding to the line before.
        lines.append(wrong_sums[pair] if wrong else sum(pair) % 10)
    return STEP_DELIMITER.join(map(str, lines))


def warm_up(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_digits: int = 10,
    steps: int = 200,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    output_dir: str | Path,
    num_wrong_sums: int = 17,
    wrong_rate: float = 0.75,
    exclude_prompts: Collection[str] = (),
) -> float:
    """Fine-tune the model, in place, on demonstrations that are wrong in a known way.

    The model is to take single steps mostly right and a long chain mostly wrong, and about equally so for every seed.
    Stopping at a fixed early step does not give that: once it starts, the task is learned within some tens of steps,
    and when it starts differs from seed to seed. So training goes on past that, but for `num_wrong_sums` of the 100
    pairs (sum so far, next number) the demonstrations give one fixed wrong digit at the rate `wrong_rate`. Greedy
    steps are then mostly wrong on those pairs; the right digit keeps the rest of the probability, so sampling finds
    it now and then.

    Args:
        model: Model to train; may end up on another device.
        tokenizer: Its tokenizer.
        num_digits: Numbers in each prompt.
        steps: Optimizer steps.
        batch_size: Demonstrations per step and device.
        learning_rate: Peak learning rate, from which it falls linearly to zero.
        seed: Seed of the demonstrations, of the wrong pairs and of the data order.
        output_dir: Folder that TRL's trainer is given; nothing is saved to it.
        num_wrong_sums: How many of the 100 pairs are taught wrong; 0 teaches the task cleanly.
        wrong_rate: How often such a pair is taught wrong, from 0 to 1.
        exclude_prompts: Prompts not to train on.

    Returns:
        Loss in nats per completion token at the last logged step.

    Raises:
        ValueError: If a number is out of range.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from ..reports.progress import MetricsProgressCallback

    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    if not 0 <= num_wrong_sums <= 100:
        raise ValueError(f"num_wrong_sums must be from 0 to 100, got {num_wrong_sums}")
    if not 0 <= wrong_rate <= 1:
        raise ValueError(f"wrong_rate must be from 0 to 1, got {wrong_rate}")
    # A string, so that the prompts are not those that make_dataset and make_splits draw from the same seed.
    rng = random.Random(f"warm-up {seed}")
    wrong_sums = _draw_wrong_sums(num_wrong_sums, rng)
    excluded = {prompt for prompt in exclude_prompts if len(_true_sums(prompt)) == num_digits}
    # Few digits may not give a fresh problem for every row; the trainer then goes over them again.
    count = min(steps * batch_size, 10**num_digits - len(excluded))
    prompts = _draw_prompts(count, num_digits, rng, taken=excluded)
    if not prompts:
        raise ValueError("exclude_prompts leaves no problem to train on")
    demonstrations = Dataset.from_dict(
        {"prompt": prompts, "completion": [_demonstration(p, wrong_sums, wrong_rate, rng) for p in prompts]}
    )
    config = SFTConfig(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(20, steps // 10),
        weight_decay=0.0,
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        seed=seed,
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=demonstrations, processing_class=tokenizer)
    MetricsProgressCallback.replace_default(trainer, "warm-up", {"loss": "loss"})
    trainer.train()
    model.eval()
    return next(row["loss"] for row in reversed(trainer.state.log_history) if "loss" in row)


def _lines(completion: str) -> list[str]:
    # A trailing delimiter ends the last line and starts no new one.
    return completion.removesuffix(STEP_DELIMITER).split(STEP_DELIMITER) if completion else []


def _text(completion: str | list[dict[str, str]]) -> str:
    if isinstance(completion, str):
        return completion
    return completion[-1]["content"] if completion else ""


def running_sum_reward(
    completions: list[str] | list[list[dict[str, str]]], solution: list[str], **kwargs: Any
) -> list[float]:
    """Outcome reward: is the last line the right digit?

    It looks at nothing but the last line, so a right answer after wrong steps, or after none, is rewarded.

    Args:
        completions: One completion per sample, text or a list of messages (of which the last one is read).
        solution: The right final digit of each sample.
        **kwargs: Other columns that TRL passes; not used.

    Returns:
        1.0 or 0.0 for each completion.

    Raises:
        ValueError: If there are not as many solutions as completions.
    """
    return [
        float(_lines(_text(completion))[-1:] == [digit])
        for completion, digit in zip(completions, solution, strict=True)
    ]


def every_sum_reward(
    completions: list[str] | list[list[dict[str, str]]], steps: list[str], **kwargs: Any
) -> list[float]:
    """Outcome reward: is every line right, and none missing?

    Of ten chains that go wrong, `running_sum_reward` finds one right by luck, because there are ten digits to end on. Here
    none is.

    Args:
        completions: As for `running_sum_reward`.
        steps: The reference completion of each sample.
        **kwargs: Other columns that TRL passes; not used.

    Returns:
        1.0 or 0.0 for each completion.

    Raises:
        ValueError: If there are not as many references as completions.
    """
    return [
        float(_lines(_text(completion)) == _lines(reference))
        for completion, reference in zip(completions, steps, strict=True)
    ]


def step_labels(prompt: str, completion: str) -> list[bool]:
    """Tell for each line of a completion whether it is the true running sum.

    The truth comes from the prompt alone: a line that adds correctly to a wrong line before it is wrong.

    Args:
        prompt: For example `3 5 2 7=`.
        completion: Its completion, without special tokens. A trailing delimiter ends the last line and starts no new
            one.

    Returns:
        One label per line of the completion; lines beyond the last number of the prompt are wrong.

    Raises:
        ValueError: If `prompt` is not a prompt of this task.
    """
    sums = _true_sums(prompt)
    return [i < len(sums) and line == str(sums[i]) for i, line in enumerate(_lines(completion))]


def prepare(
    output_dir: str | Path,
    *,
    seed: int = 0,
    num_digits: int = 10,
    num_train: int = 4096,
    num_test: int = 256,
    warm_up_steps: int = 200,
    num_wrong_sums: int = 17,
    wrong_rate: float = 0.75,
) -> Task:
    """Make the task: draw the problems, and train and save the base model unless that was done before.

    The base goes to `<output_dir>/sft` and the settings it was made by to `<output_dir>/sft.json`; a base made by
    other settings is replaced. Call it from one process only.

    Args:
        output_dir: Folder to work in.
        seed: Seed of the problems, the initial weights and the warm-up.
        num_digits: Numbers in each prompt.
        num_train: Problems to train on.
        num_test: Held-out problems; the warm-up does not see them either.
        warm_up_steps: Optimizer steps of the warm-up.
        num_wrong_sums: See `warm_up`.
        wrong_rate: See `warm_up`.

    Returns:
        The task, with this base model and the outcome reward.

    Raises:
        ValueError: If a number is out of range.
    """
    train, test = make_splits(num_train, num_test, num_digits=num_digits, seed=seed)
    base, record = Path(output_dir) / "sft", Path(output_dir) / "sft.json"
    settings = {
        "format": 1,
        "seed": seed,
        "num_digits": num_digits,
        "num_test": num_test,
        "warm_up_steps": warm_up_steps,
        "num_wrong_sums": num_wrong_sums,
        "wrong_rate": wrong_rate,
    }
    if not record.exists() or json.loads(record.read_text()) != settings:
        # Removed first and written last, so that an interrupted run leaves no record of a base it did not finish.
        record.unlink(missing_ok=True)
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, seed=seed)
        warm_up(
            model,
            tokenizer,
            num_digits=num_digits,
            steps=warm_up_steps,
            seed=seed,
            output_dir=base,
            num_wrong_sums=num_wrong_sums,
            wrong_rate=wrong_rate,
            exclude_prompts=test["prompt"],
        )
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        record.write_text(json.dumps(settings, indent=2) + "\n")
    return Task(
        name="running_sums",
        model=str(base),
        train_dataset=train,
        eval_dataset=test,
        reward_funcs=[running_sum_reward],
        step_labels=step_labels,
    )
