"""What README and docs/ show is what the code does.

Golden traces of the clock, code beside equations, flags, links, files, and the commands themselves.
"""

import dataclasses
import json
import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest

from fedrevive_jax.config import METHODS, Config
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.presets import OF_PRESETS, resolve
from fedrevive_jax.running.runner import run
from tests.commands import call, flags
from tests.toys import SMALL, Fixed, clock, small

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
STUDY = ROOT / "experiments" / "studies" / "fashion_mnist" / "README.md"
# What is made by the build of the pages is not looked for in them.
MADE = ("_build", "generated")
PAGES = [
    README,
    *(
        page
        for page in sorted((ROOT / "docs").rglob("*.md"))
        if not set(page.relative_to(ROOT).parts) & set(MADE)
    ),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
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
    """The clock replays each trace, and the page shows it."""
    trace = json.loads(path.read_text())
    assert replay(trace["settings"]) == trace["arrivals"]
    assert shown(trace["arrivals"]) in (ROOT / "docs" / "concepts" / "clock.md").read_text()


def test_a_trace_notices_a_different_contract():
    """The control: were versions made by three arrivals instead of two, the trace would differ."""
    trace = json.loads((ROOT / "tests" / "traces" / "buffered.json").read_text())
    assert replay({**trace["settings"], "buffer_size": 3}) != trace["arrivals"]


def snippets():
    """(file, code) of every Python block in the guide; the file is the link before it."""
    text = (ROOT / "docs" / "concepts" / "methods.md").read_text()
    blocks = re.finditer(r"\]\(\.\./\.\./(\S+?)\):\n+```python\n(.*?)```", text, re.DOTALL)
    return [(block[1], block[2]) for block in blocks]


def test_code_beside_the_equations_is_the_code():
    text = (ROOT / "docs" / "concepts" / "methods.md").read_text()
    assert len(snippets()) == text.count("```python")
    for file, code in snippets():
        source = textwrap.dedent((ROOT / file).read_text())
        indented = (textwrap.indent(code, " " * n) for n in (0, 4, 8))
        assert any(form in source for form in indented), f"{file} does not hold:\n{code}"


def test_the_guide_holds_every_method():
    text = (ROOT / "docs" / "concepts" / "methods.md").read_text()
    for method in METHODS:
        assert f"`{method}`" in text


def test_the_readme_is_read_in_two_minutes():
    assert len(README.read_text().splitlines()) <= 150


def prose(page):
    """The text of a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchor(heading):
    """As GitHub and MyST make it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def dead_links(page):
    """Relative links that lead nowhere, to a file or to a heading in one."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, wanted = target.partition("#")
        file = page.parent / name if name else page
        if set(MADE) & set(Path(name).parts):
            continue
        headings = re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE) if wanted else []
        if not file.exists() or (wanted and wanted not in map(anchor, headings)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", [*PAGES, STUDY], ids=[*NAMES, "study"])
def test_links_lead_somewhere(page):
    assert dead_links(page) == []


def test_dead_links_are_seen(tmp_path):
    """The control."""
    page = tmp_path / "page.md"
    page.write_text(
        "# A head, line\n[a](no.md) [b](page.md#a-head-line) [c](#b) [d](https://x.y)\n"
    )
    assert dead_links(page) == ["no.md", "#b"]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_and_rooms_exist(page):
    """Every `file.py`, and every `room/`, is one of the repository."""
    folders = ("fedrevive_jax", "experiments", "tests", "docs")
    files = [path.as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for name in re.findall(r"`([\w./-]+\.py)`", prose(page)):
        assert any(file.endswith(f"/{name}") for file in files), name
    for name in re.findall(r"`((?:fedrevive_jax|experiments|tests|docs)/[\w./-]*)`", prose(page)):
        assert (ROOT / name).exists(), name


def test_the_readme_names_all_rooms():
    rows = re.findall(r"^\| (`\w+/`.*)$", README.read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)/`", row)} | {"config"}
    assert named == {path.parent.name for path in (ROOT / "fedrevive_jax").glob("*/__init__.py")}


PROGRAMS = (
    "main", "compare", "evaluate", "prepare", "benchmark", "tour", "watch", "serve", "join", "keys",
)  # fmt: skip
# Flags of other programs, as the pages call them.
OTHERS = {
    "gcloud": "accelerator-type command recurse version worker zone",
    "slurm": "array cpus-per-task gpus-per-node gres nodes ntasks-per-node wrap",
    "dask": "host memory-limit nthreads port",
    "sphinx-build": "keep-going",
    "ruff": "check",
    "tensorboard": "logdir",
    "any": "help",
}


def program_flags(program):
    """The flags that a command defines itself."""
    source = (ROOT / "experiments" / f"{program}.py").read_text()
    own = set(re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", source))
    if "define_grace(" in source:
        own.add("grace")
    if re.search(r"^config_flags\.define\(\)|^    config_flags\.define\(\)", source, re.MULTILINE):
        own |= {"conv", *OF_PRESETS, *(field.name for field in dataclasses.fields(Config))}
    if some := re.search(r"^config_flags\.define\(\((.*)\)\)", source, re.MULTILINE):
        own |= set(re.findall(r"\"(\w+)\"", some[1]))
    return own | {"compilation_cache_dir"}


def named_flags(text):
    return set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_flags_are_flags(page):
    known = set().union(
        *map(program_flags, PROGRAMS), *(words.split() for words in OTHERS.values())
    )
    assert named_flags(page.read_text()) <= known


def test_a_flag_that_is_none_is_seen():
    """The control."""
    assert named_flags("x `--no_such=1`, --seed\n-e --a-b") == {"no_such", "seed", "a-b"}
    assert "no_such" not in set().union(*map(program_flags, PROGRAMS))


def commands():
    """(page, program, arguments) of every command of ours on the pages."""
    found = []
    for page, name in zip([*PAGES, STUDY], [*NAMES, "study"], strict=True):
        text = re.sub(r"\\\n\s*", " ", page.read_text())
        calls = re.findall(r"python -m experiments\.(\w+)((?: +(?:'[^']*'|[^`'\s&|,)]+))*)", text)
        calls += [
            ("compare", f" --dataset=fashion_mnist{rest}")
            for rest in re.findall(r"^\s*\$(?:study|read)(.*)$", text, re.MULTILINE)
        ]
        found += [
            pytest.param(program, rest, id=f"{name}-{program}-{number}")
            for number, (program, rest) in enumerate(calls)
        ]
    return found


@pytest.mark.parametrize(("program", "arguments"), commands())
def test_commands_are_commands(program, arguments):
    """Every flag belongs to its command, and the settings make a configuration."""
    given = named_flags(arguments)
    assert given <= program_flags(program) | {"help"}
    if "$" in arguments or program not in ("main", "compare", "tour"):
        return
    fields = {field.name for field in dataclasses.fields(Config)} | set(OF_PRESETS)
    words = [word[2:].partition("=") for word in shlex.split(arguments) if word.startswith("--")]
    resolve(**{name: value for name, equals, value in words if name in fields and equals})


def test_a_command_with_a_wrong_value_is_seen():
    """The control."""
    with pytest.raises(ConfigError, match="alpha"):
        test_commands_are_commands("main", "--alpha=-1")
    with pytest.raises(AssertionError):
        test_commands_are_commands("main", "--methods=fedbuff")


def test_the_python_of_the_readme_runs(capsys):
    """As it stands, but for its size."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    whole = '"digits", "fedrevive", seed=1, max_time=20'
    assert code.count(whole) == 1
    sizes = ", ".join(f"{name}={value!r}" for name, value in SMALL.items())
    small = f'"digits", "fedrevive", {sizes}'
    exec(code.replace(whole, small), {})
    out = capsys.readouterr().out
    assert re.match(
        r"\d+ versions, mean staleness \d+\.\d\n0\.\d+ \(3, 3, 1, 4\)\n(\d+ \d+ [\d.]+\n){5}$", out
    )


def test_a_model_of_your_own_is_taken():
    """The page's own data and model make a simulation; nothing is trained."""
    page = (ROOT / "docs" / "guide" / "python.md").read_text()
    _, code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert code.count("fr.run(") == 1
    generator = np.random.default_rng(0)
    given = {
        "n": 90,
        "m": 10,
        "images": generator.integers(0, 256, (100, 8, 8, 1), dtype=np.uint8),
        "labels": generator.integers(0, 10, 100, dtype=np.int32),
    }
    exec(code.replace("fr.run(", "simulation = fr.Simulation("), given)
    assert given["simulation"].server.version == 0


@pytest.mark.slow
def test_the_record_is_told_field_by_field(tmp_path):
    """Every file in the folder of a run, and every field in those files, stands on its page."""
    page = (ROOT / "docs" / "record.md").read_text()
    told = set(re.findall(r"`([\w./]+)`", page))
    folder = tmp_path / "run"
    run(small("fedrevive", workdir=folder), keep_record=True)
    assert {f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir()} <= told
    rows = [json.loads(line) for name in ("metrics", "arrivals")
            for line in (folder / f"{name}.jsonl").read_text().splitlines()]  # fmt: skip
    for fields in (
        *rows,
        *(json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "origin")),
    ):
        assert set(fields) <= told


@pytest.mark.slow
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
