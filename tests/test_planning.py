"""What a run will be, told without data: all published presets, against numbers counted by hand."""

import itertools

import pytest

from fedrevive_jax.config import METHODS, PUBLISHED_METHODS
from fedrevive_jax.presets import PAPER, resolve
from fedrevive_jax.simulation.planning import plan

# 3x3 stem; four stages of two blocks; three 1x1 shortcuts; head. No biases.
RESNET = 27 * 64 + sum(
    9 * (a * b + 3 * b * b) + (a * b if a != b else 0)
    for a, b in ((64, 64), (64, 128), (128, 256), (256, 512))
)
PARAMETERS = {
    "cifar10": RESNET + 512 * 10,
    "cifar100": RESNET + 512 * 100,
    "femnist": 10 * 64 + 2 * (576 + 1) * 64 + 1601 * 200 + 201 * 100 + 101 * 62,
    # Per layer: four projections, two of the feed-forward block, two norms. Position biases, final
    # norm, head.
    "newsgroups": 6 * (4 * 512**2 + 2 * 512 * 2048 + 2 * 512) + 32 * 8 + 512 + 513 * (512 + 20),
}


def test_the_published_size_of_the_resnet():
    assert PARAMETERS["cifar10"] == 11_164_352


# The other methods' presets do not differ by data set, so one of each is enough.
OTHERS = [("femnist", method) for method in METHODS if method not in PUBLISHED_METHODS]


@pytest.mark.parametrize(
    ("dataset", "method"), [*itertools.product(PAPER, PUBLISHED_METHODS), *OTHERS]
)
def test_the_presets(dataset, method):
    told = plan(resolve(dataset, method))
    config = resolve(dataset, method)
    assert told["parameters"] == PARAMETERS[dataset]
    assert told["parameters_frozen"] == (32_128 * 512 if dataset == "newsgroups" else 0)
    assert told["bytes_model"] == 4 * told["parameters"]
    assert told["live_versions_max"] <= config.concurrency + 1
    # The schedule's published law, see ALGORITHM section 1; cohorts wait for their slowest.
    if config.cohort:
        assert 20 <= told["versions"] <= 30
    else:
        assert told["arrivals"] == pytest.approx(12_630, rel=0.02)
        assert told["versions"] == told["arrivals"] // config.buffer_size
    kept = told["bytes_live_versions"] + told["bytes_uploads_max"] + told["bytes_method_state"]
    assert told["bytes_device"] >= kept
    assert told["bytes_host"] > 0
    pool = {"cifar10": 16_000 * 32 * 32 * 3 * 4, "newsgroups": 16_000 * 128 * (512 * 4 + 1)}
    if method == "fedrevive":
        assert told["bytes_method_state"] > pool.get(dataset, 0) + 8 * told["bytes_model"]
        assert told["flops_synthesis"] > 0
    assert ("flops_distillation" in told) == (method in ("fedrevive", "dd_fedrevive"))
    assert told["flops_total"] >= told["arrivals"] * told["flops_client_job"]
    keeps = method in ("ca2fl", "fedstale", "ace")
    assert told["bytes_client_cache"] == (1000 * told["bytes_model"] if keeps else 0)


def test_the_plan_tells_where_the_memory_of_clients_lives():
    """Half of it in bfloat16; on the host it leaves the device, on disk both."""
    settings = {"dataset": "femnist", "method": "ca2fl", "max_time": 2}
    told = {
        memory: plan(resolve(**settings, cache_memory=memory, cache_dtype="bfloat16"))
        for memory in ("device", "host", "disk")
    }
    size = told["device"]["bytes_client_cache"]
    assert size == 1000 * told["device"]["bytes_model"] // 2
    assert told["device"]["bytes_device"] - told["disk"]["bytes_device"] == size
    assert told["host"]["bytes_host"] - told["disk"]["bytes_host"] == size
    assert [told[memory]["bytes_disk"] for memory in told] == [0, 0, size]


def test_what_waits_on_the_host_is_not_on_the_device():
    on_device, on_host = (
        plan(resolve("digits", "fedbuff", version_memory=place)) for place in ("device", "host")
    )
    waiting = on_device["bytes_live_versions"] + on_device["bytes_uploads_max"]
    assert waiting > 0
    assert on_device["bytes_device"] - on_host["bytes_device"] == waiting
    assert on_host["bytes_host"] - on_device["bytes_host"] == waiting


def test_the_plan_tells_what_comes_on_top_during_a_call():
    """A job alone for FedBuff; a revival keeps every teacher's activations, and grows with them."""
    fedbuff, two, four = (
        plan(resolve("digits", method, preset_revival="published", **settings))
        for method, settings in [
            ("fedbuff", {}),
            ("fedrevive", {"num_teachers": 2, "distillation_batch": 1}),
            ("fedrevive", {"num_teachers": 4, "distillation_batch": 1}),
        ]
    )
    assert fedbuff["bytes_server_step"] == 0 < fedbuff["bytes_job"] == two["bytes_job"]
    assert 1 < four["bytes_server_step"] / two["bytes_server_step"] < 5 / 3
