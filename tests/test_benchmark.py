"""The benchmark: its arithmetic by hand, and a whole tiny one as a user runs it."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarking import convolution_table, measuring, stages
from experiments.benchmarking.measuring import Timing
from fedrevive_jax.clock import schedule
from fedrevive_jax.clock.windows import plan_windows
from fedrevive_jax.models import convolutions
from fedrevive_jax.presets import resolve
from fedrevive_jax.simulation.planning import forward_flops, making_flops
from tests.commands import call, flags

TINY = {
    "model": "digits", "model_width": 4, "local_iterations": 2, "batch_size": 8, "concurrency": 3,
    "num_clients": 6, "num_teachers": 2, "latent_size": 6, "generator_features": 4,
    "synthesis_batch": 8, "synthesis_steps": 2, "pool_size": 32, "distillation_steps": 2,
    "distillation_batch": 4, "proxy_samples": 8, "generation_interval": 2, "repeats": 2,
    "arrivals": 3,
}  # fmt: skip


def test_median_and_spread():
    assert Timing.of([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 1.0)  # quartiles 2 and 4
    assert Timing.of([7.0]) == (7.0, 0.0)


def test_time_calls_leaves_the_first_call_out():
    calls = []
    timing = measuring.time_calls(lambda: calls.append(0) or jnp.zeros(()), 3)
    assert len(calls) == 4
    assert timing.median > 0


def test_compilations_are_counted():
    program = jax.jit(lambda x: jnp.sin(x) * 3 + 1)
    argument = jnp.ones(7)
    with measuring.compilations() as first:
        program(argument)
    with measuring.compilations() as second:
        program(argument)
    assert (first.count, second.count) == (1, 0)
    assert first.seconds > 0


def test_the_peak_is_the_devices_own(monkeypatch):
    def named(kind):
        monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
        return measuring.peak_flops("bfloat16")

    assert named("TPU v5") == (459e12, "published for TPU v5")
    assert named("TPU v5 lite") == (197e12, "published for TPU v5 lite")
    assert named("NVIDIA H100 PCIe") == (756e12, "published for NVIDIA H100 PCIe")
    told = []
    monkeypatch.setattr(measuring, "measured_flops", lambda *given: told.append(given) or 7.0)
    assert named("TPU v4 lite") == (7.0, "measured, products of 2048x2048 matrices")
    assert told == [("bfloat16", 2048, 1)]


def test_measured_flops(monkeypatch):
    """Of 3 products of 64x64 matrices in a second: 2 * 64^3 each."""
    calls = []

    def in_a_second(call, repeats):
        calls.append(call())
        return Timing(1.0, 0.0)

    monkeypatch.setattr(measuring, "time_calls", in_a_second)
    assert measuring.measured_flops("float32", 64, 3) == 3 * 2 * 64**3
    (product,) = calls
    matrix = jax.random.normal(jax.random.key(0), (64, 64)) / 8
    np.testing.assert_allclose(product, matrix @ matrix @ matrix @ matrix, atol=1e-4)


def test_live_bytes_sees_an_array():
    before = measuring.live_bytes()
    array = jnp.zeros((1000, 25), jnp.float32) + 1
    assert measuring.live_bytes() - before == 100_000
    del array


def test_a_workload_is_the_presets_with_random_data():
    config, dataset = stages.workload("convnet")
    assert (config.dataset, config.model, config.model_width) == ("femnist", "convnet", 64)
    assert (config.local_iterations, config.num_teachers, config.distillation_steps) == (25, 8, 10)
    assert dataset.samples.std() > 70  # of bytes; zeros would be faster than data
    assert dataset.num_classes == len(set(dataset.labels.tolist())) == 62
    cifar, images = stages.workload("resnet18")
    assert (images.preprocessing.crop_padding, images.preprocessing.flip) == (4, True)
    assert cifar.local_iterations == 25


@pytest.mark.slow
def test_a_whole_benchmark(tmp_path):
    result = call(*flags(**TINY, json=tmp_path / "out.json"), program="benchmark")
    assert result.returncode == 0, result.stderr
    told = json.loads((tmp_path / "out.json").read_text())
    assert "| **whole arrival** |" in result.stdout
    assert told["recompilations"] == 0
    assert told["compilations"] > 0
    assert told["live_versions"] <= 3 + 1
    assert told["live_over_planned"] == pytest.approx(1, abs=0.15)
    assert not [name for name in told if name.endswith("ratio") and name != "window_ratio"]

    config, dataset = stages.workload(
        "digits", **{n: v for n, v in TINY.items() if n not in ("model", "repeats", "arrivals")}
    )
    preset = resolve("digits", "fedrevive", seed=config.seed)
    model = stages.model_that_counts(config, dataset.input_shape, dataset.num_classes)
    forward = forward_flops(model)
    gflop = {name: own.get("gflop") for name, own in told["stages"].items()}
    samples = 2 * 4 * 2  # steps, batch, teachers
    assert gflop == {
        "client training": pytest.approx(3 * forward * 2 * 8 / 1e9),
        "teacher forward": pytest.approx(forward * samples / 1e9),
        "student distillation": pytest.approx(3 * forward * samples / 1e9),
        "synthesis": pytest.approx(
            (2 * forward * (2 + 1) + 3 * making_flops(config, model)) * 8 * 2 / 1e9
        ),
        "server step": None,
    }
    parts = told["stages"]
    # The preset's clock, in calls of the size that was measured here.
    plan, size = schedule.create(preset), told["jobs_in_a_call"]
    padding = len(plan_windows(plan, size)) * size / plan.num_arrivals
    assert told["jobs_trained_per_arrival"] == pytest.approx(padding)
    assert told["arrival_milliseconds"] == pytest.approx(
        padding * parts["client training"]["milliseconds"]
        + parts["server step"]["milliseconds"]
        + parts["synthesis"]["milliseconds"] / 2
    )


@pytest.mark.slow
def test_the_ways_of_convolution_are_measured(monkeypatch):
    monkeypatch.setattr(convolutions, "WAYS", ("patches", "shifted"))
    config, dataset = stages.workload("digits", model_width=4, distillation_steps=1, batch_size=2)
    rows = convolution_table.measure(config, dataset, 1, lambda line: None)
    assert [row["convolution"] for row in rows] == list(convolutions.WAYS)
    assert all(value > 0 for row in rows for value in list(row.values())[1:])
    assert convolution_table.table(rows).count("\n") == 2 + len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model=vgg"],
            "--model=vgg: must be one of resnet18, convnet, digits, fashion_mnist, t5",
        ),
        (["--dataset=digits"], "--dataset=digits: is fixed here"),
        (["--peer=tensorflow"], "--peer=tensorflow: must be torch"),
        (
            ["--model=digits", "--generation_interval=1"],
            "--generation_interval=1: must be at least 2",
        ),
        (["--model=digits", "--max_versions=3"], "--max_versions=3: the plan makes 3 versions; "),
        (["--repeats=0"], "--repeats=0: must be at least 1"),
        (["--peak_tflops=-1"], "--peak_tflops=-1.0: must be above 0"),
        (["--model=t5", "--convolutions"], "--convolutions: t5 has none"),
        (["--compilation_cache_dir="], "--compilation_cache_dir=: must be a folder, or off"),
        (
            ["--compilation_cache_dir=~nobody_here/x"],
            "--compilation_cache_dir=~nobody_here/x: must not name the home of an unknown user",
        ),
        (["--compilation_cache_dir=/proc/none"], "--compilation_cache_dir=/proc/none: cannot be"),
    ],
)
@pytest.mark.slow
def test_bad_input_of_benchmark(tmp_path, arguments, message):
    result = call(*arguments, program="benchmark", cwd=tmp_path)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert message in result.stderr


def test_a_peer_is_compared_with_one_device(tmp_path, monkeypatch):
    """Told before PyTorch is looked for."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    result = call("--model=digits", "--peer=torch", "--mesh=2", program="benchmark", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "error: --mesh=2: must be 1 with --peer=torch, on one device"
    ]
