"""What docs/ shows is what the code does: golden traces of the clock, code beside equations."""

import json
import re
import textwrap
from pathlib import Path

import pytest

from fedrevive_jax.config import METHODS
from tests.test_cli import call, flags
from tests.test_schedule import Fixed, clock
from tests.test_simulator import SMALL

ROOT = Path(__file__).parent.parent
TRACES = sorted((ROOT / "tests" / "traces").glob("*.json"))
COLUMNS = ("time", "client", "base_version", "version", "staleness", "new_version", "starts")
HEADER = ("time", "arrives", "started from", "version", "τ", "new version", "starts")


def replay(settings):
    """The rows of a trace, made by the virtual clock; clients 0, 1, 2, ... as letters."""
    plan = clock(
        Fixed(settings["train"], settings["download"], settings["upload"]),
        len(settings["train"]),
        settings["concurrency"],
        settings["buffer_size"],
        settings["open_slots"],
        settings["max_time"],
        seed=settings["seed"],
    )
    rows, started = [], plan.initial_jobs
    for index, job in enumerate(plan.job):
        until = int(plan.jobs_started[index])
        base, tau = int(plan.base_version[job]), int(plan.staleness[index])
        new = int(plan.version[index])
        assert (plan.base_version[started:until] == new).all()  # starts from the newest version
        assert (plan.start[started:until] == plan.time[index]).all()
        values = (
            float(plan.time[index]), "ABC"[plan.client[job]], base, base + tau, tau, new,
            " ".join("ABC"[client] for client in plan.client[started:until]),
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
        started = until
    return rows


def shown(rows):
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for row in rows:
        cells = (f"{v:g}" if isinstance(v, float) else str(v) for v in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_golden_traces(path):
    """The clock replays each trace, and docs/clock.md shows it."""
    trace = json.loads(path.read_text())
    assert replay(trace["settings"]) == trace["arrivals"]
    assert shown(trace["arrivals"]) in (ROOT / "docs" / "clock.md").read_text()


def test_a_trace_notices_a_different_contract():
    """The control: were versions made by three arrivals instead of two, the trace would differ."""
    trace = json.loads((ROOT / "tests" / "traces" / "buffered.json").read_text())
    assert replay({**trace["settings"], "buffer_size": 3}) != trace["arrivals"]


def snippets():
    """(file, code) of every Python block in the guide; the file is the link before it."""
    text = (ROOT / "docs" / "methods.md").read_text()
    blocks = re.finditer(r"\]\(\.\./(\S+?)\):\n+```python\n(.*?)```", text, re.DOTALL)
    return [(block[1], block[2]) for block in blocks]


def test_code_beside_the_equations_is_the_code():
    text = (ROOT / "docs" / "methods.md").read_text()
    assert len(snippets()) == text.count("```python")
    for file, code in snippets():
        source = textwrap.dedent((ROOT / file).read_text())
        indented = (textwrap.indent(code, " " * n) for n in (0, 4, 8))
        assert any(form in source for form in indented), f"{file} does not hold:\n{code}"


def test_the_guide_holds_every_method():
    text = (ROOT / "docs" / "methods.md").read_text()
    for method in METHODS:
        assert f"`{method}`" in text


def test_links_of_the_docs_lead_somewhere():
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_tour(tmp_path):
    """At the size of the tests; the programs are those of other tests."""
    result = call(*flags(**SMALL, out=tmp_path), program="tour")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for name in ("clients.png", "clock.png", "synthetic.png"):
        assert (tmp_path / name).stat().st_size > 5_000
    # K = 6 jobs are in flight, so the first window trains those of them that arrive in time.
    assert re.search(r"jobs of the first window: \d of 6 in flight", result.stdout)
    assert "conv1/kernel (3, 3, 1, 4)" in result.stdout
    assert "teachers: 3" in result.stdout
    assert re.search(r"pool: \d+ of 32 images", result.stdout)
    short = call("--max_time=0.01", f"--out={tmp_path / 'short'}", program="tour")
    assert short.stderr.startswith("error: --max_time=0.01: must be long enough for a version")
    texts = call("--dataset=newsgroups", f"--out={tmp_path / 'texts'}", program="tour")
    assert texts.returncode == 1
    assert texts.stderr == "error: --dataset=newsgroups: the tour shows images, not texts\n"
    assert not (tmp_path / "texts").exists()
