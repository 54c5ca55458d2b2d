"""A tiny tokenizer, tiny models and tiny runs, built on the spot: no test of this folder needs a network."""

import copy
import functools
import gc
import inspect
import json
import os
import shutil
import sys
import threading
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
import trl
from datasets import Dataset
from hub_server import HubServer
from huggingface_hub import constants
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

import trl_prime
from trl_prime import ImplicitPRM, PRIMEConfig, PRIMETrainer
from trl_prime.advantages import RolloutRewards
from trl_prime.implicit_prm.updater import PRMUpdater
from trl_prime.process_rewards import reward_positions

torch.set_num_threads(1)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TRAINER_ARGUMENTS = (
    {*inspect.signature(PRIMETrainer.__init__).parameters} | {*inspect.signature(GRPOTrainer.__init__).parameters}
) - {"self", "args", "grpo_args", "grpo_kwargs"}


def pytest_collection_finish():
    """Every run collects garbage: leave the libraries that are loaded by now out of it, which halves the time of the tests."""
    gc.collect()
    gc.freeze()


def build_tokenizer(characters="0123456789+=:\nabcdefghijklmnopqrstuvwxyz "):
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed=0, vocab_size=44, scale=1.0):
    """A causal LM of 20k parameters. `scale` > 1 makes its distributions far from uniform."""
    return copy.deepcopy(_build_model(seed, vocab_size, scale))


@functools.cache
def _build_model(seed, vocab_size, scale):
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


def slow_log_probs(model, prompt_ids, prompt_mask, completion_ids, completion_mask, temperature=1.0):
    """(B, T) log-probabilities of the completions, row by row without padding, from the logits of all positions."""
    result = torch.zeros(completion_ids.shape)
    for row in range(len(prompt_ids)):
        prompt = prompt_ids[row][prompt_mask[row].bool()]
        completion = completion_ids[row][completion_mask[row].bool()]
        if len(completion):
            logits = model(torch.cat([prompt, completion])[None]).logits[0].float() / temperature
            logps = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
            result[row, : len(completion)] = logps.gather(1, completion[:, None])[:, 0]
    return result


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first, second):
    """Bit-identical state."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def distance(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


def logged(trainer, key):
    """All logged values of a metric, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def parity_reward(completion_ids, **kwargs):
    """Right for about half of what an untrained model writes."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def row_rewards(values, name="row_reward"):
    """A reward function that judges by the place in the batch."""

    def reward(completions, **kwargs):
        return [values[i % len(values)] for i in range(len(completions))]

    reward.__name__ = name
    return reward


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_path(tokenizer, tmp_path_factory):
    """A folder with a model and its tokenizer."""
    folder = str(tmp_path_factory.mktemp("model"))
    build_model(7, scale=4.0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def random_prm(tokenizer):
    """A PRM that is far from its reference, so that process rewards are large from the first step."""

    def build(**kwargs):
        reference = build_model(2, scale=4.0).requires_grad_(False)
        return ImplicitPRM(build_model(1, scale=4.0), reference, tokenizer, **{"beta": 0.5, **kwargs})

    return build


@pytest.fixture
def make_config(tmp_path):
    def make(**settings):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 8,
            "max_completion_length": 8,
            "max_steps": 2,
            "logging_steps": 1,
            "report_to": [],
            "learning_rate": 1e-3,
            "prm_learning_rate": 1e-3,
            "prm_beta": 0.5,
            "prm_trust_weighting": False,
            "accuracy_low": 0.0,
            "accuracy_high": 1.0,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        return PRIMEConfig(**{**defaults, **settings})

    return make


@pytest.fixture
def make_trainer(make_config, tokenizer):
    """
    A PRIMETrainer from settings and trainer arguments. Its `outputs` collect what PRIME hands to TRL's policy loss.
    """

    def make(**kwargs):
        arguments = {name: kwargs.pop(name) for name in list(kwargs) if name in TRAINER_ARGUMENTS}
        rows = [{"prompt": f"{i}+{'1' * (i % 3)}{i % 7}=", "target": i % 2} for i in range(40)]
        defaults = {
            "model": build_model,
            "reward_funcs": parity_reward,
            "train_dataset": Dataset.from_list(rows),
            "processing_class": tokenizer,
        }
        arguments = {**defaults, **arguments}
        if arguments["model"] is build_model:
            arguments["model"] = build_model()
        trainer = PRIMETrainer(args=make_config(**kwargs), **arguments)
        trainer.outputs = []
        generate_and_score = trainer._generate_and_score_completions

        def recorded(inputs):
            output = generate_and_score(inputs)
            trainer.outputs.append(dict(output))
            return output

        trainer._generate_and_score_completions = recorded
        return trainer

    return make


@pytest.fixture
def train(make_trainer):
    """Build a PRIMETrainer, train, and return it."""

    def run(resume_from_checkpoint=None, **kwargs):
        trainer = make_trainer(**kwargs)
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        return trainer

    return run


# --- Code for readers: docs and examples ---

SHORT = {"max_completion_length": 4, "max_steps": 1, "gradient_accumulation_steps": 1}
QUIET = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}


@pytest.fixture(scope="session")
def run_path(model_path, tmp_path_factory):
    """The folder of a finished run with adapters."""
    folder = str(tmp_path_factory.mktemp("runs") / "my-run")
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    trainer = PRIMETrainer(
        model_path,
        parity_reward,
        PRIMEConfig(folder, per_device_train_batch_size=8, logging_steps=1, **{**SHORT, **QUIET, "max_steps": 2}),
        Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}+{i}="}]} for i in range(8)]),
        peft_config=adapter,
        prm_peft_config=adapter,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return folder


@pytest.fixture
def stand_ins(tmp_path, monkeypatch, model_path, run_path):
    """
    A folder to run in where the names of models, runs and data sets are those of tiny local ones, which is where `from_pretrained`
    and `load_dataset` look first, and configurations of TRL and PRIME whose runs are short.
    """
    monkeypatch.chdir(tmp_path)
    Path("Qwen").mkdir()
    for name in ("Qwen2.5-0.5B-Instruct", "Qwen2.5-Coder-0.5B-Instruct"):
        os.symlink(model_path, f"Qwen/{name}")
    shutil.copytree(run_path, "runs/my-run")
    sums = [{"prompt": [{"role": "user", "content": f"{i}+{i}="}], "solution": str(2 * i)} for i in range(8)]
    gsm8k = [{"question": f"{i}+{i}=?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in range(8)]
    mbpp = [
        {
            "task_id": i,
            "text": f"Add {i}.",
            "code": f"def f(x): return x + {i}",
            "test_list": [f"assert f(1) == {i + 1}"],
        }
        for i in range(8)
    ]
    for folder, config, rows in (
        ("trl-lib/DeepMath-103K", "default", sums),
        ("openai/gsm8k", "main", gsm8k),
        ("google-research-datasets/mbpp", "full", mbpp),
    ):
        Path(folder).mkdir(parents=True)
        splits = [f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "test")]
        for split in ("train", "test"):
            Path(folder, f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        front = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{''.join(splits)}---\n"
        Path(folder, "README.md").write_text(front)
    for package, name, config in ((trl_prime, "PRIMEConfig", PRIMEConfig), (trl, "GRPOConfig", GRPOConfig)):
        short = functools.partial(_short, config)
        monkeypatch.setattr(package, name, short, raising=False)


def _short(config, *args, **kwargs):
    return config(*args, **{**kwargs, **SHORT, **QUIET})


@pytest.fixture
def rollout_rewards():
    """A batch of four completions as a hook gets it: one is not judged, one has no token."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    return RolloutRewards(
        outcome_rewards=torch.tensor([1.0, 0.0, float("nan"), 1.0]),
        process_rewards=torch.randn(4, 4),
        completion_mask=mask,
        reward_mask=reward_positions(mask, "whole"),
        num_generations=2,
        settings={"estimator": "reinforce", "process_weight": 0.3, "process_gamma": 0.9, "whiten": False},
    )


@pytest.fixture(scope="module")
def benchmarks():
    """The folder of the benchmarks, on the path: they import each other by bare names."""
    folder = Path(__file__).parents[1] / "benchmarks"
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def hub(monkeypatch, tmp_path, model_path):
    """The server, with a model `me/base`; the libraries of this process are its clients, logged in as `me`."""
    server = HubServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    caches = iter(range(100))

    def clean_cache():
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache{next(caches)}"))
        server.requests.clear()

    server.clean_cache = clean_cache
    clean_cache()
    huggingface_hub.create_repo("me/base")
    files = {path.name: path.read_bytes() for path in Path(model_path).iterdir()}
    server.commit("me/base", "main", "model", files)
    yield server
    server.shutdown()
    server.server_close()


class Recorder:
    """A hook that changes nothing, and a reward function that sees the PRM before each batch."""

    def __init__(self, reward_func=parity_reward):
        self.rewards, self.before, self.after, self.trainer, self.reward_func = [], [], [], None, reward_func

    def hook(self, rewards):
        self.rewards.append(rewards)
        self.after.append(copy.deepcopy(self.trainer.implicit_prm.model))
        return rewards.combine()

    def reward(self, **kwargs):
        self.before.append(copy.deepcopy(self.trainer.implicit_prm.model))
        return self.reward_func(**kwargs)


@pytest.fixture
def record(make_trainer):
    def run(reward_func=parity_reward, extra_reward_funcs=(), **kwargs):
        recorder = Recorder(reward_func)
        trainer = make_trainer(
            reward_funcs=[recorder.reward, *extra_reward_funcs],
            reward_combination=recorder.hook,
            **{"process_reward_norm": "none", **kwargs},
        )
        recorder.trainer = trainer
        trainer.train()
        return recorder

    return run


@pytest.fixture
def updates(monkeypatch):
    """The batches that the PRM is updated on."""
    seen, update = [], PRMUpdater.update

    def recorded(self, batch):
        seen.append(batch)
        return update(self, batch)

    monkeypatch.setattr(PRMUpdater, "update", recorded)
    return seen


@pytest.fixture
def one_thread():
    """Tiny models are trained faster by one thread, and two runs of them give the same weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
