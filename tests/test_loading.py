"""Saved PRMs and policies as they come back: data type, architecture, adapters and their base, settings of the run that takes them."""

import json
import shutil

import pytest
import torch
from conftest import build_model, same
from datasets import Dataset
from helpers import ragged_batch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_prime import ImplicitPRM, OfflinePRMConfig, OfflinePRMTrainer
from trl_prime.evaluation.process_bench import score_steps
from trl_prime.evaluation.sampling import load_policy
from trl_prime.implicit_prm.files import saved_weights
from trl_prime.implicit_prm.loading import load_adapter, load_model

PROMPTS, COMPLETIONS = ["1+1=", "23+4="], ["2\nabcdefgh 33", "27 zz hello 123456789"]


def lora(**kwargs):
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **kwargs)


def build_qwen3_5():
    """A model of text and pictures, which `AutoModelForCausalLM` reads as another class with other names of weights."""
    qwen3_5 = pytest.importorskip("transformers.models.qwen3_5", reason="transformers has no Qwen3.5 yet")
    text = {
        "vocab_size": 44,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 1.0,
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 14,
        "num_position_embeddings": 16,
    }
    ids = {"image_token_id": 40, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43}
    config = qwen3_5.Qwen3_5Config(text_config=text, vision_config=vision, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = qwen3_5.Qwen3_5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    return model.eval()


def unmoved_prm(folder, tokenizer, file_dtype, peft_config=None, dtype=torch.float32):
    """The folder of a float32 PRM equal to its reference, whose files have another data type."""
    base = str(folder / "base")
    build_model(7, scale=4.0).to(file_dtype).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    prm = ImplicitPRM.from_model(model, tokenizer, peft_config=peft_config, reference_name=base)
    prm.save_pretrained(folder / "prm")
    return str(folder / "prm"), base


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("file_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_prm_that_equals_its_reference_scores_zero(tmp_path, tokenizer, file_dtype, adapter):
    folder, base = unmoved_prm(tmp_path, tokenizer, file_dtype, lora() if adapter else None)

    other = AutoModelForCausalLM.from_pretrained(base, dtype=file_dtype)
    for reference in (None, base, other):
        prm = ImplicitPRM.from_pretrained(folder, reference=reference)

        assert prm.model.dtype == prm.reference.dtype == torch.float32
        for scored in prm.score(PROMPTS, COMPLETIONS):
            assert not scored.token_rewards.any() and scored.ref_logps.all()
        assert score_steps(prm, PROMPTS[:1], [["2", "abc"]]) == [[0.0, 0.0]]
    assert other.dtype == file_dtype, "the instance was changed"
    prm = ImplicitPRM.from_pretrained(folder, dtype="bfloat16")
    assert prm.model.dtype == prm.reference.dtype == torch.bfloat16
    assert not any(scored.token_rewards.any() for scored in prm.score(PROMPTS, COMPLETIONS))


def test_model_and_reference_of_two_data_types_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"torch.float32 and its reference torch.bfloat16"):
        ImplicitPRM(build_model(), build_model().to(torch.bfloat16), tokenizer)


def test_a_run_takes_a_saved_prm_by_its_own_arguments(tmp_path, tokenizer, make_trainer, model_path):
    folder, _ = unmoved_prm(tmp_path, tokenizer, torch.bfloat16, dtype=torch.bfloat16)
    settings = {"prm_beta": 0.3, "process_reward_step_delimiter": "+"}

    prm = make_trainer(model=model_path, prm_model=folder, **settings).implicit_prm

    assert prm.model.dtype == prm.reference.dtype == torch.float32
    assert (prm.beta, prm.step_delimiter) == (0.3, "+")
    prm = make_trainer(
        model=model_path,
        prm_model=folder,
        prm_model_init_kwargs={"attn_implementation": "eager", "dtype": "bfloat16"},
    ).implicit_prm
    assert prm.model.dtype == prm.reference.dtype == torch.bfloat16
    assert prm.model.config._attn_implementation == prm.reference.config._attn_implementation == "eager"


def test_unset_rates_and_scale_follow_the_models_of_a_run(tmp_path, tokenizer, make_trainer, model_path):
    folder, _ = unmoved_prm(tmp_path, tokenizer, torch.float32)
    unset = {"learning_rate": None, "prm_learning_rate": None, "prm_beta": None}
    trainer = make_trainer(model=model_path, prm_model=folder, peft_config=lora(), **unset)
    assert (trainer.args.learning_rate, trainer.args.prm_learning_rate) == (1e-5, 1e-5)
    assert trainer.implicit_prm.beta == trainer.args.prm_beta == 0.05

    trainer = make_trainer(model=model_path, peft_config=lora(), prm_peft_config=lora(), max_steps=1, **unset)
    assert trainer.implicit_prm.beta == trainer.args.prm_beta == 0.5
    trainer.train()
    for model, rate in ((trainer.model, 1e-5), (trainer.implicit_prm.model, 1e-4)):
        # The first step of Adam moves each weight by its rate, and these begin at zero
        moved = [weights.detach().abs().max().item() for name, weights in model.named_parameters() if "lora_B" in name]
        assert max(moved) == pytest.approx(rate, rel=0.05)


@pytest.mark.parametrize("start", ["path", "instance"])
def test_what_was_trained_from_a_relative_path_loads_from_any_folder(
    tmp_path, monkeypatch, train, model_path, tokenizer, start
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(model_path, "model")
    model = "./model" if start == "path" else AutoModelForCausalLM.from_pretrained("./model", dtype=torch.float32)
    trainer = train(model=model, peft_config=lora(), prm_peft_config=lora(), save_strategy="steps", max_steps=1)
    trainer.save_model()
    monkeypatch.chdir("/")
    base, prompt = str(tmp_path / "here" / "model"), torch.tensor([[5, 6, 7]])
    run = tmp_path / "run"
    trained = trainer.model.eval()(prompt).logits
    for folder in (run, run / "checkpoint-1"):
        adapters = (folder, folder / "prm" / "adapter") if start == "path" else (folder,)
        for adapter in adapters:
            assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == base
        for load in (AutoModelForCausalLM.from_pretrained, AutoPeftModelForCausalLM.from_pretrained, load_policy):
            torch.testing.assert_close(load(str(folder), dtype=torch.float32).eval()(prompt).logits, trained)
        assert ImplicitPRM.from_pretrained(folder).score(PROMPTS, COMPLETIONS)


def test_a_prm_measured_against_the_policy_names_its_start_by_an_absolute_path(
    tmp_path, monkeypatch, train, model_path
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(model_path, "model")
    train(model="model", prm_reference="policy", max_steps=1).save_model()
    monkeypatch.chdir("/")
    assert ImplicitPRM.from_pretrained(tmp_path / "run").reference_name == str(tmp_path / "here" / "model")


def test_replaced_settings_are_told_with_both_values(random_prm, monkeypatch):
    told = []
    monkeypatch.setattr("trl_prime.implicit_prm.model.logger.warning", told.append)
    prm = random_prm(beta=0.2, step_delimiter="+")

    prm.use_settings(beta=0.3, step_delimiter="+", micro_batch_size=2)

    assert len(told) == 1 and "beta 0.2" in told[0] and "0.3" in told[0]
    assert (prm.beta, prm.micro_batch_size) == (0.3, 2)


def test_offline_training_takes_a_saved_prm_in_one_data_type(tmp_path, tokenizer):
    folder, _ = unmoved_prm(tmp_path, tokenizer, torch.bfloat16)
    rows = [{"prompt": "1+1=", "completion": str(i), "label": float(i == 2)} for i in range(4)]
    args = OfflinePRMConfig(
        str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        model_init_kwargs={"attn_implementation": "eager"},
    )

    prm = OfflinePRMTrainer(folder, args, Dataset.from_list(rows)).implicit_prm

    assert prm.model.dtype == prm.reference.dtype == torch.float32
    assert prm.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_prm_is_loaded_as_the_class_that_was_trained(tmp_path, tokenizer, adapter):
    base = str(tmp_path / "base")
    built = build_qwen3_5()
    built.save_pretrained(base)
    model = load_model(base)
    assert type(model) is type(built)
    prm = ImplicitPRM.from_model(model, tokenizer, peft_config=lora() if adapter else None, reference_name=base)
    with torch.no_grad():
        for name, parameter in prm.model.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "q_proj" in name):
                parameter.add_(1.0)
    batch = ragged_batch()
    expected, reference = prm.log_probs(*batch), prm.reference_log_probs(*batch)
    assert (expected - reference).abs().max() > 0.1
    prm.save_pretrained(tmp_path / "prm")

    loaded = ImplicitPRM.from_pretrained(tmp_path / "prm")

    torch.testing.assert_close(loaded.log_probs(*batch), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(loaded.reference_log_probs(*batch), reference, atol=1e-5, rtol=0)
    weights = saved_weights(prm.model, tmp_path / "prm")
    state = prm.model.state_dict()
    assert weights and all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    if not adapter:
        assert same(weights, state)
        assert type(load_policy(str(tmp_path / "prm"), device_map="cpu")) is type(built)


def test_an_adapter_that_does_not_fit_is_an_error(tmp_path):
    base = str(tmp_path / "base")
    build_qwen3_5().save_pretrained(base)
    get_peft_model(load_model(base), lora()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not fit its base model, a Qwen3_5ForCausalLM"):
        load_adapter(load_model(base, "Qwen3_5ForCausalLM"), tmp_path / "adapter")
    assert load_adapter(load_model(base), tmp_path / "adapter").active_adapter == "default"

    half = get_peft_model(build_model(), lora(layers_to_transform=[0]))
    half.save_pretrained(tmp_path / "half")
    settings = tmp_path / "half" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "layers_to_transform": [0, 1]}))
    with pytest.raises(ValueError, match="are not in it"):
        load_adapter(build_model(), tmp_path / "half")
