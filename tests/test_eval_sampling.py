"""Samples by their own seeds, and rows that survive an interruption."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import build_model
from peft import IA3Config, LoraConfig, get_peft_model

from trl_prime.evaluation.resumable import ResumableRows, model_version
from trl_prime.evaluation.sampling import (
    SamplingSettings,
    SeededSampling,
    TransformersSampler,
    VLLMSampler,
    load_policy,
    load_tokenizer,
    sample_seed,
)

PROMPTS = [[{"role": "user", "content": text}] for text in ("1+1=", "what is 12+30", "2")]


def sampler(tokenizer, **settings):
    return TransformersSampler(
        build_model(7, scale=4.0), tokenizer, SamplingSettings(**{"max_new_tokens": 12, **settings})
    )


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(tokenizer):
    sample = sampler(tokenizer)
    together = sample(PROMPTS, [1, 2, None])
    assert together == [sample([prompt], [seed])[0] for prompt, seed in zip(PROMPTS, [1, 2, None], strict=True)]
    assert sample(PROMPTS[:1] * 4, [1, 2, 3, 1])[0] == together[0]
    assert len({s.text for s in sample(PROMPTS[:1] * 4, [1, 2, 3, 4])}) > 1


def plain_generate(tokenizer, **kwargs):
    """The texts that `generate` of transformers makes of the prompts."""
    rendered = tokenizer.apply_chat_template(PROMPTS, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(rendered, return_tensors="pt", padding=True, padding_side="left")
    ids = build_model(7, scale=4.0).generate(**inputs, max_new_tokens=12, pad_token_id=0, **kwargs)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_no_seed_is_greedy(tokenizer):
    samples = sampler(tokenizer, temperature=0.5)(PROMPTS, [None] * 3)
    assert [s.text for s in samples] == plain_generate(tokenizer, do_sample=False)


def test_one_stream_samples_as_transformers_does(tokenizer):
    torch.manual_seed(5)
    expected = [plain_generate(tokenizer, do_sample=True, temperature=0.8, top_k=0) for _ in range(2)]
    stream, sample = torch.Generator().manual_seed(5), sampler(tokenizer, temperature=0.8)
    assert [[s.text for s in sample(PROMPTS, stream)] for _ in range(2)] == expected
    assert expected[0] != expected[1]


def test_samples_follow_the_distribution_of_the_model():
    logits = torch.tensor([[2.0, 0.0, 1.0, float("-inf")]]).repeat(4000, 1)
    chosen = SeededSampling(range(4000), torch.device("cpu"))(None, logits).argmax(dim=1)
    frequencies = torch.bincount(chosen, minlength=4) / 4000
    assert torch.allclose(frequencies, logits[0].softmax(dim=0), atol=0.025)


def test_temperature_and_truncated_distributions(tokenizer):
    greedy = sampler(tokenizer)(PROMPTS, [None] * 3)
    for settings in ({"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}):
        assert sampler(tokenizer, **settings)(PROMPTS, [5, 6, 7]) == greedy, settings


def test_length_and_truncation(tokenizer):
    model = build_model(7, scale=4.0)
    samples = TransformersSampler(model, tokenizer, SamplingSettings(40))(PROMPTS[:1] * 16, list(range(16)))
    ended = [s for s in samples if not s.truncated]
    assert ended and len(ended) < 16
    assert all(s.num_tokens == 40 for s in samples if s.truncated)
    # Every token but the last is a character of the text, or special
    assert all(len(s.text) < s.num_tokens <= 40 for s in ended)


def test_the_models_generation_defaults_are_dropped(tokenizer):
    model = build_model(7, scale=4.0)
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.suppress_tokens = list(range(20))
    settings = SamplingSettings(12)
    expected = sampler(tokenizer)(PROMPTS, [1, 2, 3])
    defaults = model.train().generation_config
    assert TransformersSampler(model, tokenizer, settings)(PROMPTS, [1, 2, 3]) == expected
    assert model.training and model.generation_config is defaults, "the model is left as it was"


def test_seeds_differ_by_run_problem_and_sample():
    seeds = {sample_seed(seed, p, s) for seed in range(3) for p in range(20) for s in range(20)}
    assert len(seeds) == 1200 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.fixture(scope="module")
def adapter_path(model_path, tmp_path_factory):
    """A LoRA adapter that changes its base a lot."""
    folder = str(tmp_path_factory.mktemp("adapter"))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    base = load_policy(model_path, dtype="float32")
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = model_path
    model.save_pretrained(folder)
    load_tokenizer(model_path).save_pretrained(folder)
    return folder


def test_an_adapter_is_loaded_with_its_base(adapter_path, model_path):
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        adapted, base = (load_policy(path, dtype="float32")(ids).logits for path in (adapter_path, model_path))
        from peft import AutoPeftModelForCausalLM

        expected = AutoPeftModelForCausalLM.from_pretrained(adapter_path, dtype="float32")(ids).logits
    assert torch.allclose(adapted, expected, atol=1e-3) and not torch.allclose(adapted, base, atol=0.1)


def test_an_adapter_without_a_tokenizer_has_its_bases(adapter_path, tmp_path, model_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(Path(adapter_path) / name, tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template == load_tokenizer(model_path).chat_template


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for vLLM that remembers how it was called: what is tested is the wiring, not the engine."""
    calls = []

    class LLM:
        def __init__(self, **kwargs):
            calls.append(kwargs)

        def generate(self, prompts, params, **kwargs):
            calls.append((prompts, params, kwargs))
            completions = [types.SimpleNamespace(token_ids=[5, 6, 1], finish_reason="stop") for _ in prompts]
            completions[0] = types.SimpleNamespace(token_ids=[5] * 4, finish_reason="length")
            return [types.SimpleNamespace(outputs=[completion]) for completion in completions]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, lambda **kwargs: kwargs
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda *arguments: arguments
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.lora", types.ModuleType("vllm.lora"))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    return calls


def test_vllm_is_given_tokens_and_a_seed_for_each_prompt(vllm, tokenizer, adapter_path, model_path):
    settings = SamplingSettings(4, temperature=0.7, top_p=0.9)
    samples = VLLMSampler(model_path, tokenizer, settings, dtype="auto")(PROMPTS, [None, 11, 12])
    engine, (requests, params, options) = vllm
    assert engine == {"model": model_path, "revision": None, "dtype": "auto"}
    # The tokens of the rendered prompt, without padding
    rendered = tokenizer.apply_chat_template(PROMPTS, add_generation_prompt=True, tokenize=False)
    assert [r["prompt_token_ids"] for r in requests] == [tokenizer(text).input_ids for text in rendered]
    assert params[0] == {"max_tokens": 4, "temperature": 0.0}
    assert params[1] == {"max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "seed": 11}
    assert params[2]["seed"] == 12 and options["lora_request"] is None
    assert [(s.text, s.num_tokens, s.truncated) for s in samples[:2]] == [("2222", 4, True), ("23", 3, False)]
    VLLMSampler(adapter_path, tokenizer, settings)(PROMPTS, [1, 2, 3])
    assert vllm[2]["model"] == model_path and vllm[2]["enable_lora"] and vllm[2]["max_lora_rank"] == 8
    assert vllm[3][2]["lora_request"] == ("adapter", 1, adapter_path)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [({"r": 1}, 8), ({"r": 8}, 8), ({"r": 16}, 16), ({"r": 24}, 32), ({"r": 4, "rank_pattern": {"q_proj": 33}}, 64)],
)
def test_vllm_makes_room_for_the_largest_rank_of_an_adapter(vllm, tokenizer, model_path, tmp_path, ranks, expected):
    LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=model_path, **ranks).save_pretrained(str(tmp_path))
    VLLMSampler(str(tmp_path), tokenizer, SamplingSettings(4))
    assert vllm[0]["max_lora_rank"] == expected


def test_vllm_is_given_no_adapter_that_it_does_not_take(vllm, tokenizer, model_path, tmp_path):
    IA3Config(task_type="CAUSAL_LM", base_model_name_or_path=model_path).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="use_vllm is true, but the adapter is IA3, and vLLM takes LoRA only"):
        VLLMSampler(str(tmp_path), tokenizer, SamplingSettings(4))
    assert vllm == []


def test_rows_are_read_again_and_a_half_written_line_is_cut_off(tmp_path):
    path = tmp_path / "run" / "rows.jsonl"
    ResumableRows(path, {"a": 1}).append([{"i": 0, "text": "é\n"}, {"i": 1}])
    complete = path.read_bytes()
    for rest in (b'{"i": 2, "te', b'{"i": 2}', '{"text": "é'.encode()[:-1], b"\x00\x00\n"):
        path.write_bytes(complete + rest)
        rows = ResumableRows(path, {"a": 1})
        assert rows.rows == [{"i": 0, "text": "é\n"}, {"i": 1}] and path.read_bytes() == complete
    rows.append([{"i": 2}])
    rows.cut(1)
    rows.append([{"i": 9}])
    assert [row["i"] for row in ResumableRows(path, {"a": 1}).rows] == [0, 9]


def test_rows_of_other_settings_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    ResumableRows(path, {"a": 1, "b": [1]}).append([{"i": 0}])
    with pytest.raises(ValueError, match=r"^b is \[2\], but .* was made with \[1\].*overwrite"):
        ResumableRows(path, {"a": 1, "b": [2]})
    with pytest.raises(ValueError, match="^c is 3"):
        ResumableRows(path, {"a": 1, "b": [1], "c": 3})
    assert ResumableRows(path, {"a": 2}, overwrite=True).rows == []
    assert json.loads((tmp_path / "rows.settings.json").read_text()) == {"a": 2}
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="other.settings.json"):
        ResumableRows(tmp_path / "other.jsonl", {"a": 1})


def test_a_model_that_was_trained_on_is_another_version(tmp_path):
    build_model(0).save_pretrained(tmp_path)
    first = model_version(tmp_path)
    (tmp_path / "samples.jsonl").write_text("")
    assert model_version(tmp_path) == first
    build_model(1).save_pretrained(tmp_path)
    second = model_version(tmp_path)
    assert second != first
    (tmp_path / "implicit_prm.json").write_text("{}")
    assert model_version(tmp_path) not in (first, second)
    assert model_version("nobody/no-model") is None
