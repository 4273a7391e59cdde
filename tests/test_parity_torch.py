"""The same weights give the same logits and taps in PyTorch (float32, to 1e-4).

The twins are those of the benchmark.
"""

import json

import jax
import numpy as np
import pytest

from fedrevive_jax import models
from fedrevive_jax.dfkd import distillation, loss_guard
from fedrevive_jax.errors import ConfigError
from tests.commands import call, flags
from tests.test_benchmark import TINY

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[parity]'")
from experiments.benchmarking import stages, torch_peer  # noqa: E402
from experiments.benchmarking.torch_networks import (  # noqa: E402
    TorchConvNet,
    TorchDigitsNet,
    TorchResNet18,
)


@pytest.mark.parametrize("convolution", ["lax", "mixed"])
@pytest.mark.parametrize(
    ("name", "shape", "classes", "twin"),
    [
        ("convnet", (28, 28, 1), 62, TorchConvNet),
        ("resnet18", (32, 32, 3), 10, TorchResNet18),
        ("digitsnet", (8, 8, 1), 10, TorchDigitsNet),
    ],
)
def test_logits_and_taps(name, shape, classes, twin, convolution):
    model = models.make_network(
        name, input_shape=shape, num_classes=classes, width=64, convolution=convolution
    )
    params = model.init(jax.random.key(0))
    # Larger weights than at the start, so that activations neither vanish nor explode with depth.
    params = jax.tree.map(lambda leaf: 2 * leaf, params)
    inputs = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    logits, ours = jax.jit(model.apply)(params, inputs)
    taps = models.tap_statistics(ours)

    net = twin(width=64, classes=classes)
    net.load(params)
    with torch.no_grad():
        expected, activations = net(torch.from_numpy(inputs.transpose(0, 3, 1, 2)))
    assert float(np.abs(logits).max()) > 0.1
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert len(taps) == len(activations)
    for (mean, variance), activation in zip(taps, activations, strict=True):
        np.testing.assert_allclose(mean, activation.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            variance, activation.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-4
        )


def test_start_has_the_law_of_pytorch():
    """Kernels and biases of each kind of layer: the same bound, and a uniform law within it."""
    params = models.make_network("convnet", input_shape=(28, 28, 1), num_classes=62, width=64).init(
        jax.random.key(0)
    )
    net = TorchConvNet()
    for name, layer in (("conv2", net.convs[1]), ("fc1", net.dense[0]), ("fc2", net.dense[1])):
        for leaf, theirs in (("kernel", layer.weight), ("bias", layer.bias)):
            ours = np.asarray(params[name][leaf])
            theirs = theirs.detach().numpy()
            # The largest of n uniform draws is within 5 / n of the bound, relatively.
            tolerance = 10 / ours.size
            assert np.abs(ours).max() == pytest.approx(np.abs(theirs).max(), rel=tolerance)


def test_the_peer_of_the_benchmark_does_the_same_work():
    """Distillation with the same weights and samples: the same Delta^KD.

    Adam turns rounding noise into steps of the size of its rate where a gradient is almost zero, so
    a few entries may differ.
    """
    config, dataset = stages.workload("digits", distillation_steps=2, concurrency=3, num_clients=6)
    model = models.create(config, dataset.input_shape, dataset.num_classes)
    student, *teachers = (model.init(jax.random.key(i)) for i in range(1 + config.num_teachers))
    shape = (config.distillation_steps, config.num_teachers, config.distillation_batch)
    images = np.random.default_rng(0).random((*shape, *dataset.input_shape), np.float32)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *teachers)
    targets = distillation.teacher_logits(model, stacked, images)
    ours = distillation.distil(
        model,
        student,
        images,
        targets,
        np.ones(config.num_teachers, bool),
        loss_guard.init(config),
        config,
    )

    peer = torch_peer.Peer(config, dataset)
    peer.load(student, teachers)
    batches = [[torch.from_numpy(x.transpose(0, 3, 1, 2)) for x in step] for step in images]
    wanted = peer.judge(batches)
    np.testing.assert_allclose(
        np.stack([[logits.numpy() for logits in step] for step in wanted]), targets, atol=1e-5
    )
    delta = peer.distil(batches, wanted)
    kernel = np.asarray(ours.delta["conv2"]["kernel"]).transpose(3, 2, 0, 1)
    difference = np.abs(delta["convs.1.weight"].numpy() - kernel)
    assert np.median(np.abs(kernel)) > 0.5 * config.distillation_lr
    assert np.quantile(difference, 0.98) < 0.01 * config.distillation_lr


def test_the_peer_makes_samples_without_gradients_of_its_judges():
    config, dataset = stages.workload("digits", concurrency=3, num_clients=6)
    peer = torch_peer.Peer(config, dataset)
    peer.train_job()  # its network becomes a teacher
    peer._net.zero_grad()
    before = [value.clone() for value in peer._generator.parameters()]
    peer.synthesise()
    assert all(
        parameter.grad is None
        for net in (peer._net, *(teacher for teacher, *_ in peer._teachers))
        for parameter in net.parameters()
    )
    moved = zip(before, peer._generator.parameters(), strict=True)
    assert all((old != new).any() for old, new in moved)


def test_the_peer_computes_in_our_precision():
    """bfloat16 keeps eight bits: a few layers differ by less than a tenth, and not by nothing."""
    logits = {}
    for precision in ("float32", "bfloat16"):
        config, dataset = stages.workload(
            "digits", concurrency=3, num_clients=6, precision=precision
        )
        peer = torch_peer.Peer(config, dataset)
        with torch.no_grad():
            logits[precision], taps = peer._apply(peer._net, peer._take(np.arange(20)))
        assert logits[precision].dtype == torch.float32
        assert all(mean.dtype == torch.float32 for mean, _ in peer._statistics(taps))
    off = (logits["float32"] - logits["bfloat16"]).norm() / logits["float32"].norm()
    assert 1e-5 < off < 0.1


def test_a_peer_on_another_device_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ConfigError, match="peer=torch: JAX computes on a tpu"):
        torch_peer.device_of_peer()


def test_the_benchmark_beside_pytorch(tmp_path):
    result = call(*flags(**TINY, peer="torch", json=tmp_path / "out.json"), program="benchmark")
    assert result.returncode == 0, result.stderr
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["arrival_ratio"] == pytest.approx(
        told["peer_arrival_milliseconds"] / told["arrival_milliseconds"]
    )
    assert all(own["ratio"] > 0 for own in told["stages"].values())
    assert told["peer_device"] == "cpu"
    assert "PyTorch on cpu, float32" in result.stdout
