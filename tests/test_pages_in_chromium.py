"""The pages of `score` and `report` in a real browser: pointing, keys, switches, and model text that stays text."""

import io
import json
import random
import re

import pytest
from chromium import EXECUTABLE, NAMES, browser
from pages import ATTACKS, completion, hostile_completions, row, write_completions, write_run
from PIL import Image

from trl_prime.reports.heat_map import THEMES, colour
from trl_prime.reports.page import write_page
from trl_prime.reports.run_report import read_run, run_report
from trl_prime.reports.score_page import score_page

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason=f"none of {', '.join(NAMES)} is installed")

TOKENS = ["one ", "two\n", "three ", "four\n", "five"]
REWARDS = [[0.4, -0.2, 0.1, -0.8, 0.3], [0.1, 0.1, 0.1, 0.1, 0.1], [-0.5, 0.2, 0.0, 0.8, 0.9]]
SUMS = [sum(rewards) for rewards in REWARDS]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(str(tmp_path_factory.mktemp("profile"))) as started:
        yield started


@pytest.fixture
def browse(chromium, tmp_path):
    """Open HTML in Chromium; at the end nothing has been complained of or asked for."""

    def open_page(html):
        chromium.open(write_page(html, tmp_path / "page.html"))
        return chromium

    yield open_page
    assert chromium.complaints == []
    assert len(chromium.requests) == 1 and chromium.requests[0].startswith("file:")


@pytest.fixture
def score(browse):
    rows = [
        completion("add up", TOKENS, rewards, outcome) for rewards, outcome in zip(REWARDS, (0, 1, 1), strict=True)
    ]
    return browse(score_page(rows, prm="prm", beta=1.0))


def tip_of(page):
    return page.evaluate("document.getElementById('tip').hidden ? null : document.getElementById('tip').innerText")


def test_pointing_at_a_token_shows_its_numbers(score):
    assert tip_of(score) is None
    score.hover(".token", 3)
    shown = tip_of(score)
    assert shown.splitlines()[0] == "four↵"
    # The log-probabilities of pages.scored: minus the place under the reference, plus the reward under the PRM
    for text in ("process reward\t−0.8000", "PRM\t−4.800", "reference\t−4.000", "step 2 of 3\t−0.7000"):
        assert text in shown
    cursor = "document.querySelector('.cursor').getAttribute('{}')"
    assert score.evaluate(cursor.format("visibility")) == "visible"
    assert float(score.evaluate(cursor.format("x1"))) == pytest.approx(300 * 4 / 5)
    box = score.evaluate("(({left, right, top, bottom}) => [left, right, top, bottom])(tip.getBoundingClientRect())")
    assert 0 <= box[0] < box[1] <= 1280 and 0 <= box[2] < box[3] <= 900
    score.hover("h1")
    assert tip_of(score) is None and score.evaluate(cursor.format("visibility")) == "hidden"


def test_the_keyboard_goes_through_the_tokens(score):
    assert score.evaluate("document.querySelectorAll('.token[tabindex=\"0\"]').length") == 3
    score.evaluate("document.querySelector('.token').focus()")
    names = [tip_of(score).splitlines()[0].strip()]
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "End", "ArrowRight", "Home"):
        score.press(key)
        names.append(tip_of(score).splitlines()[0].strip())
    assert names == ["one", "two↵", "three", "two↵", "five", "five", "one"]
    assert score.evaluate("document.querySelectorAll('.token[tabindex=\"0\"]').length") == 3
    score.press("Escape")
    assert tip_of(score) is None


def test_a_tap_shows_the_numbers_too(score):
    score.resize(390, 800)
    score.click(".token", 5)
    assert "step 1 of 3\t+0.2000" in tip_of(score)


def test_the_page_is_one_column_on_a_narrow_screen(score):
    columns = "new Set([...document.querySelectorAll('.card')].map((c) => c.getBoundingClientRect().x)).size"
    assert score.evaluate(columns) == 3
    score.resize(360, 800)
    assert score.evaluate(columns) == 1
    assert score.evaluate("document.documentElement.scrollWidth") <= 360


def test_cards_are_sorted_by_q(score):
    def order(value):
        score.evaluate(f"order.value = '{value}'; order.dispatchEvent(new Event('change'))")
        return score.evaluate("[...document.querySelectorAll('.card')].map((card) => Number(card.dataset.index))")

    ascending = sorted(range(3), key=SUMS.__getitem__)
    assert order("high") == ascending[::-1] and order("low") == ascending and order("given") == [0, 1, 2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_painted_colours_are_those_of_the_scale(score, scheme):
    score.prefer(scheme)

    def painted(variable):
        picture = Image.open(io.BytesIO(score.picture())).convert("RGB")
        for index in range(len(TOKENS)):
            x, y, style = score.evaluate(
                f"(() => {{ const t = document.querySelectorAll('.token')[{index}], b = t.getClientRects()[0];"
                "return [b.x, b.y, t.getAttribute('style')]; })()"
            )
            intensity = float(re.search(rf"--{variable}:(-?[\d.]+)", style)[1])
            # A corner, where no letter is
            found = picture.getpixel((int(x) + 1, int(y) + 2))
            assert max(abs(a - b) for a, b in zip(found, colour(intensity, THEMES[scheme]), strict=True)) <= 3
            yield intensity

    score.place(".card")
    tokens = list(painted("t"))
    assert min(tokens) < -0.9 and max(tokens) > 0.3
    score.click("[data-set-colour=step]")
    score.hover("h1")
    score.place(".card")
    steps = list(painted("s"))
    assert steps[0] == steps[1] and steps[2] == steps[3] != tokens[2]
    pressed = "[...document.querySelectorAll('[data-set-colour]')].map((b) => b.getAttribute('aria-pressed')).join()"
    assert score.evaluate(pressed) == "false,true"


@pytest.mark.parametrize("with_policy", [True, False], ids=["policy", "no-policy"])
def test_hostile_text_stays_text(browse, tmp_path, with_policy):
    """Escaping has to hold by itself; the content security policy is a second wall."""
    html = score_page(hostile_completions(), prm=ATTACKS[0], beta=1.0)
    if not with_policy:
        html, replaced = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
        assert replaced == 1
    page = browse(html)
    for index in range(0, len(ATTACKS)):
        page.hover(".token", index)
        assert tip_of(page) is not None
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('iframe, img, a, base, main script').length") == 0
    assert page.evaluate("document.scripts.length") == 2
    texts = page.evaluate("[...document.querySelector('.card').querySelectorAll('.token')].map((t) => t.textContent)")
    assert [t for t in texts if "<U+" not in t] == [a for a in ATTACKS if "\0" not in a]


def test_the_content_security_policy_stops_a_script(browse):
    html = score_page([completion("p", ["x"], [0.1])], prm="prm", beta=1.0)
    page = browse(
        html.replace("</main>", "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'></main>")
    )
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelector('.token').tabIndex") == 0  # our own script ran
    blocked = json.dumps(page.complaints)
    assert "Content Security Policy" in blocked
    page.complaints.clear()
    page.requests[1:] = []


@pytest.fixture
def report(browse, tmp_path):
    generator = random.Random(0)
    runs = []
    for number, name in enumerate(("first", ATTACKS[1])):
        history = [
            {
                "step": step,
                "reward": step / 40 + generator.random() / 5 + number,
                ATTACKS[0]: 0.5,
                "grad_norm": 1e-5 * step,
            }
            for step in range(1, 41)
        ]
        folder = write_run(
            tmp_path / str(number), history, results={"before": {"greedy": 0.5}}, prime_config={"seed": number}
        )
        write_completions(
            folder, 40, [row(attack, attack, 1.0, i) for i, attack in enumerate(ATTACKS) if "\0" not in attack]
        )
        runs.append((read_run(folder, name), [entry["reward"] for entry in history]))
    page = browse(run_report([run for run, _ in runs], 2))
    page.rewards = [rewards for _, rewards in runs]
    return page


def shown_values(page, chart=0):
    return page.evaluate(
        f"[...document.querySelectorAll('.chart')[{chart}].querySelectorAll('b')].map((b) => Number(b.textContent))"
    )


def test_curves_follow_the_pointer_and_the_keys(report):
    rewards = report.rewards
    assert shown_values(report) == pytest.approx([values[-1] for values in rewards], rel=1e-3)
    # The drawing keeps 54 units to the left and 8 to the right of 480
    report.hover(".chart > svg", 0, fraction=(54 + 418 * 10 / 39) / 480)
    assert shown_values(report) == pytest.approx([values[10] for values in rewards], rel=1e-3)
    labels = report.evaluate("[...document.querySelectorAll('.at')].map((t) => t.textContent).slice(0, 2)")
    assert labels == ["step 11", "step 11"]
    report.hover("h1")
    assert shown_values(report) == pytest.approx([values[-1] for values in rewards], rel=1e-3)
    report.evaluate("document.querySelector('.chart > svg').focus()")
    report.press("ArrowRight")
    report.press("ArrowRight")
    report.press("ArrowLeft")
    report.press("ArrowRight")
    assert shown_values(report) == pytest.approx([values[1] for values in rewards], rel=1e-3)


def test_a_chart_of_one_point_has_its_axis(browse, tmp_path):
    page = browse(run_report([read_run(write_run(tmp_path / "run", [{"step": 7, "reward": 0.25}]))], 0))
    texts = page.evaluate("[...document.querySelectorAll('.chart text')].map((text) => text.textContent)")
    assert {"7", "0.24", "0.26"} <= {*texts}


def test_smoothing(report):
    report.click("#smooth")
    span = 39 / 20
    expected = []
    for values in report.rewards:
        total = weight = 0.0
        for step, value in enumerate(values):
            factor = 2.718281828459045 ** (-(39 - step) / span)
            total, weight = total + factor * value, weight + factor
        expected.append(total / weight)
    assert shown_values(report) == pytest.approx(expected, rel=1e-3)
    assert report.evaluate("document.querySelector('.chart').querySelectorAll('path.raw').length") == 2
    report.click("#smooth")
    assert report.evaluate("document.querySelectorAll('path.raw').length") == 0


def test_a_report_with_hostile_text(report):
    assert report.evaluate("window.hacked") is None
    assert report.evaluate("document.querySelectorAll('iframe, img, a, base').length") == 0
    assert ATTACKS[1] in report.evaluate("document.querySelector('.values').textContent")
    report.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert report.evaluate("document.querySelector('[data-panels=others] figcaption').textContent") == ATTACKS[0]
    report.resize(360, 800)
    assert report.evaluate("document.documentElement.scrollWidth") <= 360


def test_every_point_of_a_curve_lies_in_the_picture(report):
    paths = report.evaluate("[...document.querySelectorAll('path.line')].map((p) => p.getAttribute('d'))")
    assert len(paths) == 6
    for path in paths:
        points = [tuple(map(float, point)) for point in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]
        assert len(points) == 40
        assert all(54 <= x <= 472 and 8 <= y <= 170 for x, y in points)
        assert [x for x, _ in points] == sorted(x for x, _ in points)
