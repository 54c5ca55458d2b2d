"""Images reach PRM and reference: each row its own, wherever rows go, and as the policy saw them."""

import pytest
import torch
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid
from vision import CLASSES, build_vision_model, picture

from trl_prime.images import IMAGES, RowImages, images_by_row, in_trl_form, without_empty_images
from trl_prime.implicit_prm.logps import batch_completion_logps, completion_logps, fuse_lm_head

# Images of different sizes, several in a row, none, and the same question with others
PICTURES = ([(16, 24)], [(8, 8), (16, 16)], [], [(32, 16)], [(16, 16)], [], [(24, 32), (8, 16)])
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
        fuse_lm_head(model)
    inputs = inputs_of(output)
    for size in (1, 3, 7):
        logps = batch_completion_logps(model, *inputs[:4], size, inputs[4])
        torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)
    # The same rows shown nothing, and shown negatives
    shown = inputs[4].is_shown
    assert shown.tolist() == [bool(sizes) for sizes in PICTURES]
    negatives = [{**row, "pixel_values": -row["pixel_values"]} for row in inputs[4].rows]
    for images in (None, RowImages(negatives)):
        logps = batch_completion_logps(model, *inputs[:4], 3, images)
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
