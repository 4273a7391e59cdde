"""Figures and statistics of a comparison by hand, the choice of rates, and its files."""

import csv
import dataclasses
import html.parser
import io
import json
import math
import re
import signal
import urllib.parse
from pathlib import Path

import numpy as np
import pytest

from fedrevive_jax.comparison import campaign, plans, report, runs, statistics, tuning
from fedrevive_jax.comparison.statistics import Run
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.presets import resolve
from fedrevive_jax.record import plots
from fedrevive_jax.running import runner
from tests.commands import call, flags, started
from tests.toys import SMALL


def evaluations(*pairs):
    return [
        {"version": i, "time": time, "wall_seconds": 2 * time, "accuracy": accuracy, "loss": 1.0}
        for i, (time, accuracy) in enumerate(pairs)
    ]


def recorded(
    method="fedbuff",
    seed=0,
    pairs=((0.0, 0.1), (2.0, 0.5)),
    diverged=False,
    staleness=1.5,
    end=None,
    **fields,
):
    summary = {
        "simulated_time": pairs[-1][0] if end is None else end,
        "versions": fields.setdefault("max_versions", 7), "staleness_mean": staleness,
        "server_seconds_per_arrival": 0.002,
        "bytes_sent": 3_000_000, "wall_seconds": 4.0, "device": "cpu",
    }  # fmt: skip
    return Run(
        resolve("digits", method, seed=seed, **fields),
        evaluations(*pairs),
        None if diverged else summary,
        np.asarray([0, 1, 2]),
        Path(f"{method}_{seed}"),
    )


# --- figures, statistics --------------------------------------------------------------------------


def test_figures_by_hand():
    """Area to 4: 0.1 * 1 + 0.5 * 2 + 0.3 * 1 = 1.4, over 4: a model counts until the next one."""
    run = recorded(pairs=((0.0, 0.1), (1.0, 0.5), (3.0, 0.3)))
    told = statistics.figures(run, (0.3, 0.6), horizon=4.0)
    assert told == {
        "final": 0.3, "best": 0.5, "last ten": pytest.approx(0.3), "area": pytest.approx(0.35),
        "last quarter": 0.3,
        "time to 0.3": 1.0, "time to 0.6": math.inf, "versions": 7.0, "staleness": 1.5,
        "server ms": 2.0, "sent MB": 3.0, "seconds": 4.0,
    }  # fmt: skip
    assert statistics.time_to(run.evaluations, 0.5) == 1.0  # reached is enough
    assert statistics.area(run.evaluations, 1.0) == pytest.approx(0.1)
    assert statistics.area(run.evaluations, 2.0) == pytest.approx((0.1 + 0.5) / 2)
    assert statistics.area(run.evaluations, 0.0) == 0.1
    many = evaluations(*((float(i), i / 100) for i in range(30)))
    # 0.21 from 21.75 to 22, then 0.22 to 0.28 for 1 each.
    quarter = (0.21 / 4 + 7 * 0.25) / 7.25
    assert statistics.last_quarter(many, 29.0) == pytest.approx(quarter)
    # Versions that came seldom stay; and a curve that ends early stays there.
    assert statistics.last_quarter(many[::29], 29.0) == 0.0
    assert statistics.last_quarter(many[:1], 29.0) == 0.0
    assert statistics.last_quarter(many, 40.0) == pytest.approx(0.29)
    early = recorded(pairs=((0.0, 0.1), (1.0, 0.2)), diverged=True)
    assert statistics.common_end([run, recorded(), early]) == 2.0
    assert statistics.common_end([early]) == 0.0
    # A round that never ends: evaluated at the start alone, but it lasted as long as it was given.
    waiting = recorded("fedavg", pairs=((0.0, 0.1),), end=1.5, max_time=2.5)
    waiting.summary["versions"] = 1
    assert statistics.common_end([run, waiting]) == statistics.covered(waiting) == 2.5
    # Everything is told at the horizon, whatever a run did later.
    told = statistics.figures(run, (0.5, 0.55), horizon=2.0)
    assert (told["final"], told["time to 0.5"], told["time to 0.55"]) == (0.5, 1.0, math.inf)
    assert told["last ten"] == pytest.approx(0.3)
    told = statistics.figures(run, (0.3, 0.6), horizon=4.0)
    assert statistics.last_mean(many) == pytest.approx(0.245)
    lost = statistics.figures(recorded(diverged=True), (0.5,))
    assert lost.keys() == {*told, "time to 0.5"} - {"time to 0.3", "time to 0.6"}
    assert all(map(math.isnan, lost.values()))


def test_spread():
    assert statistics.spread([1.0, 3.0, math.inf]) == (2.0, pytest.approx(math.sqrt(2)), 2)
    assert statistics.spread([5.0])[::2] == (5.0, 1)
    assert all(map(math.isnan, statistics.spread([math.nan])[:2]))


def test_paired_difference_by_hand():
    """t_1 = 12.7062 and t_2 = 4.3027, the 97.5% quantiles of a table."""
    ours, theirs = {1: 0.5, 2: 0.9, 3: 0.1}, {1: 0.4, 2: 0.5, 4: 0.7}
    difference = statistics.paired_difference(ours, theirs)
    reach = 12.7062 * 0.3 / math.sqrt(2) / math.sqrt(2)  # of 0.1 and 0.4
    assert difference == pytest.approx((0.25, 0.25 - reach, 0.25 + reach, 2), rel=1e-4)
    three = statistics.paired_difference({0: 0.1, 1: 0.2, 2: 0.6}, dict.fromkeys(range(3), 0.0))
    reach = 4.3027 * math.sqrt(0.07) / math.sqrt(3)  # squares of -0.2, -0.1, 0.3 over n - 1
    assert three == pytest.approx((0.3, 0.3 - reach, 0.3 + reach, 3), rel=1e-4)
    same = statistics.paired_difference({1: 0.6, 2: 0.9}, {1: 0.5, 2: 0.8})
    assert same == pytest.approx((0.1, 0.1, 0.1, 2))
    one = statistics.paired_difference({1: 0.6, 2: math.nan}, {1: 0.5, 2: 0.8})
    assert one.mean == pytest.approx(0.1)
    assert math.isnan(one.low)
    assert one.pairs == 1
    assert math.isnan(statistics.paired_difference({1: 0.6}, {2: 0.5}).mean)


@pytest.mark.parametrize("seeds", [3, 5, 20])
def test_the_interval_covers_the_truth(seeds):
    """In 95% of 2000 comparisons, four standard errors of which are 2%. Seeds move both methods by
    0.2, one is better by 0.01.

    From the smallest to the largest of three differences, where a bootstrap ends, is the control:
    that covers 75%.
    """
    generator = np.random.default_rng(3)
    covered = outermost = 0
    for _ in range(2000):
        level = generator.normal(0.5, 0.2, seeds)
        better = level + 0.01 + generator.normal(0, 0.01, seeds)
        told = statistics.paired_difference(dict(enumerate(better)), dict(enumerate(level)))
        covered += told.low <= 0.01 <= told.high
        outermost += min(better - level) <= 0.01 <= max(better - level)
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)
    if seeds == 3:
        assert outermost / 2000 == pytest.approx(0.75, abs=0.04)


def test_pairing_is_what_tells_methods_apart():
    """Pairs that are mixed up are the control: their interval is wide and finds no difference."""
    generator = np.random.default_rng(3)
    level = generator.normal(0.5, 0.2, 40)
    better = dict(enumerate(level + 0.01 + generator.normal(0, 0.01, 40)))
    assert statistics.paired_difference(better, dict(enumerate(level))).low > 0
    mixed = statistics.paired_difference(better, dict(enumerate(np.roll(level, 1))))
    assert mixed.low < 0 < mixed.high


def test_groups_are_told_apart_by_what_differs():
    runs = [
        recorded(seed=2), recorded(seed=1), recorded("afl_dw"),
        recorded("fedavg", client_lr=0.1), recorded("fedavg", client_lr=0.2),
    ]  # fmt: skip
    groups = statistics.grouped(runs)
    assert list(groups) == ["fedbuff", "afl_dw", "fedavg client_lr=0.1", "fedavg client_lr=0.2"]
    assert [run.config.seed for run in groups["fedbuff"]] == [1, 2]
    with pytest.raises(ConfigError, match="are both fedbuff, seed 2"):
        statistics.grouped([*runs, recorded(seed=2)])
    # Those that have a name of their own are not mixed with their method's.
    named = recorded(seed=2, client_lr=0.1)._replace(label="small rate")
    assert list(statistics.grouped([*runs[:2], named])) == ["fedbuff", "small rate"]


def test_the_table():
    """Two seeds against two, of which one diverged; a target that one run never reaches."""
    groups = {
        "a": [recorded(seed=s, pairs=((0.0, 0.1), (2.0, 0.5 + s / 10))) for s in (0, 1)],
        "b": [recorded("afl_dw", 0, ((0.0, 0.1), (1.5, 0.9), (4.0, 0.95))),
              recorded("afl_dw", 1, diverged=True)],
    }  # fmt: skip
    rows = statistics.table(groups, (0.55, 0.95))
    header, a, b = statistics.cells(rows)
    table = {name: (x, y) for name, x, y in zip(header, a, b, strict=True)}
    assert table["seeds"] == ("2", "2, 1 failed")
    assert table["final"] == ("0.550 ± 0.071", "0.900 (1 of 2)")
    assert table["final − a"] == ("–", "+0.400 (1 of 2)")
    assert table["time to 0.55"] == ("2.0 (1 of 2)", "1.5 (1 of 2)")
    assert table["time to 0.95"] == ("never", "never")
    # All is told where the shortest run ends, at 2: what b reaches at 4 is left out.
    assert table["area"] == ("0.100 ± 0.000", "0.300 (1 of 2)")
    assert table["best"] == ("0.550 ± 0.071", "0.900 (1 of 2)")
    lines = statistics.markdown([header, a, b]).splitlines()
    assert lines[1] == "|" + "---|" * len(header)
    assert len(lines) == 4
    parsed = list(csv.DictReader(io.StringIO(statistics.as_csv(rows))))
    assert float(parsed[1]["final mean"]) == 0.9
    assert parsed[1]["final std"] == parsed[1]["final low"] == parsed[0]["final difference"] == ""
    assert float(parsed[1]["final difference"]) == pytest.approx(0.4)


def test_other_worlds_are_not_paired():
    groups = {
        "a": [recorded(seed=0), recorded(seed=1)],
        "a|lr": [recorded(seed=0, server_lr=0.7, max_versions=9), recorded(seed=1, server_lr=0.7)],
        "b": [recorded(seed=0), recorded(seed=1, alpha=0.9)],
    }
    header, _, same, other = statistics.cells(statistics.table(groups))
    at = header.index("last quarter − a")
    assert (same[at], other[at]) == ("+0.000 [+0.000, +0.000]", "not paired")
    assert r"| a\|lr |" in statistics.markdown([header, same])
    rows = csv.DictReader(io.StringIO(statistics.as_csv(statistics.table(groups))))
    assert [row["final difference"] for row in rows] == ["", "0.0", ""]


def test_a_shorter_world_does_not_cut_the_others():
    """At as many arrivals, four times the concurrency takes a quarter of the time. a goes to its
    own end, 2; b's runs both to that of its shortest, 0.5."""
    groups = {
        "a": [recorded(concurrency=5, pairs=((0.0, 0.1), (1.0, 0.5), (2.0, 0.6)))],
        "b": [
            recorded(seed=0, concurrency=20, pairs=((0.0, 0.1), (0.25, 0.3), (0.5, 0.4))),
            recorded(seed=1, concurrency=20, pairs=((0.0, 0.2), (1.0, 0.9))),
        ],
    }
    a, b = statistics.table(groups)
    assert a.spreads["last quarter"].mean == pytest.approx(0.5)
    assert a.spreads["area"].mean == pytest.approx(0.3)
    assert b.spreads["area"].mean == pytest.approx((0.2 + 0.2) / 2)
    assert b.spreads["final"].mean == pytest.approx((0.4 + 0.2) / 2)
    assert not b.paired


def test_a_difference_says_how_many_pairs_it_is_of():
    """Seeds 0 and 1 against 1, 2 and 3: one pair of three seeds."""
    groups = {
        "a": [recorded(seed=s) for s in (0, 1)],
        "b": [recorded("afl_dw", s, ((0.0, 0.1), (2.0, 0.9))) for s in (1, 2, 3)],
    }
    rows = statistics.table(groups)
    header, _, b = statistics.cells(rows)
    assert b[header.index("final − a")] == "+0.400 (1 of 3)"
    parsed = list(csv.DictReader(io.StringIO(statistics.as_csv(rows))))
    assert parsed[1]["final pairs"] == "1"


@pytest.mark.parametrize(
    "name",
    [
        "dataset", "eval_split", "num_clients", "partition", "alpha", "samples_per_client",
        "delays", "delay_mean", "delay_spread", "delay_download", "delay_upload", "delay_trace",
        "fault_rate", "fault_kinds", "max_time", "concurrency",
    ],
)  # fmt: skip
def test_what_makes_another_world(name):
    default = resolve("digits", "fedbuff")
    given = getattr(default, name)
    # Past the limits of a configuration: only whether they are equal matters.
    other = dataclasses.replace(default)
    object.__setattr__(other, name, f"not {given}" if isinstance(given, str) else given + 1)
    groups = {"a": [recorded()], "b": [recorded()._replace(config=other)]}
    assert not statistics.table(groups)[1].paired


@pytest.mark.parametrize("top", [0, 1, 39, 40, 100, 119, 1000])
def test_a_histogram_of_staleness_holds_all(top):
    counts, _ = np.histogram(np.arange(top + 1), plots.staleness_bins(top))
    assert counts.sum() == top + 1
    assert len(counts) <= 80


def test_accuracy_by_staleness(tmp_path):
    """A line for what differs in concurrency alone, and only where a method comes at several."""

    def runs(*concurrencies, **fields):
        return [
            recorded("afl_dw", concurrency=k, max_time=200 / k, staleness=k - 1.0, **fields)
            for k in concurrencies
        ]

    def groups(*runs):
        other = [recorded("fedbuff", concurrency=7, staleness=6.0), recorded("ace", diverged=True)]
        return statistics.grouped([*runs, *other])

    def lines(*runs):
        study = report.Study("", "", groups(*runs))
        return {
            label: [(x, round(y.mean, 3)) for x, y in line]
            for label, line in report.staleness_lines(study, statistics.table(study.groups)).items()
        }

    assert lines(*runs(5)) == {}  # two methods at different concurrencies are no line
    assert lines(*runs(20, 5)) == {
        "afl_dw": [(4.0, 0.1), (19.0, 0.1)], "fedbuff": [(6.0, 0.1)],
    }  # fmt: skip
    found = lines(*runs(20, 5), *runs(10, 5, server_lr=0.7))
    assert {label: len(line) for label, line in found.items()} == {
        "afl_dw server_lr=0.1": 2, "afl_dw server_lr=0.7": 2, "fedbuff": 1,
    }  # fmt: skip
    out = tmp_path / "new" / "folder"
    report.write(out, report.Study("several", "", groups(*runs(20, 5))))
    assert (out / "by_staleness.png").exists()
    assert "by_staleness" in (out / "report.html").read_text()
    report.write(out, report.Study("one", "", groups(*runs(5))))
    assert not (out / "by_staleness.png").exists()  # of an earlier comparison
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out=.*file: cannot be made"):
        report.write(tmp_path / "file", report.Study("one", "", groups(*runs(5))))


def test_all_methods_are_evaluated_at_the_same_times(tmp_path):
    """Unless the user says how often; a longer run is evaluated as often as a shorter one."""
    methods = ("fedbuff", "fedavg", "fedrevive")
    for given, interval in (
        ({}, 40.0 / 50), ({"max_time": 10}, 0.2), ({"eval_every": 3}, 0.0),
        ({"eval_interval": 5}, 5.0),
    ):  # fmt: skip
        configs = plans.of_methods({"dataset": "digits", **given}, methods, 1, tmp_path)
        assert {config.eval_interval for config in configs} == {interval}


# --- the choice of rates --------------------------------------------------------------------------


def test_the_axes_of_a_method():
    config = resolve("digits", "fedbuff", server_lr=0.3, client_lr=0.01)
    axes = tuning.axes(["server_lr=x3,0.2,x0.3", "client_lr=x1"], config)
    assert axes == [
        tuning.Axis("server_lr", (0.09, 0.2, 0.3, 0.9), True),
        tuning.Axis("client_lr", (0.01,), True),
    ]
    for text in ("server_lr=x", "server_lr=0.1,,2", "server_lr=a"):
        with pytest.raises(ConfigError, match=r"tune_grid=.*: must be numbers, or factors"):
            tuning.axes([text], config)
    with pytest.raises(ConfigError, match="server_lr=-1"):
        tuning.axes(["server_lr=-1"], config)
    for text in ("seed=1,2", "eval_split=test", "nothing=1", "server_lr", "mesh=1", "alpha=9"):
        with pytest.raises(ConfigError, match=r"tune_grid=.*: must be FIELD=v1,v2"):
            tuning.axes([text], config)
    with pytest.raises(ConfigError, match="must not name a field twice"):
        tuning.axes(["server_lr=1", "server_lr=2"], config)


def test_a_method_is_tuned_by_what_it_reads():
    grid = ["server_lr=x3", "distillation_steps=x2", "beta_shape=linear", "beta_s_max=x2"]
    fields = {
        method: [axis.field for axis in tuning.axes(grid, resolve("digits", method))]
        for method in ("fedbuff", "afl_dw", "fedrevive")
    }
    assert fields == {
        "fedbuff": ["server_lr"],
        "afl_dw": ["server_lr", "beta_shape", "beta_s_max"],
        "fedrevive": ["server_lr", "distillation_steps", "beta_shape", "beta_s_max"],
    }
    steps, shapes = tuning.axes(grid[1:3], resolve("digits", "fedrevive", distillation_steps=5))
    assert steps.values == (5, 10)
    assert shapes == tuning.Axis("beta_shape", ("cosine", "linear"), False)


def searched(grid, score, runs, legal=lambda point: True, **fields):
    """The batches that a search asks for, and its choice."""
    config = resolve("digits", "fedrevive", **fields)
    search = tuning.search(tuning.axes(grid, config), config, runs, legal)
    batches = [next(search)]
    while True:
        try:
            batches.append(search.send({point: score(*point) for point in batches[-1]}))
        except StopIteration as end:
            return batches, end.value


def test_a_search_goes_on_where_the_best_is_at_an_edge():
    """The score falls with the distance of log rate from that of 1; 0.1 is the preset's. The values
    beyond 0.3 keep the ratio of the last two, 3, and end one past the best."""

    def score(rate):
        return -abs(math.log(rate))

    batches, choice = searched(["server_lr=x0.3,x3"], score, 6, server_lr=0.1)
    assert batches[:2] == [[(0.1,)], [(0.03,), (0.3,)]]
    assert batches[2:] == [[(0.9,)], [(2.7,)], [(0.519615,)]]
    assert (choice.point, choice.edges) == ((0.9,), ())
    assert choice.settings == {"server_lr": 0.9}
    assert len(choice.scores) == 6
    # Without a run for the value beyond 0.9 the best is told to lie on the edge.
    _, choice = searched(["server_lr=x0.3,x3"], score, 4, server_lr=0.1)
    assert (choice.point, choice.edges) == ((0.9,), ("server_lr",))
    # A value that the configuration does not allow is not tried.
    batches, choice = searched(
        ["server_lr=x0.3,x3"], score, 6, legal=lambda point: point[0] < 0.5, server_lr=0.1
    )
    assert all(point < (0.5,) for point in choice.scores)
    assert choice.point == max(choice.scores)


def test_a_search_tries_one_field_after_the_other_and_comes_back():
    """The best server rate depends on the client rate: 0.1 at 0.01, 0.3 at 0.03."""

    def score(server, client):
        return -(math.log(server / client / 10) ** 2) - 2 * math.log(client / 0.03) ** 2

    batches, choice = searched(
        ["server_lr=x0.333333,x3", "client_lr=x3"], score, 9, server_lr=0.1, client_lr=0.01
    )
    assert [point for batch in batches[:3] for point in batch] == [
        (0.1, 0.01), (0.0333333, 0.01), (0.3, 0.01), (0.1, 0.03),
    ]  # fmt: skip
    assert choice.point == (0.3, 0.03)


def test_every_method_tries_as_many_points():
    for grid in (["server_lr=x3"], ["server_lr=x3", "distillation_lr=x3", "num_teachers=2,4"]):
        for count in (1, 2, 7, 20):
            batches, choice = searched(grid, lambda *point: -sum(point), count)
            assert len(choice.scores) == sum(map(len, batches)) == count
    # A field of words has an end; nothing is tried twice.
    batches, choice = searched(
        ["beta_shape=constant,linear"], lambda shape: float(shape == "linear"), 9
    )
    assert [point for batch in batches for point in batch] == [
        ("cosine",), ("constant",), ("linear",),
    ]  # fmt: skip
    assert (choice.point, choice.edges) == (("linear",), ())


def test_of_equal_points_the_first_is_chosen_and_a_failed_one_never():
    _, choice = searched(["server_lr=x3"], lambda rate: 0.5, 3, server_lr=0.1)
    assert choice.point == (0.1,)
    _, choice = searched(
        ["server_lr=0.2,0.3"], lambda rate: 0.5 if rate == 0.2 else -math.inf, 3, server_lr=0.1
    )
    assert choice.point == (0.2,)
    shown = tuning.cells({"fedbuff": choice})
    assert shown[0] == ["method", "server_lr", "validation, last quarter", "equal", "all scores"]
    assert shown[1] == ["fedbuff", "0.2", "0.500", "1 of 3", "0.1: failed; 0.2: 0.500; 0.3: failed"]
    with pytest.raises(ConfigError, match="every run of the search of fedrevive failed"):
        searched(["server_lr=x3"], lambda rate: -math.inf, 3)


def test_tuning_is_kept_apart_from_the_comparison(tmp_path):
    """A run's score here is its server rate, over the last quarter; afl_dw's largest fails."""
    given = {"dataset": "digits", "seed": "3", "max_time": "4"}
    asked = []

    def run(configs):
        asked.extend(configs)
        return [
            recorded(
                config.method, seed=config.seed, pairs=((0.0, 9.0), (1.2, config.server_lr)),
                diverged=config.method == "afl_dw" and config.server_lr > 0.25,
                max_time=config.max_time,
            )
            for config in configs
        ]  # fmt: skip

    methods, out = ["fedbuff", "afl_dw"], tmp_path
    chosen = plans.tune(
        given, methods, ["server_lr=0.1,0.2,0.3"], runs=3, max_time="2", seeds=2, out=out, run=run
    )
    configs = plans.of_methods(given, methods, 2, tmp_path, chosen)
    assert {c.eval_split for c in asked} == {"validation"}
    assert {c.max_time for c in asked} == {2.0}
    assert len(asked) == 2 * 2 * 3
    assert not {c.seed for c in asked} & {c.seed for c in configs}
    assert len({c.workdir for c in asked} | {c.workdir for c in configs}) == 12 + 4
    assert [(c.method, c.server_lr, c.seed, c.eval_split) for c in configs] == [
        ("fedbuff", 0.3, 3, "test"), ("fedbuff", 0.3, 4, "test"),
        ("afl_dw", 0.2, 3, "test"), ("afl_dw", 0.2, 4, "test"),
    ]  # fmt: skip
    assert configs[0].run_dir.name == "fedbuff_tuned_server_lr=0.3_seed3"
    with pytest.raises(ConfigError, match="is chosen by `tune`"):
        plans.tune(
            {**given, "server_lr": "1"}, methods, ["server_lr=x3"], runs=1, max_time=None,
            seeds=1, out=out, run=run,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "[]"),
        ("summary.json", "{}"),
        ("metrics.jsonl", None),
        ("metrics.jsonl", '{"kind": "evaluation", "time": 0.0}\n'),
        ("arrivals.jsonl", '{"index": 0}\n'),
    ],
)
def test_damaged_folders_are_named(tmp_path, name, content):
    config = runner.settle(resolve("digits", "fedbuff"))
    (tmp_path / "config.json").write_text(json.dumps(config.as_dict()))
    (tmp_path / "origin.json").write_text(
        '{"start": "random", "data_sha256": "", "classes": [], "inputs": {}, '
        '"files": {"clients.npz": ""}}'
    )
    (tmp_path / "summary.json").write_text('{"simulated_time": 1.0, "device": "cpu"}')
    row = {"kind": "evaluation", "version": 0, "time": 0.0, "wall_seconds": 1.0, "accuracy": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert statistics.read_run(tmp_path).summary["device"] == "cpu"
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=r"arrivals\.jsonl is damaged"):
        statistics.read_run(tmp_path)


def test_configurations_are_paired(tmp_path):
    given = {"dataset": "digits", "seed": "3", "max_time": "4"}
    configs = plans.of_methods(given, ["fedbuff", "ca2fl"], 2, tmp_path)
    assert [(c.method, c.seed) for c in configs] == [
        ("fedbuff", 3), ("fedbuff", 4), ("ca2fl", 3), ("ca2fl", 4),
    ]  # fmt: skip


def test_ablations(tmp_path):
    fields, configs = plans.of_ablation(
        {"method": "fedrevive", "dataset": "digits"}, ["generation_interval=1,10"], 2, tmp_path
    )
    assert fields == ["generation_interval"]
    assert [(c.generation_interval, c.seed) for c in configs] == [(1, 0), (1, 1), (10, 0), (10, 1)]
    for text in ("seed=1,2", "generation_interval=1", "generation_interval=", "method=a,b"):
        with pytest.raises(ConfigError, match="must be FIELD=v1,v2"):
            plans.of_ablation({}, [text], 1, tmp_path)
    for name in ("none", "preset_scale", "cache_dir", "mesh", "version_memory"):
        with pytest.raises(ConfigError, match=f"{name} must be a setting of the run"):
            plans.of_ablation({}, [f"{name}=1,2"], 1, tmp_path)
    for text in ("alpha=0.1,0.5,0.10", "precision=auto,float32"):  # on a CPU
        with pytest.raises(ConfigError, match=re.escape(f"{text}: must not hold a value twice")):
            plans.of_ablation({}, [text], 1, tmp_path)


def test_one_process_holds_an_accelerator(tmp_path, monkeypatch):
    configs = plans.of_methods({"dataset": "digits"}, ["fedbuff"], 2, tmp_path)
    monkeypatch.setattr(campaign.jax, "default_backend", lambda: "tpu")
    with pytest.raises(ConfigError, match="jobs=2: must be 1 on an accelerator"):
        campaign.run_all(configs, campaign.Workers(jobs=2))


def test_several_ablations_share_one_reference(tmp_path):
    given = {"method": "fedrevive", "dataset": "digits", "num_teachers": 2}
    texts = ["meta=maml", "generation_interval=8,3,16"]  # 8 is the preset's
    assert resolve(**given).generation_interval == 8
    fields, configs = plans.of_ablation(given, texts, 2, tmp_path)
    assert fields == ["meta", "generation_interval"]
    assert [c.run_dir.name for c in configs[::2]] == [
        "fedrevive_seed0", "fedrevive_meta=maml_seed0",
        "fedrevive_generation_interval=3_seed0", "fedrevive_generation_interval=16_seed0",
    ]  # fmt: skip
    assert [c.seed for c in configs] == [0, 1] * 4
    assert {c.num_teachers for c in configs} == {2}
    reference = dataclasses.replace(configs[0], workdir="")
    for config, change in zip(
        configs[2::2],
        ({"meta": "maml"}, {"generation_interval": 3}, {"generation_interval": 16}),
        strict=True,
    ):
        assert dataclasses.replace(config, workdir="") == dataclasses.replace(reference, **change)

    runs = [
        recorded("fedrevive", c.seed, generation_interval=c.generation_interval, meta=c.meta)
        for c in configs
    ]
    assert list(statistics.grouped(runs)) == [
        "fedrevive", "fedrevive meta=maml", "fedrevive generation_interval=3",
        "fedrevive generation_interval=16",
    ]  # fmt: skip
    # Where one run differs in two fields, one field alone does not tell:
    runs.append(recorded("fedrevive", generation_interval=3, meta="maml"))
    assert "fedrevive generation_interval=3 meta=maml" in statistics.grouped(runs)
    assert "fedrevive generation_interval=8 meta=reptile" in statistics.grouped(runs)

    for texts, message in (
        (["meta=maml", "meta=fomaml"], "ablate=meta=fomaml: must not name a field twice"),
        (["meta=maml", "seed=1"], "ablate=seed=1: must be FIELD=v1,v2"),
        (["meta=maml", "alpha="], "ablate=alpha=: must be FIELD=v1,v2"),
        (["meta=maml", "alpha=1,1.0"], "ablate=alpha=1,1.0: must not hold a value twice"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            plans.of_ablation(given, texts, 1, tmp_path)


def test_the_picture_of_several_ablations(tmp_path):
    runs = [
        recorded("fedrevive", seed, ((0.0, 0.1), (1.0, score + 0.01 * seed)), meta=meta)
        for meta, score in (("reptile", 0.5), ("maml", 0.6), ("fomaml", 0.4))
        for seed in (0, 1)
    ]
    groups = statistics.grouped(runs)
    study = report.Study("digits", "compare", groups, swept=["meta", "alpha"])
    report.write(tmp_path, study)
    assert (tmp_path / "ablation.png").stat().st_size > 5_000
    page = (tmp_path / "report.html").read_text()
    assert "Accuracy against fedrevive meta=reptile" in page
    assert "left out" not in page
    # Another world has no difference seed by seed, and is named.
    other = [recorded("fedrevive", seed, alpha=0.9) for seed in (0, 1)]
    report.write(tmp_path, study._replace(groups={**groups, "fedrevive alpha=0.9": other}))
    words = "Not paired, and left out: fedrevive alpha=0.9."
    assert words in (tmp_path / "report.html").read_text()
    alone = dict(list(groups.items())[:1])
    report.write(tmp_path, study._replace(groups={**alone, "fedrevive alpha=0.9": other}))
    assert not (tmp_path / "ablation.png").exists()


def test_a_memory_that_cannot_fit_is_refused_before_the_first_run(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign.client_cache, "host_memory", lambda: 10**6)
    configs = plans.of_methods({"dataset": "digits"}, ["fedbuff", "ca2fl"], 1, tmp_path)
    assert campaign.planning.cache_bytes(configs[0]) == 0
    one = 2 * campaign.planning.cache_bytes(configs[1])  # with the copy of a checkpoint
    two = plans.of_methods({"dataset": "digits"}, ["ca2fl"], 2, tmp_path)
    monkeypatch.setattr(campaign.client_cache, "host_memory", lambda: 2 * one)
    campaign._check_caches(two, 2)
    monkeypatch.setattr(campaign.client_cache, "host_memory", lambda: 2 * one - 1)
    campaign._check_caches(two, 1)
    with pytest.raises(ConfigError, match=r"jobs=2: too many at once\. cache_memory=device"):
        campaign.run_all(two, campaign.Workers(jobs=2))
    monkeypatch.setattr(campaign.client_cache, "host_memory", lambda: 10**6)
    with pytest.raises(ConfigError, match="cache_memory=device: the last updates of"):
        campaign.run_all(configs)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_rejects_too_much_is_marked(tmp_path, monkeypatch):
    """Which error ended it stands in its folder; another one is not swallowed."""
    (config,) = plans.of_methods({"dataset": "digits"}, ["fedbuff"], 1, tmp_path)
    config.run_dir.mkdir()

    def ends(error):
        def run(*args, **kwargs):
            raise error

        monkeypatch.setattr(runner, "run", run)

    ends(runner.RejectLimitError("too many"))
    runs.run(config, overwrite=False)
    assert json.loads((config.run_dir / "failed.json").read_text()) == {
        "by": "RejectLimitError", "message": "too many",
    }  # fmt: skip
    ends(ConfigError("seed", 1, "else"))
    with pytest.raises(ConfigError, match="else"):
        runs.run(config, overwrite=False)


# --- whole comparisons ----------------------------------------------------------------------------

TINY = {**SMALL, "max_time": 4.0, "model_width": 2, "eval_every": 2}


class Page(html.parser.HTMLParser):
    """Tags in order, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.slow
def test_a_signal_saves_the_run_under_way(tmp_path):
    """FedBuff is done long before FedRevive; the same command finishes what is left. How a signal
    reaches other processes is told in `test_cluster`."""
    arguments = flags(**TINY, methods="fedbuff,fedrevive", seeds=1, out=tmp_path)
    with started(*arguments, "--grace=300", program="compare") as process:
        assert re.match("fedbuff_seed0: accuracy", process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert errors.startswith("interrupted: ")
    assert not (tmp_path / "table.md").exists()
    begun, done = ({p.parent for p in tmp_path.glob(f"*/{n}.json")} for n in ("config", "summary"))
    assert len(begun) == 2
    assert len(done) == 1  # the other was told to stop, and not only waited for
    locks = list(tmp_path.glob("*/run.lock"))
    assert locks
    assert all(lock.read_bytes() == b"" for lock in locks)  # whoever held them has let go
    again = call(*arguments, program="compare")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "table.md").exists()
    assert len(list(tmp_path.glob("*/summary.json"))) == 2


@pytest.mark.slow
def test_tuned_comparison_of_what_diverges_and_what_does_not(tmp_path):
    """Two jobs at once; a client rate of 1e30 really diverges, and is not run again."""
    arguments = flags(
        **TINY, methods="fedbuff,ca2fl", seeds=2, out=tmp_path, jobs=2, tune="true",
        tune_grid="client_lr=1e30", tune_runs=2,
    )  # fmt: skip
    first = call(*arguments, program="compare")
    assert first.returncode == 0, first.stderr
    diverged = sorted(path.parent.name for path in tmp_path.glob("tune/*/failed.json"))
    assert diverged == [
        f"{method}_client_lr=1e+30_time4_seed1000" for method in ("ca2fl", "fedbuff")
    ]
    assert "training has diverged" in first.stdout
    for seed in (0, 1):
        config = json.loads(
            (tmp_path / f"fedbuff_tuned_client_lr=0.003_seed{seed}" / "config.json").read_text()
        )
        assert (config["client_lr"], config["eval_split"]) == (0.003, "test")
    text = (tmp_path / "table.md").read_text()
    assert "| fedbuff | 0.003* |" in text
    assert "2 points of each method, begun with client_lr=1e30." in text
    command = (tmp_path / "command.txt").read_text()
    assert command.startswith("python -m experiments.compare --")
    assert "--tune_grid=client_lr=1e30" in command

    page = Page((tmp_path / "report.html").read_text())
    assert page.open == []
    addresses = [a[name] for _, a in page.tags for name in ("src", "href") if name in a]
    linked = [urllib.parse.unquote(way) for way in addresses if not way.startswith("data:")]
    assert linked == [
        f"{method}_tuned_client_lr=0.003_seed{seed}/report.html"
        for method in ("fedbuff", "ca2fl")
        for seed in (0, 1)
    ]
    assert all((tmp_path / way).is_file() for way in linked)
    assert {a["data-tag"] for tag, a in page.tags if "data-tag" in a} == {
        "method:fedbuff", "method:ca2fl", "seed:mean", "seed:0", "seed:1",
    }  # fmt: skip

    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/summary.json")}
    again = call(*arguments, program="compare")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines() == text.splitlines()  # nothing was run, the table is the same
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/summary.json")} == written

    # The same runs, read from where they are.
    folders = f"{tmp_path}/fedbuff_tuned_*,{tmp_path}/ca2fl_tuned_client_lr=0.003_seed0"
    read = call(f"--workdirs={folders}", f"--out={tmp_path}", program="compare")
    assert read.returncode == 0, read.stderr
    assert read.stdout == (tmp_path / "table.md").read_text()
    assert [line.split("|")[1:3] for line in read.stdout.splitlines()[2:]] == [
        [" fedbuff ", " 2 "], [" ca2fl ", " 1 "],
    ]  # fmt: skip
    named = call(
        f"--workdirs={folders.replace(',', ',cached=')}", f"--out={tmp_path}", program="compare"
    )
    assert [line.split("|")[1] for line in named.stdout.splitlines()[2:]] == [
        " fedbuff ",
        " cached ",
    ]


@pytest.mark.slow
def test_an_ablation_continues_what_was_interrupted(tmp_path):
    """In this process: the second value's run has begun already, up to a checkpoint."""
    given = {**TINY, "method": "fedbuff", "checkpoint_every": 1, "seed": 5}
    _, configs = plans.of_ablation(given, ["buffer_size=1,2"], 1, tmp_path)
    lines = []
    (one,) = campaign.run_all(configs[:1], notify=lines.append)
    assert lines == [f"fedbuff_buffer_size=1_seed5: accuracy {one.evaluations[-1]['accuracy']:.4f}"]
    (one.folder / "summary.json").unlink()  # as if it had been killed just before its end
    kept = {path: path.stat().st_mtime_ns for path in one.folder.glob("checkpoints/*/*")}
    runs = campaign.run_all(configs, notify=lines.append)
    assert kept  # and not computed again:
    assert kept == {path: path.stat().st_mtime_ns for path in one.folder.glob("checkpoints/*/*")}
    assert len(lines) == 3
    groups = statistics.grouped(runs)
    assert list(groups) == ["fedbuff buffer_size=1", "fedbuff buffer_size=2"]
    study = report.Study("digits <one>", "compare --x='<&>'", groups, (0.5,), swept=["buffer_size"])
    report.write(tmp_path, study)
    assert (tmp_path / "ablation.png").stat().st_size > 5_000
    page = (tmp_path / "report.html").read_text()
    assert "compare --x=&#x27;&lt;&amp;&gt;&#x27;" in page
    assert "digits &lt;one&gt;" in page
    (runs[0].folder / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"summary\.json cannot be read"):
        campaign.read_all([("", runs[0].folder)])
    other = dataclasses.replace(configs[1], client_lr=0.5)
    with pytest.raises(ConfigError, match="holds a run with another configuration"):
        campaign.run_all([other])
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs=0"], "--jobs=0: must be at least 1"),
        (["--targets=0.5,2"], "--targets=0.5,2: must be accuracies"),
        (["--methods=fedbuff,fedbuff"], "--methods=fedbuff,fedbuff: holds a method twice"),
        (["--tune", "--ablate=alpha=1,2"], "--ablate: must not be given with --tune"),
        (["--tune", "--server_lr=1"], "--server_lr=1: is chosen by --tune here"),
        (["--workdirs=none*"], "--workdirs=none*: there is no none*"),
        (["--workdirs=a=none*"], "--workdirs=a=none*: there is no none*"),
        (["--workdirs=a="], "--workdirs=a=: holds an empty name"),
        (["--ablate=alpha"], "--ablate=alpha: must be FIELD=v1,v2"),
        (["--ablate=alpha=1,2", "--methods=fedbuff"], "--methods=fedbuff: must not be given with"),
        (["--ablate=pretrained=a/b,a_b"], "--ablate=pretrained=a/b,a_b: --pretrained=a_b would"),
        (["--tune_seeds=2"], "--tune_seeds=2: goes with --tune"),
        (["--jobs=2", "--scheduler=tcp://x:1"], "--jobs=2: must not be given with --scheduler"),
        (["--scheduler=x:1"], "--scheduler=x:1: must be tcp://HOST:PORT or tls://HOST:PORT"),
        (["--send_back"], "--send_back=True: goes with --scheduler"),
        (["--tune_grid=alpha=1"], "--tune_grid=alpha=1: goes with --tune"),
        (["--tune", "--tune_grid=seed=1"], "--tune_grid=seed=1: must be FIELD=v1,v2"),
        (["--tune", "--tune_time=long"], "--tune_time=long: must be a number above 0"),
        (["--methods=fedbuff,"], "--methods=fedbuff,: '' must be one of"),
        (["--workdirs="], "--workdirs=: holds an empty name"),
        (["--workdirs=x", "--alpha=1"], "--alpha=1: must not be given with --workdirs"),
        (["--workdirs=x", "--jobs=1"], "--jobs=1: must not be given with --workdirs"),
        (["--out=~nobody_here/x"], "--out=~nobody_here/x: must not name the home"),
        (["--methods=fedavg", "--buffer_size=4"], "--buffer_size=4: must be --concurrency=20"),
        (["--out=/dev/null/x"], "--out=/dev/null/x: cannot be made"),
    ],
)
@pytest.mark.slow
def test_bad_input(tmp_path, arguments, message):
    result = call("--out=x", *arguments, program="compare", cwd=tmp_path)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []
