"""Images reach PRM and reference: each row its own, wherever rows go, and as the policy saw them."""

import functools
import logging
import math
import operator
import re

import pytest
import torch

pytest.importorskip("transformers", "5.13", reason="tiny processors cannot be built with older ones")

from accelerate.utils import DistributedType
from conftest import build_model, distance, logged, row_rewards, same, weights
from datasets import Dataset
from helpers import lora, make_trained
from peft import get_peft_model
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid
from vision import CLASSES, build_vision_model, picture

from trl_prime import ImplicitPRM, PRIMETrainer, images
from trl_prime.checks import check_sharded_heads
from trl_prime.cli import main
from trl_prime.commands import launching
from trl_prime.commands.score import read_rows
from trl_prime.data.adapters import adapt_dataset
from trl_prime.data.formats import PROMPT_FEATURES, PROMPT_SUFFIXES
from trl_prime.images import IMAGES, RowImages, images_by_row, in_trl_form, without_empty_images
from trl_prime.implicit_prm.adapters import below_last_layers
from trl_prime.implicit_prm.backends import DataParallel
from trl_prime.implicit_prm.logps import batch_completion_logps, can_fuse_lm_head, completion_logps, fuse_lm_head
from trl_prime.implicit_prm.trunk import TrunkStates, shared_trunk
from trl_prime.offline_prm.data import load_outcome_dataset
from trl_prime.texts import encode_prompt

# Images of different sizes, several in a row, none, and the same question with others
PICTURES = ([(16, 24)], [(8, 8), (16, 16)], [], [(32, 16)], [(16, 16)], [], [(24, 32), (8, 16)])
# One model of each layout of images
LAYOUTS = ("qwen3-vl", "gemma3", "smolvlm")
QUESTIONS = ("abc", "what is it", "1+1=", "a", "what is it", "ba", "1+2=")


def example(processor, pictures=PICTURES, seed=0, num_tokens=7):
    """Rollouts as TRL returns them, and what a forward pass over each row alone takes."""
    generator = torch.Generator().manual_seed(seed)
    images = [[picture(10 * i + j, *size) for j, size in enumerate(sizes)] for i, sizes in enumerate(pictures)]
    messages = [
        prepare_multimodal_messages([{"role": "user", "content": question}], images=shown)
        for question, shown in zip(QUESTIONS, images, strict=False)
    ]
    texts = [processor.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages]
    prompts = processor(images=images, text=texts, padding=True, return_tensors="pt", padding_side="left")
    completion_ids = torch.randint(3, 40, (len(images), num_tokens), generator=generator)
    lengths = torch.randint(1, num_tokens + 1, (len(images), 1), generator=generator)
    output = {
        "prompt_ids": prompts.pop("input_ids"),
        "prompt_mask": prompts.pop("attention_mask"),
        "completion_ids": completion_ids,
        "completion_mask": (torch.arange(num_tokens) < lengths).long(),
        **prompts,
        "num_images": [len(shown) for shown in images],
    }
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in output:
            output[name] = torch.cat([output[name], torch.zeros_like(completion_ids)], dim=1)
    alone = [
        processor(images=[shown] if shown else None, text=[text], return_tensors="pt")
        for shown, text in zip(images, texts, strict=True)
    ]
    return output, alone


def text_of(output):
    return tuple(output[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"))


def inputs_of(output):
    output = images_by_row(output)
    return (*text_of(output), output[IMAGES])


@torch.no_grad()
def slow_logps(model, output, alone):
    """Log-probabilities row by row, by a plain pass without padding over what the processor makes of the row alone."""
    result = torch.zeros(output["completion_ids"].shape)
    for row, inputs in enumerate(alone):
        ids = output["completion_ids"][row][output["completion_mask"][row].bool()]
        inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        prompt = inputs.pop("input_ids")
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.zeros(1, len(ids), dtype=torch.long)], dim=1)
        logits = model(input_ids=torch.cat([prompt, ids[None]], dim=1), **inputs).logits[0, prompt.shape[1] - 1 : -1]
        result[row, : len(ids)] = logits.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return result


@pytest.fixture(params=CLASSES)
def case(request):
    model, processor = build_vision_model(request.param)
    output, alone = example(processor)
    return model, output, slow_logps(model, output, alone)


@pytest.mark.parametrize("head", ["tiled", "fused"])
def test_log_probs_of_rows_are_those_of_a_plain_pass_with_their_images(case, head):
    model, output, expected = case
    if head == "fused":
        if not can_fuse_lm_head(model):
            pytest.skip("TRL before 1.15 has no fused head")
        fuse_lm_head(model)
    inputs = inputs_of(output)
    for size in (1, 3, 7):
        logps = batch_completion_logps(model, *inputs[:4], size, inputs[4])
        torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)
    # The same rows shown nothing, and shown negatives
    shown = inputs[4].is_shown
    assert shown.tolist() == [bool(sizes) for sizes in PICTURES]
    negatives = [{**row, "pixel_values": -row["pixel_values"]} for row in inputs[4].rows]
    for others in (None, RowImages(negatives)):
        logps = batch_completion_logps(model, *inputs[:4], 3, others)
        torch.testing.assert_close(logps[~shown], expected[~shown], atol=1e-4, rtol=0)
        assert (logps - expected).abs().amax(1)[shown].min() > 1e-3


def test_gradients_are_those_of_one_row_at_a_time(case):
    model, output, _ = case
    inputs, found = inputs_of(output), []
    for chunks in ([torch.arange(7)], torch.arange(7).split(1)):
        model.zero_grad()
        for rows in chunks:
            completion_logps(model, *(values[rows] for values in inputs)).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert any("vis" in name and gradient.any() for name, gradient in found[0].items())
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


# --- Layouts: from TRL's and back, and rows that change their process ---


def same_inputs(first, second):
    assert first.keys() == second.keys()
    for name, values in first.items():
        if isinstance(values, torch.Tensor):
            assert torch.equal(values, second[name]), name
        else:
            assert values == second[name], name


@pytest.fixture(params=CLASSES)
def rollouts(request):
    return example(build_vision_model(request.param)[1])[0]


def test_rows_go_back_to_what_trl_had(rollouts):
    by_row = images_by_row(rollouts)
    assert not any(name.startswith(("pixel", "image_", "num_", "token_", "mm_")) for name in by_row)
    back = in_trl_form(by_row)
    if rollouts["pixel_values"].ndim == 5:
        rollouts["num_images"] = [1] * 7  # entries of a row: in this layout TRL would not know by the number of images
    same_inputs(back, rollouts)


def test_selected_rows_are_cut_by_trl_between_rows(rollouts):
    """Each micro-batch that TRL cuts of some shuffled rows has what the processor makes of these alone."""
    model_inputs = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "token_type_ids", "mm_token_type_ids")
    by_row = images_by_row(rollouts)
    kept = torch.tensor([4, 2, 5, 2, 0, 6])
    selected = {name: value[kept] for name, value in by_row.items()}
    batch = split_pixel_values_by_grid(in_trl_form(selected))
    for i, cut in enumerate(split_tensor_dict(batch, 3)):
        cut = without_empty_images(unsplit_pixel_values_by_grid(cut))
        pair = {name: value[kept[2 * i : 2 * i + 2]] for name, value in by_row.items()}
        expected = in_trl_form(pair)
        for name in model_inputs:
            assert (name in cut) == (name in expected)
        for name in {*model_inputs} & {*cut}:
            if name.startswith("pixel_") and cut["pixel_values"].ndim == 5:
                # Filled up by empty images to as many as other rows have
                num_own = expected[name].shape[1]
                assert not cut[name][:, num_own:].any()
                cut[name] = cut[name][:, :num_own]
            assert torch.equal(cut[name], expected[name]), name


def test_completions_of_one_prompt_share_their_images():
    output = images_by_row(example(build_vision_model("qwen2.5-vl")[1])[0])
    repeated = {name: value[torch.tensor([0, 0, 0, 1, 1, 1])] for name, value in output.items()}
    images = images_by_row(in_trl_form(repeated))[IMAGES]
    for kept in (images, images.on_cpu()):
        for row, expected in zip(kept.rows, repeated[IMAGES].rows, strict=True):
            same_inputs(row, expected)
        assert len({row["pixel_values"].data_ptr() for row in kept.rows}) == 2
        # A copy holds nothing of the batch that it comes from
        own = all(row["pixel_values"].untyped_storage().nbytes() == row["pixel_values"].nbytes for row in kept.rows)
        assert own is (kept is not images)


# --- The trunk ---


def adapted(name):
    model, processor = build_vision_model(name)
    adapter = lora(layers_to_transform=[2])  # the vision towers have two layers
    prm = ImplicitPRM.from_model(model, processor.tokenizer, peft_config=adapter, micro_batch_size=3)
    make_trained(prm.model)
    return prm, inputs_of(example(processor)[0])


@pytest.mark.parametrize("name", CLASSES)
def test_a_skipped_trunk_does_not_change_what_is_seen(name):
    prm, inputs = adapted(name)
    trunk = shared_trunk(prm, tuple(values[:3] for values in inputs))
    assert len(trunk.layers) == 2
    plain, reference = prm.log_probs(*inputs), prm.reference_log_probs(*inputs)
    assert (plain - reference).abs().max() > 1e-3
    states = TrunkStates(trunk, inputs[1], inputs[3])
    prm.reference_log_probs(*inputs, around=states.keep)
    torch.testing.assert_close(prm.log_probs(*inputs, around=states.use), plain, atol=1e-5, rtol=0)


def test_a_trunk_that_may_be_skipped_for_text_only_is_not(train_shown, monkeypatch, caplog):
    """A last layer that looks back at the first one where the model sees an image."""
    logging.getLogger("transformers").propagate = True
    build = PRIMETrainer._build_prm

    def build_looking_back(*args):
        prm = build(*args)
        for model in (prm.model.get_base_model(), prm.reference):
            kept = []
            layers = model.model.language_model.layers
            model.model.visual.register_forward_hook(lambda *_, kept=kept: kept.append(None))
            layers[0].register_forward_hook(lambda m, a, output, kept=kept: kept.append(output) if kept else None)
            layers[2].register_forward_hook(
                lambda m, a, output, kept=kept: (output + kept.pop(), kept.clear())[0] if kept else None
            )
        return prm

    settings = {"prm_peft_config": lora(layers_to_transform=[2]), "prm_learning_rate": 0.1}
    assert train_shown("qwen2.5-vl", **settings).prm_learner.trunk is not None
    monkeypatch.setattr(PRIMETrainer, "_build_prm", build_looking_back)
    trainer = train_shown("qwen2.5-vl", **settings)
    assert trainer.prm_learner.trunk is None and "log-probabilities that differ by" in caplog.text


def test_an_adapter_of_the_last_layers_leaves_the_vision_tower_out():
    for name in CLASSES:
        model, _ = build_vision_model(name)
        targets = {"target_modules": "all-linear", "exclude_modules": below_last_layers(model.config, 1)}
        adapted = get_peft_model(model, lora(**targets))
        places = [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert places and all(re.search(r"\.(language|text)_model\.layers\.2\.", place) for place in places), places


# --- In a run ---

RUN = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_generations": 2,
    "max_completion_length": 6,
    # Every other group passes the filter: two rounds of six groups for four
    "reward_funcs": row_rewards((1.0, 0.0, 0.0, 0.0)),
    "oversample_factor": 1.5,
    "filter_max_rounds": 2,
    "accuracy_low": 0.2,
    "accuracy_high": 0.8,
    "prm_micro_batch_size": 3,
    "prm_learning_rate": 0.01,
}
NUM_ROWS = 40


def shown(i):
    """The images of a row of the data set: up to two, of several sizes."""
    return [picture(10 * i + j, 8 * (1 + i % 3), 16) for j in range(i % 3)]


@pytest.fixture
def train_shown(train):
    """A run on a data set with and without images in its rows."""

    def run(name="qwen2.5-vl", *args, **settings):
        model, processor = build_vision_model(name)
        rows = [{"prompt": [{"role": "user", "content": f"{i}+"}], "images": shown(i)} for i in range(NUM_ROWS)]
        settings = {"model": model, "processing_class": processor, **RUN, **settings}
        return train(*args, train_dataset=Dataset.from_list(rows), **settings)

    return run


def test_values_and_the_confidence_of_the_reference_are_of_what_was_seen(train_shown, updates):
    trainer = train_shown(
        advantage_estimator="gae",
        value_learning_rate=1e-2,
        prm_update="before",
        prm_loss_type="calibrated_ce",
        prm_reference_weight=0.5,
    )
    assert all(math.isfinite(loss) for loss in logged(trainer, "value/loss"))
    batch, value_model = updates[-1], trainer.value_learner.value_model
    rows = batch.has_tokens & batch.images.is_shown
    assert rows.any()
    seen = value_model.values(*batch.inputs, rows=rows)
    blind = value_model.values(*batch.inputs[:4], rows=rows)
    assert not torch.allclose(seen[rows], blind[rows])
    model, _ = build_vision_model("qwen2.5-vl")
    entropies = batch_completion_logps(model, *batch.inputs[:4], 2, batch.images, rows=rows, entropies=True)
    own = batch.policy_mask[rows]
    torch.testing.assert_close(batch.ref_entropies[rows][own], entropies[rows][own], atol=1e-4, rtol=0)
    assert entropies[rows][own].min() > 0


def alone_of(processor, output):
    """What the processor makes of each row's prompt, by the row of the data set that its text names."""
    found = []
    for ids in output["prompt_ids"]:
        number = int(re.search(r"(\d+)\+\n", processor.tokenizer.decode(ids))[1])
        messages = prepare_multimodal_messages([{"role": "user", "content": f"{number}+"}], images=shown(number))
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        found.append(processor(images=[shown(number)] if number % 3 else None, text=[text], return_tensors="pt"))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_keep_their_images_through_filter_rounds_and_replay(train_shown, updates, name):
    trainer = train_shown(name, prm_replay_batches=1)
    assert logged(trainer, "filter/rounds") == [2, 2] and len(trainer.outputs) == len(updates) == 2
    model, processor = build_vision_model(name)
    kinds = set()
    for output, batch in zip(trainer.outputs, updates, strict=True):
        alone = alone_of(processor, output)
        kinds |= {"pixel_values" in inputs for inputs in alone}
        expected = slow_logps(model, output, alone)
        # The reference is the model as it was at the start; rows that are not trained on are not scored
        rows = batch.has_tokens
        assert rows.any()
        torch.testing.assert_close(batch.ref_logps[rows], expected[rows], atol=1e-4, rtol=0)
        # What the policy is trained on
        images = images_by_row(output)[IMAGES]
        for row, inputs in zip(images.rows, alone, strict=True):
            single = RowImages([row]).inputs(torch.ones_like(inputs["input_ids"]), torch.zeros(1, 0))
            for key, value in single.items():
                assert torch.equal(value, inputs.get(key, torch.zeros_like(value))), key
            assert ("pixel_values" in single) == ("pixel_values" in inputs)
    assert kinds == {True, False}
    (replayed,) = trainer.prm_learner.updater.replay
    batch = updates[-1]
    for row, expected in zip(replayed.images.rows, batch.images.rows, strict=True):
        same_inputs(row, expected)
        pixels = row.get("pixel_values", torch.zeros(0))
        assert pixels.device.type == "cpu" and pixels.untyped_storage().nbytes() == pixels.nbytes
    assert logged(trainer, "prm/loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert all(math.isfinite(value) for name in ("loss", "prm/grad_norm") for value in logged(trainer, name))
    assert distance(weights(trainer.implicit_prm.model), weights(model)) > 1e-3


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_policy_loss_reads_each_row_with_its_images(train_shown, monkeypatch, name, num_rows):
    """By log-probabilities of the very micro-batches that TRL cuts and shuffles, some of rows without images."""
    seen = []
    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", _recorded(seen))
    size = {"per_device_train_batch_size": num_rows, "gradient_accumulation_steps": 8 // num_rows}
    trainer = train_shown(name, max_steps=1, oversample_factor=2, **size)
    model, processor = build_vision_model(name)
    assert len(seen) == 8 // num_rows
    kinds = set()
    for ids, mask, num_tokens, logps in seen:
        output = {
            "prompt_ids": ids[:, :-num_tokens],
            "completion_ids": ids[:, -num_tokens:],
            "completion_mask": mask[:, -num_tokens:],
        }
        alone = alone_of(processor, output)
        kinds.add(any("pixel_values" in inputs for inputs in alone))
        expected = slow_logps(model, output, alone)
        torch.testing.assert_close(logps * output["completion_mask"], expected, atol=1e-4, rtol=0)
    assert trainer.state.global_step == 1 and (kinds == {True, False} or num_rows == 2)


def _recorded(seen):
    original = GRPOTrainer._get_per_token_logps_and_entropies

    def logps(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        result = original(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        seen.append((input_ids, attention_mask, logits_to_keep, result[0].detach()))
        return result

    return logps


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_a_resumed_run_goes_on_with_the_images_of_replayed_batches(train_shown, tmp_path, kind):
    settings = {"prm_replay_batches": 1, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    if kind == "adapters":
        settings |= {"peft_config": lora(), "prm_peft_config": lora(layers_to_transform=[2])}
    whole = train_shown("qwen3-vl", **settings)
    resumed = train_shown("qwen3-vl", str(tmp_path / "run" / "checkpoint-2"), **settings)
    assert all((trainer.prm_learner.trunk is not None) is (kind == "adapters") for trainer in (whole, resumed))
    for part in ("model", "implicit_prm.model"):
        first, second = (weights(operator.attrgetter(part)(trainer)) for trainer in (whole, resumed))
        assert same(first, second)
    assert logged(whole, "prm/loss") == logged(resumed, "prm/loss")


# --- Scores of messages with images ---


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_of_messages_with_images_are_those_of_the_trainer(train_shown, updates, name):
    trainer = train_shown(name, max_steps=1, prm_update="none")
    (output,), prm = trainer.outputs, trainer.implicit_prm
    make_different(prm.model)
    inputs = inputs_of(output)
    prm_logps, ref_logps = prm.log_probs(*inputs), prm.reference_log_probs(*inputs)
    decode = prm.tokenizer.decode
    numbers = [int(re.search(r"(\d+)\+\n", decode(ids))[1]) for ids in output["prompt_ids"]]
    completions, truncated = [], []
    for ids, mask in zip(output["completion_ids"], output["completion_mask"], strict=True):
        ids = ids[mask.bool()].tolist()
        truncated.append(ids[-1] != prm.tokenizer.eos_token_id)
        completions.append(decode(ids if truncated[-1] else ids[:-1]))
    plain = [[{"role": "user", "content": f"{number}+"}] for number in numbers]
    blocks = [prepare_multimodal_messages(m, images=shown(n)) for m, n in zip(plain, numbers, strict=True)]
    by_argument = prm.score(plain, completions, truncated, images=[shown(number) or None for number in numbers])
    for scored in (by_argument, prm.score(blocks, completions, truncated)):
        for row, score in enumerate(scored):
            num_tokens = int(output["completion_mask"][row].sum())
            if len(score.tokens) == num_tokens:  # what was sampled need not be what the tokenizer makes of its text
                torch.testing.assert_close(score.prm_logps, prm_logps[row, :num_tokens], atol=1e-4, rtol=0)
                torch.testing.assert_close(score.ref_logps, ref_logps[row, :num_tokens], atol=1e-4, rtol=0)
    assert max(abs(score.reward) for score in by_argument) > 1e-2
    blind = prm.score(plain, completions, truncated)
    changed = [abs(a.reward - b.reward) > 1e-5 for a, b in zip(by_argument, blind, strict=True)]
    assert changed == [number % 3 > 0 for number in numbers]


def make_different(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))


def test_a_saved_prm_has_its_processor(tmp_path):
    model, processor = build_vision_model("idefics3")
    prm = ImplicitPRM.from_model(model, processor.tokenizer, processor=processor)
    make_different(prm.model)
    prm.save_pretrained(tmp_path)
    loaded = ImplicitPRM.from_pretrained(tmp_path)
    assert type(loaded.processor) is type(processor)
    prompt = prepare_multimodal_messages([{"role": "user", "content": "1+"}], images=[picture(0, 16, 24)])
    (expected,), (score,) = (which.score([prompt], ["12"]) for which in (prm, loaded))
    torch.testing.assert_close(score.token_rewards, expected.token_rewards)
    assert abs(score.reward - prm.score([[{"role": "user", "content": "1+"}]], ["12"])[0].reward) > 1e-4


# --- Data sets ---


def problems(**columns):
    rows = [{"problem": f"<image>{i}+1 <image>", "answer": str(i + 1), **columns} for i in range(6)]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_images_stay_beside_adapted_problems(streaming):
    shown = [picture(0), picture(1, 8, 24)]
    data = problems(images=shown)
    adapted = adapt_dataset(
        data.to_iterable_dataset() if streaming else data,
        "question_answer",
        system_prompt="count",
        prompt_suffix="math",
    )
    row = next(iter(adapted))
    assert [image.tobytes() for image in row["images"]] == [image.tobytes() for image in shown]
    assert [message["content"] for message in row["prompt"]] == ["count", f"0+1\n\n{PROMPT_SUFFIXES['math']}"]
    assert set(row) == {*PROMPT_FEATURES, "images"} and row["solution"] == "1"
    # Without images a mark is text like any other
    assert next(iter(adapt_dataset(problems(), "question_answer")))["prompt"][0]["content"] == "<image>0+1 <image>"


def test_data_with_images_is_refused_where_text_only_is_read(model_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(launching._LAUNCHED, "1")
    problems(image=picture(0)).save_to_disk(tmp_path / "data")
    flags = ["--dataset_name", str(tmp_path / "data"), "--dataset_format", "question_answer"]
    model = ["--model_name_or_path", model_path]
    assert main(["eval", *model, *flags]) == 2
    assert "images in its column 'image', but trl-prime eval reads text only" in capsys.readouterr().err
    run = ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    assert main(["train", *model, *flags, *run, "--eval_split_size", "2"]) == 2
    assert "(eval_split_size) reads text only. Leave it out" in capsys.readouterr().err
    (tmp_path / "samples.jsonl").write_text('{"prompt": "1+", "completion": "2", "images": ["a.png"]}\n')
    with pytest.raises(ValueError, match="Line 1 .* has images, but trl-prime score reads text only"):
        read_rows(str(tmp_path / "samples.jsonl"))
    with pytest.raises(ValueError, match="a PRM that is trained offline reads text only"):
        load_outcome_dataset(str(tmp_path / "data"))


# --- What is refused ---


def test_images_that_cannot_be_read_are_refused():
    model, processor = build_vision_model("gemma3")
    prm = ImplicitPRM.from_model(model, processor.tokenizer)
    message = [{"role": "user", "content": "1+"}]
    with pytest.raises(ValueError, match="has no processor"):
        prm.score([message], ["2"], images=[[picture(0)]])
    with pytest.raises(ValueError, match="messages"):
        prm.score(["1+"], ["2"], images=[[picture(0)]])
    with pytest.raises(ValueError, match="1 completions and 2 lists of `images`"):
        prm.score([message], ["2"], images=[[picture(0)], None])
    with pytest.raises(ValueError, match="text only is read here"):
        encode_prompt(prm.tokenizer, prepare_multimodal_messages(message, images=[picture(0)]), prm.text_format)


def test_a_prm_that_sees_nothing_is_refused(train_shown):
    _, processor = build_vision_model("qwen2.5-vl")
    blind = build_model(vocab_size=len(processor.tokenizer))
    with pytest.raises(ValueError, match="Qwen2ForCausalLM, the implicit PRM or its reference, reads text only"):
        train_shown(prm_model=blind)


def test_rows_without_images_beside_others_are_refused_where_the_vision_tower_is_sharded(train_shown, monkeypatch):
    monkeypatch.setattr(DataParallel, "forward_is_collective", True)
    with pytest.raises(NotImplementedError, match=r"of 8 rows of a batch have images, and FSDP2 or ZeRO-3"):
        train_shown(max_steps=4)


def test_a_head_that_fsdp2_would_not_exchange_is_refused():
    """`distributed_run.py` has shown gradient norms of 1.47 on one process and 1.62 on two."""
    pytest.importorskip("trl", "1.16")
    whole, adapter = build_vision_model("qwen3-vl")[0], get_peft_model(build_vision_model("qwen3-vl")[0], lora())
    fused = build_vision_model("qwen3-vl")[0]
    fuse_lm_head(fused)
    check = functools.partial(check_sharded_heads, distributed_type=DistributedType.FSDP)
    check(adapter, whole)
    check(build_model(), build_model())
    check_sharded_heads(whole, fused, DistributedType.MULTI_GPU)
    with pytest.raises(NotImplementedError, match="The policy, a Qwen3VLForConditionalGeneration"):
        check(whole, adapter)
    with pytest.raises(NotImplementedError, match="The implicit PRM, a Qwen3VL"):
        check(adapter, fused)


def test_images_of_an_unknown_kind_are_refused(rollouts):
    with pytest.raises(NotImplementedError, match=r"have \['pixel_values_videos'\]"):
        images_by_row({**rollouts, "pixel_values_videos": torch.zeros(3)})


def test_what_an_older_trl_cuts_wrongly_is_refused(rollouts, monkeypatch):
    """TRL before 1.16 knows grids, and tensors of one entry a row."""
    knows_grid = lambda batch: split_pixel_values_by_grid(batch) if "image_grid_thw" in batch else batch  # noqa: E731
    expected = images_by_row(rollouts)[IMAGES]
    monkeypatch.setattr(images, "split_pixel_values_by_grid", knows_grid)
    if "image_grid_thw" in rollouts or rollouts["pixel_values"].ndim == 5:
        for row, other in zip(images_by_row(rollouts)[IMAGES].rows, expected.rows, strict=True):
            same_inputs(row, other)
        return
    with pytest.raises(NotImplementedError, match=r"\[1, 2, 0, 1, 1, 0, 2\] images"):
        images_by_row(rollouts)
    one_each = {name: value[:7] for name, value in rollouts.items()} | {"num_images": [1] * 7}
    for row, pixels in zip(images_by_row(one_each)[IMAGES].rows, rollouts["pixel_values"], strict=True):
        assert torch.equal(row["pixel_values"], pixels[None])
