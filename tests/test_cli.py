"""The commands as a user types them, and one clear line for every bad input."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from fedrevive_jax import models
from fedrevive_jax.clock import schedule
from fedrevive_jax.presets import resolve
from fedrevive_jax.simulation.planning import forward_flops, making_flops, plan
from tests.commands import call, flags
from tests.toys import SMALL


@pytest.mark.slow
def test_run_then_evaluate_then_run_again(tmp_path, monkeypatch):
    # JAX stores what took long to compile, so that a busy machine would store more: here it is all.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    arguments = flags(**{**SMALL, "method": "fedbuff", "max_time": 3, "workdir": tmp_path / "run"})
    cache = f"--compilation_cache_dir={tmp_path / 'programs'}"
    first = call(*arguments, "--profile", cache)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    programs = sorted(path.name for path in (tmp_path / "programs").rglob("*-cache"))
    assert programs
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""  # quiet when the output is not a terminal
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"accuracy {summary['final_accuracy']:.4f}" in first.stdout

    evaluated = call(f"--workdir={tmp_path / 'run'}", program="evaluate")
    assert evaluated.returncode == 0, evaluated.stderr
    figures = json.loads(evaluated.stdout)
    assert figures["accuracy"] == summary["final_accuracy"]
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert figures["loss"] == json.loads(last)["loss"]
    assert figures["version"] == summary["versions"]
    assert len(figures["per_class_accuracy"]) == 10
    validation = call(f"--workdir={tmp_path / 'run'}", "--split=validation", program="evaluate")
    assert json.loads(validation.stdout)["split"] == "validation"
    other = call(f"--workdir={tmp_path / 'run'}", "--split=dev", program="evaluate")
    assert "--split=dev: must be one of distillation, test, train, validation" in other.stderr

    # A fresh run finds all its programs.
    elsewhere = [*arguments[:-1], f"--workdir={tmp_path / 'other'}", cache]
    assert call(*elsewhere).returncode == 0
    assert sorted(path.name for path in (tmp_path / "programs").rglob("*-cache")) == programs
    assert not (tmp_path / "other" / "profile").exists()

    again = call(*arguments)
    assert again.returncode == 0
    assert "finished; nothing to do" in again.stdout
    other = call(*arguments, "--seed=9")
    assert other.returncode == 1
    assert "--seed: 0 in the record, 9 now" in other.stderr
    missing = call(f"--workdir={tmp_path / 'run'}", "--step=12345", program="evaluate")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: --step=12345: no such checkpoint")


def test_dry_run_needs_no_data_and_writes_nothing(tmp_path):
    result = call(
        "--dry_run", "--dataset=fashion_mnist", "--method=fedrevive", "--num_clients=1000",
        "--concurrency=100", "--max_time=200", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["versions"] == pytest.approx(12_650, rel=0.02)
    assert plan["mean_window"] == pytest.approx(28.7, rel=0.06)
    assert plan["live_versions_max"] <= 101
    assert plan["bytes_live_versions"] == plan["live_versions_max"] * plan["bytes_model"]
    assert plan["bytes_model"] == 4 * plan["parameters"]
    assert list(tmp_path.iterdir()) == []


def test_flops_are_those_of_the_model():
    """ConvNet at 28x28, width 64, 10 classes, counted by hand: 2 per multiply-add."""
    model = models.make_network(
        "convnet", input_shape=(28, 28, 1), num_classes=10, width=64, convolution="lax"
    )
    multiply_adds = (
        26 * 26 * 9 * 64 + 24 * 24 * 9 * 64 * 64 + 10 * 10 * 9 * 64 * 64
        + 1600 * 200 + 200 * 100 + 100 * 10
    )  # fmt: skip
    # ReLUs, biases, pooling and taps are counted too: a few per activation.
    assert 2 * multiply_adds <= forward_flops(model) <= 2.1 * multiply_adds


def test_flops_of_a_whole_run():
    """With B = 1 the arrivals see versions 0, 1, 2, ...; those above the warm-up distil, unless
    their staleness is 0, where beta is, too.

    The generator for 8x8 images with f channels and latents of 16: dense to 2x2x2f, at 4x4 a
    convolution 2f to 2f, at 8x8 one of 2f to f and one of f to 1; 2 per multiply-add.
    """
    config = resolve(
        "digits", "fedrevive", max_versions=100, freeze_versions=20, warmup_versions=60,
        latent_size=16, generator_features=32, concurrency=5, preset_revival="published",
    )  # fmt: skip
    told = plan(config)
    forward = told["flops_forward_per_sample"]
    client = 3 * forward * config.local_iterations * config.batch_size
    # A teacher's forward and a student's training step per sample; images back and forth through
    # every teacher and the student.
    samples = config.distillation_steps * config.distillation_batch * config.num_teachers
    images = config.synthesis_batch * config.synthesis_steps
    model = models.make_network("digitsnet", input_shape=(8, 8, 1), num_classes=10, width=8)
    making = making_flops(config, model)
    products = 16 * 256 + 16 * 9 * 64 * 64 + 64 * 9 * 64 * 32 + 64 * 9 * 32
    # Borders, where a kernel hangs over, are not counted; activations and normalisation are.
    assert 1.5 * products <= making <= 2.2 * products
    fresh = int((schedule.create(config).staleness[61:] == 0).sum())
    assert 0 < fresh < 20
    distilled, synthesised = 100 - 61 - fresh, len(range(20, 100, config.generation_interval))
    assert told["arrivals"] == 100
    assert told["flops_total"] == (
        100 * client
        + distilled * 4 * forward * samples
        + synthesised * images * (2 * forward * (config.num_teachers + 1) + 3 * making)
    )
    # With one judge for each sample.
    single = plan(dataclasses.replace(config, judges="own"))
    assert single["flops_synthesis"] == images * (2 * forward * 2 + 3 * making)
    told = plan(dataclasses.replace(config, method="dd_fedrevive", samples="real"))
    assert told["flops_synthesis"] == 0


@pytest.mark.slow
def test_compare_makes_a_table_and_repeats_nothing(tmp_path):
    small = {**SMALL, "max_time": 3, "methods": "fedbuff,afl_dw", "seeds": 2}
    arguments = flags(**small, out=tmp_path / "out")
    first = call(*arguments, program="compare")
    assert first.returncode == 0, first.stderr
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [row["label"] for row in rows] == ["fedbuff", "afl_dw"]
    summaries = [
        json.loads((tmp_path / "out" / f"fedbuff_seed{seed}" / "summary.json").read_text())
        for seed in (0, 1)
    ]
    finals = [summary["final_accuracy"] for summary in summaries]
    assert float(rows[0]["final mean"]) == pytest.approx(np.mean(finals))
    assert float(rows[0]["final std"]) == pytest.approx(np.std(finals, ddof=1))
    assert first.stdout.endswith((tmp_path / "out" / "table.md").read_text())
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000

    written = [
        tmp_path / "out" / "fedbuff_seed0" / name for name in ("summary.json", "tensorboard")
    ]
    before = [path.stat().st_mtime_ns for path in written]
    again = call(*arguments, program="compare")
    assert again.stdout == (tmp_path / "out" / "table.md").read_text()
    assert before == [path.stat().st_mtime_ns for path in written]


def test_bad_input_of_compare(tmp_path):
    for arguments, message in (
        ([], "--out=: must name a folder"),
        (
            ["--out=x", "--methods=fedavg,fedprox"],
            "--methods=fedavg,fedprox: 'fedprox' must be one of",
        ),
        (["--out=x", "--seeds=0"], "--seeds=0: must be at least 1"),
        (["--out=x", "--workdir=y"], "--workdir=y: is chosen by"),
    ):
        result = call(*arguments, program="compare", cwd=tmp_path)
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
        assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


BAD = [
    (["--dataset=cifar99"], "--dataset=cifar99: must be one of digits, fashion_mnist"),
    (["--method=fedprox"], "--method=fedprox: must be one of fedavg, fedbuff, afl_dw, fedrevive"),
    (["--num_clients=10", "--concurrency=20"], "--concurrency=20: must be at most --num_clients"),
    (["--buffer_size=0"], "--buffer_size=0: must be at least 1"),
    (["--open_slots=21"], "--open_slots=21: must be at most --concurrency=20"),
    (["--alpha=0"], "--alpha=0: must be above 0"),
    (["--alpha=-0.5"], "--alpha=-0.5: must be above 0"),
    (["--alpha=nan"], "--alpha=nan: must be finite"),
    (["--seed=1.5"], "--seed=1.5: must be a whole number"),
    (["--seed=abc"], "--seed=abc: must be a whole number"),
    (["--client_lr=fast"], "--client_lr=fast: must be a number"),
    (["--max_time=inf"], "--max_time=inf: must be finite"),
    (["--warmup_versions=1", "--freeze_versions=2"], "--warmup_versions=1: must be at least"),
    (["--delays=trace"], "--delay_trace=: must name a CSV file"),
    (["--delays=trace", "--delay_trace=none.csv", "--dry_run"], "--delay_trace=none.csv: cannot"),
    (["--delays=uniform", "--delay_spread=9"], "--delay_spread=9.0: must be below --delay_mean"),
    (["--partition=natural"], "--partition=natural: this data set has no natural groups"),
    (["--model=convnet"], "--model=convnet: images of 8x8 are too small"),
    (["--warmup_versions=10000000000"], "--warmup_versions=10000000000: must be below 2147483648"),
    (["--dataset=custom"], "--dataset=custom: is given to `run` from Python"),
    (["--dataset=fashion_mnist"], "--data_dir=: must name the folder"),
    (["--dataset=fashion_mnist", "--data_dir=."], "no file train-images-idx3-ubyte"),
    (
        ["--method=ca2fl", "--cache_memory=disk", "--cache_dir=no"],
        "/no: is not a folder",
    ),
    (["--grace=0"], "--grace=0: must be above 0 and at most 3600"),
    (["--grace=nan"], "--grace=nan: must be above 0 and at most 3600"),
    (["--checkpoint_mode=none"], "--checkpoint_mode=none: must be one of exact, params"),
    (["--meta=sgd"], "--meta=sgd: must be one of reptile, fomaml, maml"),
    (["--no_such_flag=1"], "Unknown command line flag 'no_such_flag'"),
    (["digits"], "digits: unexpected argument"),
    (["--workdir=blocked/run"], "/blocked/run: cannot be written"),
    (["--workdir=blocked"], "/blocked: is not a folder"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
@pytest.mark.slow
def test_bad_input_is_one_clear_line(tmp_path, arguments, message):
    """Status not 0, one line, nothing written, and no waiting for a compilation."""
    (tmp_path / "blocked").write_text("a file, not a folder")
    result = call(*arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert message in lines[0]
    assert lines[0].startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["blocked"]


def test_a_full_memory_is_told_in_one_line(tmp_path):
    """144 TB for a convolution's weights."""
    result = call("--method=fedbuff", "--model_width=2000000", cwd=tmp_path)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Out of memory allocating 144000000000000 bytes; smaller --client_batch" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir=: must name"),
        (["--workdir=none"], "config.json cannot be read"),
        (["--workdir=none", "--step=x"], "--step=x"),
    ],
)
@pytest.mark.slow
def test_bad_input_of_evaluate(tmp_path, arguments, message):
    result = call(*arguments, program="evaluate", cwd=tmp_path)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_help():
    result = call("--help")
    assert result.returncode == 0
    assert "--concurrency: K, clients that work at the same time" in result.stdout
