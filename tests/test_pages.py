"""Pages: what their charts hold, worked by hand; hostile texts; every kind of run; a browser."""

import html.parser
import http.client
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from experiments.watch import Watch
from fedrevive_jax.comparison import report
from fedrevive_jax.comparison.statistics import Run
from fedrevive_jax.data import Dataset
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.pages import charts, run, series
from fedrevive_jax.pages.document import Page
from fedrevive_jax.presets import resolve
from fedrevive_jax.record import files
from fedrevive_jax.running import runner
from tests.commands import call, started
from tests.toys import small

HOSTILE = "</script><img src=x onerror=alert(1)> & \"'$$x$$"
MOST_BYTES = 3_000_000


# --- numbers of the charts ------------------------------------------------------------------------


def test_values_stay_alone_until_they_are_many():
    x, y = np.arange(6.0), np.asarray([1.0, np.nan, 3.0, 5.0, np.inf, 9.0])
    alone = series.binned(x, y, most=4)
    assert (alone.per, alone.x.tolist(), alone.y.tolist()) == (1, [0, 2, 3, 5], [1, 3, 5, 9])
    assert alone.low.tolist() == alone.high.tolist() == alone.y.tolist()
    # Four finite ones in bins of two; the quantiles of (1, 3) lie a tenth of the way inside.
    together = series.binned(x, y, most=3, bins=2)
    assert (together.per, together.x.tolist(), together.y.tolist()) == (2, [1, 4], [2, 7])
    np.testing.assert_allclose([together.low, together.high], [[1.2, 5.4], [2.8, 8.6]])
    assert series.binned(x, y, most=3, bins=3).x.tolist() == [1, 4]  # never fewer than its share
    assert len(series.binned(x[:0], y[:0]).x) == 0


def test_evenly_spaced_places_keep_both_ends():
    assert series.spaced(3, 5).tolist() == [0, 1, 2]
    assert series.spaced(9, 3).tolist() == [0, 4, 8]
    assert series.spaced(0, 3).tolist() == []


def test_missing_and_null_are_no_numbers():
    np.testing.assert_equal(series.column([{"a": 1}, {"a": None}, {}], "a"), [1, np.nan, np.nan])


def test_the_timeline_takes_clients_whole_and_the_newest_jobs(monkeypatch):
    monkeypatch.setattr(series, "MOST_CLIENTS", 3)
    rows = [{"client": client, "index": i} for i, client in enumerate([4, 0, 2, 1, 3, 0, 4, 3])]
    found = series.timeline(rows)
    assert (found.clients, found.all_clients, found.all_jobs) == ([0, 2, 4], 5, 8)
    assert [row["index"] for row in found.jobs] == [0, 1, 2, 5, 6]
    monkeypatch.setattr(series, "MOST_JOBS", 2)
    assert [row["index"] for row in series.timeline(rows).jobs] == [5, 6]


def test_the_pool_stands_until_it_is_counted_again(monkeypatch):
    rows = [{"time": t, "counts": [0, int(t)]} for t in (0.0, 1.0, 2.0, 4.0, 5.0)]
    found = series.pool(rows, end=7.0)
    assert (found.starts.tolist(), found.ends.tolist()) == ([0, 1, 2, 4, 5], [1, 2, 4, 5, 7])
    assert found.counts[:, 1].tolist() == [0, 1, 2, 4, 5]
    monkeypatch.setattr(series, "MOST_CELLS", 6)
    thin = series.pool(rows, end=7.0)
    assert (thin.starts.tolist(), thin.ends.tolist(), thin.all_moments) == ([0, 2, 5], [2, 5, 8], 5)
    # The last count is as long as the one before it at least: 5 - 2.
    assert series.pool(rows, end=5.0).ends[-1] == 8.0
    assert series.pool(rows[:1], end=7.0) is series.pool([], 0.0) is None


def test_rejections_are_counted_by_reason():
    rows = [
        {"time": float(i), "rejected": reason}
        for i, reason in enumerate(["norm", None, "not finite", "norm"])
    ]
    found = series.rejections(rows)
    assert {k: (at.tolist(), n.tolist()) for k, (at, n) in found.items()} == {
        "norm": ([0, 3], [1, 2]), "not finite": ([2], [1]),
    }  # fmt: skip
    assert list(found) == ["norm", "not finite"]  # the most frequent first


def test_clients_by_what_they_sent():
    rows = [
        {"client": 7, "staleness": 1, "loss": 2.0, "rejected": None},
        {"client": 3, "staleness": 5, "loss": None, "rejected": "norm"},
        {"client": 7, "staleness": 4, "loss": None, "rejected": "norm"},
    ]
    busiest, other = series.clients(rows)
    assert busiest == (7, 2, 2.5, 2.0, 1)
    assert other[:3] == (3, 1, 5.0)
    assert np.isnan(other.loss)


def test_shares_of_what_is_at_most_so_large():
    at, share = series.cumulative(np.asarray([3, 0, 3, 1]))
    assert (at.tolist(), share.tolist()) == ([0, 1, 3], [0.25, 0.5, 1.0])


# --- pages of runs --------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """Names of the tags of a page, its visible text, and what its charts hold."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.addresses = [""], "", []
        self.feed(text)
        self.charts = {}
        data = re.search('id="charts">(.*?)</script>', text, re.DOTALL)
        if data:
            roots = json.loads(data[1])["document"]["roots"]
            self.charts = {root["attributes"]["name"]: root["attributes"] for root in roots}

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        if self.tags[-1] not in ("script", "style"):
            self.words += data


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recorded(
    folder,
    *,
    arrivals=40,
    clients=5,
    evaluations=5,
    dfkd=False,
    classes=3,
    method="fedrevive",
    dataset="digits",
    loss=0.5,
    rejected=None,
    start=True,
    summary=True,
):
    """A record as a run leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = resolve("digits", "fedbuff", workdir=str(folder)).as_dict()
    files.write_json(folder / "config.json", {**config, "method": method, "dataset": dataset})
    rng = np.random.default_rng(0)
    rows = [
        {
            "index": i, "time": i / 4, "start": max(0.0, i / 4 - 3), "client": int(c),
            "base_version": max(0, i - 3), "version": i, "staleness": min(i, 3),
            "beta": 0.5 * (dfkd and i % 2), "accepted": rejected is None,
            "rejected": rejected if i % 2 else None, "loss": loss,
        }
        for i, c in enumerate(rng.integers(0, clients, arrivals))
    ]  # fmt: skip
    if not start:
        rows = [{key: value for key, value in row.items() if key != "start"} for row in rows]
    end = arrivals / 4
    metrics = [
        {
            "kind": "evaluation", "version": i, "time": end * i / max(evaluations - 1, 1),
            "wall_seconds": i * 1.5, "accuracy": i / evaluations, "loss": 1 / (i + 1),
        }
        for i in range(evaluations)
    ]  # fmt: skip
    if dfkd:
        names = [name for *_, own in run.TERMS for name in own]
        metrics += [
            {"kind": "dfkd", "version": row["version"], "time": row["time"]}
            | {name: 0.25 + place for place, name in enumerate(names)}
            for row in rows
        ]
        metrics += [
            {"kind": "pool", "version": row["version"], "time": row["time"]}
            | {"counts": [i * (label + 1) for label in range(classes)]}
            for i, row in enumerate(metrics[:evaluations])
        ]
    lines(folder / "metrics.jsonl", metrics)
    lines(folder / "arrivals.jsonl", rows)
    if summary:
        told = {"final_accuracy": 0.8, "best_accuracy": 0.9, "versions": 7, "arrivals": arrivals}
        files.write_json(folder / "summary.json", told)
    return folder


def shown(folder, **given):
    return Tags(run.page(folder, **given).html())


ALWAYS = {"accuracy", "loss", "arrivals/staleness", "arrivals/loss", "jobs"}


@pytest.mark.parametrize(
    ("fields", "charted", "words"),
    [
        ({}, ALWAYS, "Finished: accuracy 0.8000, best 0.9000, after 7 versions and 40 arrivals."),
        (
            {"dfkd": True},
            ALWAYS | {"arrivals/beta", "pool"} | {title for title, *_ in run.TERMS},
            "Data-free distillation",
        ),
        ({"summary": False}, ALWAYS, "Not finished: the record goes up to version 39, 40 arrivals"),
        (
            {"summary": False, "loss": None},
            ALWAYS - {"arrivals/loss"},
            "Failed at version 39, 40 arrivals: training has diverged",
        ),
        ({"rejected": "norm"}, ALWAYS | {"rejections"}, "20 of 40 uploads were rejected."),
        ({"start": False}, ALWAYS, "The record does not tell when jobs started"),
        ({"arrivals": 0}, {"accuracy", "loss"}, "Accuracy and loss"),
        ({"arrivals": 0, "evaluations": 0, "summary": False}, set(), "0 arrivals."),
        ({"arrivals": 1, "evaluations": 1, "dfkd": True}, {"jobs", "accuracy"}, "Clients"),
    ],
    ids=["plain", "dfkd", "under way", "failed", "rejected", "old", "none", "begun", "one"],
)
def test_every_kind_of_run_has_a_page(tmp_path, fields, charted, words):
    page = shown(recorded(tmp_path, **fields))
    if fields.get("arrivals") == 1:
        assert page.charts.keys() >= charted
    else:
        assert page.charts.keys() == charted
    assert words in page.words
    assert all(address.startswith("data:") for address in page.addresses)


def test_seconds_in_the_place_of_simulated_time(tmp_path):
    axis = shown(recorded(tmp_path)).charts["accuracy"]["below"][0]["attributes"]["axis_label"]
    assert axis == "simulated time"
    (tmp_path / "delays.csv").write_text("")
    axis = shown(tmp_path).charts["accuracy"]["below"][0]["attributes"]["axis_label"]
    assert axis == "seconds since the start"


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    folder = recorded(tmp_path)
    before = shown(folder).words
    for name in ("metrics.jsonl", "arrivals.jsonl"):
        with (folder / name).open("a") as stream:
            stream.write('{"kind": "evaluation", "ti')
    assert shown(folder).words == before


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("arrivals.jsonl", "{}\n", "damaged or of another version"),
        ("arrivals.jsonl", "half\n", r"arrivals\.jsonl line 1 is damaged"),
        ("metrics.jsonl", '{"kind": "pool", "time": 0, "counts": 3}\n', "damaged or of another"),
        ("config.json", "[]", "is not a configuration"),
        ("config.json", "{", "cannot be read"),
    ],
)
def test_a_damaged_record_is_told_in_one_line(tmp_path, name, text, words):
    folder = recorded(tmp_path)
    (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        run.page(folder)


def test_a_large_run_is_thinned_and_says_so(tmp_path):
    """As CIFAR-100's: 12,500 arrivals of 648 clients, DFKD at each, an evaluation each version."""
    folder = recorded(
        tmp_path, arrivals=12_500, clients=648, evaluations=12_500, dfkd=True, classes=100
    )
    page = run.page(folder)
    page.write(folder / "report.html")
    assert (folder / "report.html").stat().st_size < MOST_BYTES
    words = Tags(page.html()).words
    for told in (
        "2000 of 12500 evaluations", "means of 32 arrivals in a row", "of 60 of 648 clients",
        "80 of 12500 counts", "The 200 of 648 clients", "Means of up to 32 rows in a row",
    ):  # fmt: skip
        assert told in words


def test_what_users_write_is_shown_as_they_wrote_it(tmp_path):
    folder = recorded(tmp_path, dfkd=True, method=HOSTILE, dataset=HOSTILE, rejected=HOSTILE)
    origin = {"start": "", "data_sha256": "", "classes": [HOSTILE] * 3, "inputs": {}, "files": {}}
    files.write_json(folder / "origin.json", origin)
    harmless = recorded(tmp_path / "other", dfkd=True, rejected="norm")
    page = shown(folder)
    assert page.tags == shown(harmless).tags
    assert page.words.count(HOSTILE) >= 4  # heading, title, settings
    # Between $$ Bokeh would look for TeX, and for the library that sets it, in the network.
    labels = json.dumps([page.charts["pool"], page.charts["rejections"]], ensure_ascii=False)
    assert HOSTILE.partition("$$")[0] in labels.replace('\\"', '"')
    assert "$$" not in labels


def test_pictures_that_would_make_a_page_too_large_are_named():
    page = Page("pictures", pictures=300)
    page.picture("a.png", bytes(290), "The first.")
    page.picture("run/b.png", bytes(11), "The second.")
    found = Tags(page.html())
    assert found.tags.count("img") == 1
    assert "The second. It is too large for this page: run/b.png" in found.words


def test_a_page_that_fails_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    config = small("fedbuff", workdir=str(tmp_path), max_time=2.0)

    def broken(*_):
        raise AttributeError("no such chart")

    monkeypatch.setattr(run, "page", broken)
    result = runner.run(config, keep_record=True)
    assert json.loads((tmp_path / "summary.json").read_text()) == result.summary
    assert "report.html: not drawn (no such chart)" in caplog.text
    assert not list(tmp_path.glob("report.html*"))


def test_pictures_of_two_channels_and_of_rejected_uploads(tmp_path, caplog):
    """A rejected upload is not blended at all; channels without colours are drawn as their mean."""
    rng = np.random.default_rng(0)
    labels = np.arange(240, dtype=np.int32) % 3
    images = rng.integers(0, 255, (240, 8, 8, 2), np.uint8)
    ends = ("train", "validation", "distillation", "test")
    parts = np.split(np.arange(240, dtype=np.int32), [200, 210, 220])
    config = small("fedrevive", workdir=str(tmp_path), fault_rate=0.3, fault_kinds="nan")
    dataset = Dataset("two", 3, images, labels, dict(zip(ends, parts, strict=True)))
    result = runner.run(config, dataset=dataset, keep_record=True)
    assert result.summary["rejected"]["not_finite"] > 0
    assert result.summary["revived"] > 0
    assert "not drawn" not in caplog.text
    for name in ("synthetic.png", "revival.png", "report.html", "summary.json"):
        assert (tmp_path / name).stat().st_size > 0


def test_a_run_that_failed_has_a_page(tmp_path):
    config = small("fedbuff", workdir=str(tmp_path), client_lr=1e30, checkpoint_every=100)
    with pytest.raises(runner.DivergenceError):
        runner.run(config, keep_record=True)
    assert "training has diverged" in Tags((tmp_path / "report.html").read_text()).words


def test_the_start_of_a_run_does_not_wait_for_the_charts():
    code = "import sys, fedrevive_jax.running.runner, fedrevive_jax.comparison.report as r\n"
    code += "assert 'bokeh' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- a page that follows a run --------------------------------------------------------------------


@pytest.fixture
def watched(tmp_path):
    """A folder and the server of its page."""
    folder = recorded(tmp_path, summary=False)
    with Watch(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, server
        server.shutdown()
        thread.join()


def get(server, path):
    link = http.client.HTTPConnection(*server.server_address)
    link.request("GET", path)
    reply = link.getresponse()
    return reply.status, reply.read().decode()


def test_a_watched_page_follows_the_record(watched):
    folder, server = watched
    assert server.server_address[0] == "127.0.0.1"
    _, first = get(server, "/")
    _, stamp = get(server, "/stamp")
    assert f'data-stamp="{stamp}"' in first
    assert get(server, "/") == (200, first)
    row = json.loads((folder / "arrivals.jsonl").read_text().splitlines()[-1])
    with (folder / "arrivals.jsonl").open("a") as stream:
        stream.write(json.dumps({**row, "index": 40, "version": 40}) + "\n")
    _, later = get(server, "/stamp")
    assert later != stamp
    _, second = get(server, "/")
    assert f'data-stamp="{later}"' in second
    assert "up to version 40, 41 arrivals" in second
    assert get(server, "/config.json")[0] == 404
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "arrivals.jsonl",
    }  # nothing is written, no lock is taken  # fmt: skip


def test_a_record_that_cannot_be_read_is_no_end(watched):
    folder, server = watched
    before = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("damaged\n")
    status, text = get(server, "/")
    assert (status, "metrics.jsonl line 1 is damaged" in text) == (200, True)
    (folder / "metrics.jsonl").write_text(before)
    assert "Accuracy and loss" in get(server, "/")[1]


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end(tmp_path):
    folder = recorded(tmp_path)
    with started(f"--workdir={folder}", "--port=0", program="watch") as process:
        line = process.stdout.readline()
        port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ shows .*; Ctrl-C ends it", line)[1])
        link = http.client.HTTPConnection("127.0.0.1", port)
        link.request("GET", "/")
        assert b"Finished: accuracy" in link.getresponse().read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")


@pytest.mark.slow
def test_what_cannot_be_watched_is_told_in_one_line(tmp_path):
    folder = recorded(tmp_path / "run")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            ([], "--workdir=: must name the folder of a run"),
            ([f"--workdir={tmp_path}"], f"--workdir={tmp_path}: must be the folder of a run, with"),
            ([f"--workdir={folder}", "--port=70000"], "--port=70000: must be 0 to 65535"),
            ([f"--workdir={folder}", f"--port={port}"], f"--port={port}: is in use; give another"),
            (["--workdir=gs://a/b"], "--workdir=gs://a/b: must be a path of this machine"),
        ):
            ended = call(*arguments, program="watch")
            assert (ended.returncode, ended.stdout) == (1, "")
            assert ended.stderr.startswith(f"error: {message}")
            assert ended.stderr.count("\n") == 1


# --- in a browser ---------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        # As root, in a container, it has no sandbox of its own.
        chromium = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Opened:
    """A page in a browser: what it asked the network for, and what it complained of."""

    def __init__(self, browser, address, scheme="light"):
        self.page = browser.new_page(
            color_scheme=scheme, viewport={"width": 1200, "height": 900}, device_scale_factor=1
        )
        self.page.set_default_timeout(120_000)  # milliseconds; a busy machine draws slowly
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self.hear)
        self.page.goto(address)
        self.wait()

    def hear(self, message):
        """Bokeh warns of a chart in which everything is hidden; nothing is at first."""
        if message.type == "error" or (message.type == "warning" and "initial" not in message.text):
            self.complaints.append(message.text)

    def wait(self):
        self.page.wait_for_selector("html[data-ready]")
        self.page.wait_for_function("!window.Bokeh || Bokeh.documents.every(own => own.is_idle)")

    def asked(self):
        """What was asked for beside the file itself and what it holds."""
        return [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]

    def pixels(self, chart, color):
        """How many pixels of a chart have a colour."""
        from PIL import Image

        self.wait()
        data = self.page.locator(f"#{chart}").screenshot(animations="disabled")
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16)
        wanted = np.asarray([int(color[at : at + 2], 16) for at in (1, 3, 5)])
        return int((np.abs(image - wanted).max(-1) < 40).sum())


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """The page of a comparison of three methods over two seeds; one name is hostile."""
    out = tmp_path_factory.mktemp("comparison")
    summary = {
        "simulated_time": 9.0, "versions": 7, "staleness_mean": 1.5, "bytes_sent": 3_000_000,
        "server_seconds_per_arrival": 0.002, "wall_seconds": 4.0, "device": "cpu",
    }  # fmt: skip
    groups = {
        label: [
            Run(
                resolve("digits", "fedbuff", seed=seed),
                [
                    {"version": i, "time": float(i), "wall_seconds": i / 2, "loss": 1.0}
                    | {"accuracy": height + 0.02 * seed + 0.01 * i}
                    for i in range(10)
                ],
                summary,
                np.arange(4 * seed + 1) + len(label) % 7,
                Path(f"{label[:3]}_{seed}"),
            )
            for seed in (0, 1)
        ]
        for label, height in (("fedbuff", 0.1), ("ca2fl", 0.7), (HOSTILE, 0.4))
    }
    report.write(out, report.Study("three methods", "compare --x='<&>'", groups, (0.5,)))
    return out / "report.html"


def test_the_page_of_a_comparison_holds_its_curves(comparison):
    page = Tags(comparison.read_text())
    assert page.charts.keys() == {"time", "wall_seconds", "staleness"}
    tags = [curve["attributes"]["tags"] for curve in page.charts["time"]["renderers"]]
    for label in ("fedbuff", "ca2fl", HOSTILE):
        for kind in ("seed:0", "seed:1", "seed:mean", "seed:mean"):  # the band, and the line
            tags.remove([f"method:{label}", kind])
    assert tags == []
    assert page.tags.count("input") == 3 + 3
    assert comparison.stat().st_size < MOST_BYTES


def test_many_runs_are_shown_by_their_means(tmp_path):
    """Each is evaluated 500 times; 100 runs have curves of their own, of all 150 points."""
    rows = [
        {"version": i, "time": float(i), "wall_seconds": float(i), "loss": 1.0, "accuracy": 0.5}
        for i in range(500)
    ]
    summary = {"simulated_time": 500.0, "versions": 500, "device": "cpu"}
    for labels, seeds in ((50, 1), (25, 4), (20, 6)):
        groups = {
            f"fedrevive distillation_steps={i}": [
                Run(resolve("digits", "fedbuff", seed=seed), rows, summary, np.arange(9), tmp_path)
                for seed in range(seeds)
            ]
            for i in range(labels)
        }
        drawn, own = min(labels, 40), 0 if labels * seeds > 100 else min(labels, 40) * seeds
        report.write(tmp_path, report.Study("many", "", groups))
        page = Tags((tmp_path / "report.html").read_text())
        assert len(page.charts["time"]["renderers"]) == 2 * drawn + own
        assert ("These are 120 runs, too many" in page.words) == (own == 0)
        assert ("The first 40 of 50 lines" in page.words) == (labels == 50)
        assert ("150 evaluations are drawn" in page.words) == (own == 100)
        # Pictures may come on top.
        assert (tmp_path / "report.html").stat().st_size < MOST_BYTES - 400_000


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_comparison_in_a_browser(browser, comparison, scheme):
    opened = Opened(browser, comparison.as_uri(), scheme)
    paper = {"light": "#ffffff", "dark": "#15171b"}[scheme]
    assert opened.pixels("chart0", paper) > 100_000
    # A method's curve is there, and is gone once it is switched off; the others stay.
    first, second = charts.color(0), charts.color(1)
    with_both = opened.pixels("chart0", first), opened.pixels("chart0", second)
    assert min(with_both) > 200
    opened.page.get_by_label("fedbuff", exact=True).uncheck()
    assert opened.pixels("chart0", first) == opened.pixels("chart2", first) == 0
    assert opened.pixels("chart0", second) > 200
    opened.page.get_by_label("fedbuff", exact=True).check()
    assert opened.pixels("chart0", first) == with_both[0]
    # Seeds come when they are asked for, and the mean goes.
    opened.page.get_by_label("mean", exact=True).uncheck()
    assert opened.pixels("chart0", second) == 0
    opened.page.get_by_label("1", exact=True).check()
    visible = "Bokeh.documents[0].roots()[0].renderers.filter(r => r.visible).map(r => r.tags[1])"
    assert opened.page.evaluate(visible) == ["seed:1"] * 3
    assert opened.asked() == []
    assert opened.complaints == []


@pytest.mark.slow
@in_a_browser
def test_tables_sort(browser, comparison):
    opened = Opened(browser, comparison.as_uri())
    table = opened.page.locator("table").first

    def labels():
        return table.locator("tbody td:first-child").all_text_contents()

    assert labels() == ["fedbuff", "ca2fl", HOSTILE]
    head = table.locator("th", has_text=re.compile("^final$"))
    head.click()
    assert labels() == ["fedbuff", HOSTILE, "ca2fl"]
    head.click()
    assert labels() == ["ca2fl", HOSTILE, "fedbuff"]
    # What has no number is last; names go by the alphabet.
    table.locator("th", has_text=re.compile("^time to")).click()
    assert labels()[-1] == "fedbuff"
    table.locator("th").first.click()
    assert labels()[1:] == ["ca2fl", "fedbuff"]
    assert opened.complaints == []


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_run_in_a_browser(browser, tmp_path, scheme):
    folder = recorded(tmp_path, dfkd=True, rejected=HOSTILE, arrivals=3000, clients=90)
    run.write(folder)
    opened = Opened(browser, (folder / "report.html").as_uri(), scheme)
    for place in range(len(shown(folder).charts)):
        drawn = sum(opened.pixels(f"chart{place}", charts.color(i)) for i in range(5))
        assert drawn > 20 or place == jobs_place(folder)
    # A name under the pointer is a text, too: the two charts with hostile names.
    names = list(shown(folder).charts)
    for name in ("rejections", "jobs"):
        chart = opened.page.locator(f"#chart{names.index(name)}")
        box = chart.bounding_box()
        for step in range(1, 20):
            chart.hover(position={"x": box["width"] * step / 20, "y": box["height"] / 2})
    assert opened.page.locator("img[src=x]").count() == 0
    # Charts over the same time move together.
    together = "Bokeh.documents[0].roots().filter(f => f.name.startsWith('arrivals/') ||"
    together += " f.name === 'jobs').map(f => f.x_range.id)"
    assert len(set(opened.page.evaluate(together))) == 1
    assert opened.asked() == []
    assert opened.complaints == []


def jobs_place(folder):
    """The chart of the jobs, which is shaded."""
    return list(shown(folder).charts).index("jobs")


@pytest.mark.slow
@in_a_browser
def test_a_watched_page_refreshes_itself_and_keeps_its_zoom(browser, watched):
    folder, server = watched
    host, port = server.server_address
    opened = Opened(browser, f"http://{host}:{port}/")
    box = opened.page.locator("#chart0").bounding_box()
    opened.page.mouse.move(box["x"] + 300, box["y"] + 100)
    opened.page.mouse.down()
    opened.page.mouse.move(box["x"] + 600, box["y"] + 200, steps=3)
    opened.page.mouse.up()
    ranges = "(f => [f.x_range.start, f.x_range.end])(Bokeh.documents[0].roots()[0])"
    before = opened.page.evaluate(ranges)
    rows = files.read_rows(folder / "arrivals.jsonl")
    lines(folder / "arrivals.jsonl", [*rows, {**rows[-1], "version": 40}])
    opened.page.get_by_text("up to version 40, 41 arrivals").wait_for()
    opened.wait()
    assert opened.page.evaluate(ranges) == before
    assert opened.complaints == []
