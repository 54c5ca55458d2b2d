"""Colours, positions and visible text of heat maps."""

import math
import re
import statistics
from pathlib import Path

import pytest
import torch

import trl_prime.reports
from trl_prime.reports.heat_map import (
    MIN_SCALE,
    THEMES,
    colour,
    colour_scale,
    curve_points,
    finite,
    intensities,
    lowest_step,
    mean_by_position,
    position_counts,
    relative_positions,
    visible_text,
)

NAN = float("nan")
STYLE = (Path(trl_prime.reports.__file__).parent / "templates" / "page.css").read_text()


def random_rewards(seed, *lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, generator=generator) * 0.1 for length in lengths]


def test_full_colour_is_the_95th_percentile_of_the_absolute_rewards():
    rewards = random_rewards(0, 30, 1, 170)
    absolute = [abs(value) for reward in rewards for value in reward.tolist()]
    expected = statistics.quantiles(absolute, n=20, method="inclusive")[-1]
    assert colour_scale(rewards) == pytest.approx(expected)
    broken = torch.tensor([NAN, float("inf"), -float("inf")])
    assert colour_scale([*rewards, broken]) == pytest.approx(expected)


def test_rounding_is_not_blown_up_to_full_colour():
    noise = torch.tensor([1e-8, -3e-8, 2e-8])
    scale = colour_scale([noise])
    assert scale == colour_scale([]) == colour_scale([torch.tensor([NAN])]) == MIN_SCALE
    assert all(abs(value) < 1e-4 for value in intensities(noise, scale))


def test_intensities_are_cut_at_the_ends():
    rewards = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0, 7.0, NAN, float("inf"), -float("inf")])
    assert intensities(rewards, 2.0) == [-1.0, -0.5, 0.0, 0.25, 1.0, 1.0, 0.0, 1.0, -1.0]


def luminance(rgb):
    linear = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first, second):
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("name", THEMES)
def test_text_is_legible_on_every_colour(name):
    theme = THEMES[name]
    assert colour(0.0, theme) == theme.page
    assert colour(-1.0, theme) == theme.negative and colour(1.0, theme) == theme.positive
    steps = [i / 50 for i in range(-50, 51)]
    assert min(contrast(colour(step, theme), theme.text) for step in steps) >= 4.5
    # The same intensity looks equally far from zero on both sides, and further out is further away
    for sign in (-1, 1):
        away = [math.dist(colour(sign * i / 10, theme), theme.page) for i in range(11)]
        assert away == sorted(away) and away[1] > 5
    # Blue against orange differs in the blue channel, which red-green blindness leaves alone
    assert theme.positive[2] - theme.negative[2] > 100


def test_colours_of_the_style_are_legible():
    light, dark = STYLE.split("@media", 1)[0], STYLE.split("@media", 1)[1].split("* {", 1)[0]
    for name, block in (("light", light), ("dark", dark)):
        named = {key: tuple(bytes.fromhex(value)) for key, value in re.findall(r"--([\w-]+): #(\w{6})", block)}
        page = THEMES[name].page
        assert all(contrast(named[f"c{i}"], page) >= 4.5 for i in range(6))
        assert contrast(named["muted"], page) >= 4.5 and contrast(named["muted"], named["soft"]) >= 4.5
        for kind in ("right", "wrong"):
            assert contrast(named[kind], named[f"{kind}-soft"]) >= 4.5
        # Without their hues, right and wrong still differ
        assert contrast(named["bar-right"], named["bar-wrong"]) >= 3


def test_lowest_step():
    assert lowest_step(torch.tensor([0.5, -0.1, 0.3, -0.1])) == 1
    assert lowest_step(torch.tensor([NAN, 0.2, 0.1])) == 2
    assert lowest_step(torch.tensor([-1.0])) is None
    assert lowest_step(torch.tensor([NAN, 0.2])) is None
    assert lowest_step(torch.tensor([])) is None
    # A PRM that has learnt nothing yet gives no step less than another
    assert lowest_step(torch.tensor([0.0, -0.0, NAN, 0.0])) is None
    assert lowest_step(torch.tensor([0.0, 0.1])) == 0


def test_positions_by_slow_loops():
    rewards = random_rewards(1, 7, 1, 40, 3)
    sums, counts = [0.0] * 10, [0] * 10
    for reward in rewards:
        for i, value in enumerate(reward.tolist()):
            part = int((i + 0.5) / len(reward) * 10)
            sums[part] += value
            counts[part] += 1
    expected = [total / count for total, count in zip(sums, counts, strict=True)]
    assert mean_by_position(rewards) == pytest.approx(expected, abs=1e-7)
    assert position_counts([p for reward in rewards for p in relative_positions(len(reward))]) == counts
    few = mean_by_position([torch.tensor([1.0, NAN, 3.0, NAN])])
    assert [(i, mean) for i, mean in enumerate(few) if mean is not None] == [(1, 1.0), (6, 3.0)]


def test_curve_points():
    assert curve_points([0.0, 1.0, -1.0], -1.0, 1.0, 100, 50) == "0.0,25.0 50.0,0.0 100.0,50.0"
    assert curve_points([0.0, NAN, 1.0], 0.0, 1.0, 10, 10) == "0.0,10.0 10.0,0.0"
    assert curve_points([2.0], 2.0, 2.0, 10, 10) == "0.0,10.0"


def test_finite():
    assert finite(0.123456) == 0.1235 and finite(-123456.0) == -123500.0 and finite(None) is None
    assert finite(NAN) is None and finite(float("inf")) is None


def test_text_that_would_act_is_made_visible():
    assert visible_text("a\n\n\tb") == "a↵\n↵\n⇥b"
    assert visible_text("a\n\tb", mark_whitespace=False) == "a\n\tb"
    assert visible_text("\x1b[31m\0\r\x9b") == "<U+001B>[31m<U+0000><U+000D><U+009B>"
    assert visible_text("\u202eabc\u2066\u2028\ud800") == "<U+202E>abc<U+2066><U+2028><U+D800>"
    family = "👩\u200d👩\u200d👧 é क्\u200dष"
    assert visible_text(family) == family
