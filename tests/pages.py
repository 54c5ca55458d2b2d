"""The tests of pages share this: completions whose text attacks the page, a reader of HTML, and the folder of a run."""

import dataclasses
import json
from html.parser import HTMLParser

import pyarrow
import pyarrow.parquet
import torch

from trl_prime.implicit_prm import ScoredCompletion
from trl_prime.reports.score_page import Completion

ATTACKS = [
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror='window.hacked=1'>",
    '"><svg onload="window.hacked=1">',
    "' onmouseover='window.hacked=1' x='",
    "<!--<script>",
    "]]></style></pre></textarea></title><script>window.hacked=1</script>",
    "{{ 7 * 191 }}{% raw %}",
    "&lt;b&gt; \u2028 \0 \x1b]0;hacked\x07 \u202e",
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "<a href='javascript:window.hacked=1'>x</a><base href='https://evil.example/'>",
]


def scored(tokens, rewards, delimiter="\n"):
    """A scored completion with these tokens; its log-probabilities make the rewards at beta 1."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    step_ids, step = [], 0
    for token in tokens:
        step_ids.append(step)
        step += token.endswith(delimiter)
    num_steps = step_ids[-1] + 1
    steps = ["".join(t for t, s in zip(tokens, step_ids, strict=True) if s == i) for i in range(num_steps)]
    step_rewards = torch.stack([rewards[torch.tensor(step_ids) == i].sum() for i in range(num_steps)])
    ref_logps = -torch.arange(1, len(tokens) + 1, dtype=torch.float64)
    total = rewards.sum()
    return ScoredCompletion(
        tokens=tokens,
        token_rewards=rewards,
        prm_logps=ref_logps + rewards,
        ref_logps=ref_logps,
        steps=steps,
        step_ids=step_ids,
        step_rewards=step_rewards,
        reward=total.item(),
        probability=total.sigmoid().item(),
    )


def completion(prompt, tokens, rewards, outcome=None):
    return Completion(prompt, "".join(tokens), outcome, scored(tokens, rewards))


def hostile_completions():
    """Three completions of a prompt and one of another; prompts, roles and tokens are attacks."""
    rewards = [(-1) ** i * 0.1 * (i + 1) for i in range(len(ATTACKS))]
    lines = [f"{attack}\n" for attack in ATTACKS]
    messages = [{"role": attack, "content": attack} for attack in ATTACKS]
    first = [completion(messages, tokens, rewards, 1.0) for tokens in (ATTACKS, lines, lines[::-1])]
    other = completion(ATTACKS[0], lines[:3], [0.5, float("nan"), -0.25], 0.0)
    return [*(dataclasses.replace(c, outcome=o) for c, o in zip(first, (1.0, 0.0, None), strict=True)), other]


class Document(HTMLParser):
    """Elements with their attributes, and the text of scripts, styles and everything else."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.styles, self.text = [], [], [], ""
        self._open = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            self.scripts.append(data)
        elif inside == "style":
            self.styles.append(data)
        else:
            self.text += data

    def of_class(self, name):
        return [a for _, a in self.elements if name in (a.get("class") or "").split()]

    @property
    def data(self):
        return json.loads(self.scripts[0])


def assert_no_address(document):
    """The page asks for nothing: no attribute, style or script names an address."""
    for tag, attributes in document.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "background"):
            assert attributes.get(name, "data:,") == "data:,", (tag, attributes)
        assert "url(" not in (attributes.get("style") or "")
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    assert not any(word in style for style in document.styles for word in ("url(", "@import", "http"))
    for script in document.scripts[1:]:
        assert "http" not in script.replace('"http://www.w3.org/2000/svg"', "")
        assert not any(word in script for word in ("fetch(", "XMLHttpRequest", "innerHTML", "eval(", "import("))


def write_run(folder, history=None, **files):
    """A run's folder as a training leaves it, from parts."""
    folder.mkdir(parents=True, exist_ok=True)
    if history is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def write_completions(folder, step, rows):
    (folder / "completions").mkdir(exist_ok=True)
    ours = {name: f"prime/{name}" for name in ("outcome", "process_reward", "trained", "gold")}
    rows = [{ours.get(name, name): value for name, value in row.items()} for row in rows]
    # A reward function has a column of its own by the name of one of ours
    table = pyarrow.Table.from_pylist([{"step": step, "outcome": "judged by hand", **row} for row in rows])
    pyarrow.parquet.write_table(table, folder / "completions" / f"completions_{step:05d}.parquet")


def row(prompt, completion, outcome, process_reward, trained=True, advantage=0.5):
    values = {"outcome": outcome, "process_reward": process_reward, "trained": trained, "advantage": advantage}
    return {"prompt": prompt, "completion": completion, **values}
