# PyTorch is optional, see the extra `parity`.
# pyright: reportMissingImports=false
"""The same work as one FedRevive arrival, written as one would in eager PyTorch.

One job after the other, one teacher after the other, with the sizes and steps of a configuration.
As many samples go through a network in one call as in ours, because small calls would be slower.
Only for timing: random numbers and starts are PyTorch's own. It computes in the precision that the
configuration names, on the kind of device that JAX uses.
"""

import contextlib
import copy
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
from torch.nn import functional

from experiments.benchmarking.measuring import Timing
from experiments.benchmarking.torch_networks import (
    TorchConvNet,
    TorchDigitsNet,
    TorchGenerator,
    TorchResNet18,
    TorchT5,
)
from fedrevive_jax.config import Config
from fedrevive_jax.data import Dataset
from fedrevive_jax.dfkd import due
from fedrevive_jax.dfkd.prompts import PROMPTS
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import t5_shape
from fedrevive_jax.models.model import per_call

NETWORKS = {"convnet": TorchConvNet, "digitsnet": TorchDigitsNet, "resnet18": TorchResNet18}


def device_of_peer() -> str:
    """PyTorch's name of the kind of device that JAX uses.

    Raises:
      ConfigError: PyTorch has none of that kind.
    """
    backend = jax.default_backend()
    if backend == "cpu":
        return "cpu"
    if backend == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise ConfigError(
        "peer", "torch", f"JAX computes on a {backend}, which PyTorch here does not see"
    )


def device_name() -> str:
    """The device on which the peer computes, for the record."""
    kind = device_of_peer()
    return torch.cuda.get_device_name() if kind == "cuda" else kind


class Peer:
    """A server and a client in PyTorch."""

    def __init__(self, config: Config, dataset: Dataset):
        """Raises:
        ConfigError: see `device_of_peer`.
        """
        self._config, self._dataset = config, dataset
        self.device = device_of_peer()
        torch.manual_seed(config.seed)
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on either side
        samples = torch.from_numpy(dataset.samples)
        if not dataset.is_text:
            samples = samples.permute(0, 3, 1, 2).contiguous()
        self._samples = samples.to(self.device)
        self._labels = torch.from_numpy(dataset.labels).long().to(self.device)
        how = dataset.preprocessing
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(1, -1, 1, 1)
            for values in ((how.mean, how.std) if how.mean else ((0.0,), (1.0,)))
        )
        self._net = self._network().to(self.device)
        self._global = copy.deepcopy(self._net.state_dict())
        self._generator = self._make_generator()
        self._meta = torch.optim.Adam(
            self._generator.parameters(), lr=config.generator_lr, betas=(0.5, 0.999)
        )
        self._teachers = []
        for _ in range(config.num_teachers):
            net = _frozen(self._network().to(self.device))
            with torch.no_grad():
                _, taps = self._apply(net, self._take(np.arange(2)))
            mix = torch.full((dataset.num_classes,), 1 / dataset.num_classes, device=self.device)
            self._teachers.append((net, self._statistics(taps), mix))
        self._pool = self._make_pool()

    def load(self, student, teachers) -> None:
        """Takes over parameters of ours, of a model of images."""
        self._net.load(student)
        self._global = copy.deepcopy(self._net.state_dict())
        for (net, *_), params in zip(self._teachers, teachers, strict=True):
            net.load(params)

    # --- the stages -------------------------------------------------------------------------------

    def train_job(self) -> dict[str, torch.Tensor]:
        """Local training of one client, from the global model."""
        config, net = self._config, self._net
        net.load_state_dict(self._global)
        net.train()
        optimizer = torch.optim.Adam(_trained(net), lr=config.client_lr)
        running = None
        count = len(self._labels)
        for _ in range(config.local_iterations):
            positions = torch.randint(count, (config.batch_size,), device=self.device)
            optimizer.zero_grad()
            logits, taps = self._apply(net, self._augment(self._take(positions), "constant"))
            functional.cross_entropy(logits, self._labels[positions]).backward()
            optimizer.step()
            with torch.no_grad():
                new = self._statistics(taps)
                if running is None:
                    running = [(torch.zeros_like(m), torch.ones_like(v)) for m, v in new]
                running = [
                    (m.mul(0.9).add(a, alpha=0.1), v.mul(0.9).add(b, alpha=0.1))
                    for (m, v), (a, b) in zip(running, new, strict=True)
                ]
        self._teachers.append((_frozen(net), running, self._teachers.pop(0)[2]))
        return net.state_dict()

    def draw(self) -> list[list[torch.Tensor]]:
        """Augmented pool samples for every step and teacher."""
        config = self._config
        pool, labels = self._pool
        batches = []
        for _ in range(config.distillation_steps):
            step = []
            for _, _, mix in self._teachers:
                wanted = torch.multinomial(mix, config.distillation_batch, replacement=True)
                scores = torch.rand(len(wanted), len(labels), device=self.device)
                scores = scores * (labels[None] == wanted[:, None])
                chosen = scores.argmax(1)
                step.append(self._augment(pool[chosen], "reflect"))
            batches.append(step)
        return batches

    def _per_call(self, count: int) -> int:
        """As many of some batches in a call as our own side takes."""
        shape, batch = self._dataset.input_shape, self._config.distillation_batch
        return per_call(count, batch, shape, jax.default_backend())

    @torch.no_grad()
    def judge(self, batches) -> list[list[torch.Tensor]]:
        """The logits of each teacher on its own samples, by step and teacher."""
        config = self._config
        together = self._per_call(len(batches))
        of_teachers = []
        for (net, _, _), own in zip(self._teachers, zip(*batches, strict=True), strict=True):
            calls = [torch.cat(own[at : at + together]) for at in range(0, len(own), together)]
            logits = torch.cat([self._apply(net, x)[0] for x in calls])
            of_teachers.append(logits.split(config.distillation_batch))
        return [list(step) for step in zip(*of_teachers, strict=True)]

    def distil(self, batches, targets) -> dict[str, torch.Tensor]:
        """Trains the student; returns Delta^KD."""
        config = self._config
        student = copy.deepcopy(self._net).eval()
        student.load_state_dict(self._global)
        optimizer = torch.optim.Adam(
            _trained(student),
            lr=config.distillation_lr,
            weight_decay=config.distillation_weight_decay,
        )
        together = config.teacher_batch or self._per_call(config.num_teachers)
        for step, wanted in zip(batches, targets, strict=True):
            optimizer.zero_grad()
            loss = torch.zeros((), device=self.device)
            for at in range(0, len(step), together):
                x, logits = (torch.cat(part[at : at + together]) for part in (step, wanted))
                own = functional.log_softmax(self._apply(student, x)[0], 1)
                loss = loss + functional.kl_div(
                    own, functional.log_softmax(logits, 1), reduction="sum", log_target=True
                )
            (loss / (len(step) * config.distillation_batch)).backward()
            optimizer.step()
        after = student.state_dict()
        return {name: after[name] - value for name, value in self._global.items()}

    def synthesise(self) -> None:
        """Inner steps on a fast copy of the generator and fresh latents, then the Reptile step."""
        config, dataset = self._config, self._dataset
        fast = copy.deepcopy(self._generator)
        student = _frozen(self._net)
        mix = torch.stack([mix for _, _, mix in self._teachers]).mean(0)
        targets = torch.multinomial(mix, config.synthesis_batch, replacement=True)
        latents = self._latents(config.synthesis_batch, dataset.num_classes)
        options = {"betas": (0.5, 0.999)}
        optimizer = torch.optim.Adam(
            [
                {"params": list(fast.parameters()), "lr": config.generator_lr},
                {"params": list(latents), "lr": config.latent_lr},
            ],
            **options,
        )
        best, kept = float("inf"), None
        for _ in range(config.synthesis_steps):
            optimizer.zero_grad()
            samples = fast(*latents, targets)
            loss = self._objective(self._augment(samples, "reflect"), targets, student)
            loss.backward()
            optimizer.step()
            if loss.item() < best:
                best, kept = loss.item(), samples.detach()
        assert kept is not None, "no step has made finite samples"
        self._add(kept, targets)
        self._meta.zero_grad()
        pairs = zip(self._generator.parameters(), fast.parameters(), strict=True)
        for slow, quick in pairs:
            slow.grad = (slow - quick).detach()
        self._meta.step()

    def step(self, uploaded: dict[str, torch.Tensor]) -> None:
        """One server step without synthesis: draw, judge, distil, blend."""
        batches = self.draw()
        distilled = self.distil(batches, self.judge(batches))
        with torch.no_grad():
            for name, value in self._global.items():
                plain = uploaded[name] - value
                value += self._config.server_lr * (0.5 * plain + 0.5 * distilled[name])

    def time(self, call: Callable, repeats: int) -> Timing:
        """Times calls that have finished on the device, after one that is not counted."""
        call()
        seconds = []
        for _ in range(repeats):
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            seconds.append(time.perf_counter() - start)
        return Timing.of(seconds)

    # --- pieces -----------------------------------------------------------------------------------

    def _network(self):
        config, dataset = self._config, self._dataset
        if dataset.is_text:
            return TorchT5(t5_shape(config), dataset.num_classes)
        side, _, channels = dataset.input_shape
        network = NETWORKS[config.model]
        return network(config.model_width, dataset.num_classes, channels, side)

    def _make_generator(self):
        config, dataset = self._config, self._dataset
        if dataset.is_text:
            return _Prompts(t5_shape(config).width).to(self.device)
        height, width, channels = dataset.input_shape
        shape = (height, width, channels)
        made = TorchGenerator(shape, config.latent_size, config.generator_features)
        return made.to(self.device)

    def _latents(self, batch: int, classes: int):
        config = self._config
        if self._dataset.is_text:
            own = config.text_length - PROMPTS
            shape = [(batch, own, t5_shape(config).width)]
        else:
            shape = [(batch, config.latent_size), (classes, config.latent_size)]
        return [torch.randn(size, device=self.device, requires_grad=True) for size in shape]

    def _make_pool(self):
        config, dataset = self._config, self._dataset
        count = min(config.pool_size, 2048)  # what a run of some minutes has made
        labels = torch.arange(count, device=self.device) % dataset.num_classes
        if dataset.is_text:
            shape = (count, config.text_length, t5_shape(config).width)
        else:
            shape = (count, *dataset.input_shape[2:], *dataset.input_shape[:2])
        return torch.rand(shape, device=self.device), labels

    def _add(self, samples, targets) -> None:
        pool, labels = self._pool
        self._pool = (
            torch.cat([pool[len(targets) :], samples]),
            torch.cat([labels[len(targets) :], targets]),
        )

    def _objective(self, samples, targets, student):
        config = self._config
        own, _ = self._apply(student, samples)
        share = torch.stack([mix[targets] for _, _, mix in self._teachers])
        weights = share / share.sum(0).clamp_min(1e-8)
        count = len(targets)
        feature = one_hot = adversarial = torch.zeros((), device=self.device)
        for (net, reference, _), weight in zip(self._teachers, weights, strict=True):
            logits, taps = self._apply(net, samples)
            distance = sum(
                (m - a).norm() + (v - b).norm()
                for (m, v), (a, b) in zip(self._statistics(taps), reference, strict=True)
            )
            feature = feature + weight.sum() * distance / count
            entropy = functional.cross_entropy(logits, targets, reduction="none")
            one_hot = one_hot + (weight * entropy).sum() / count
            agree = own.argmax(1) == logits.argmax(1)
            wanted, given = functional.log_softmax(logits, 1), functional.log_softmax(own, 1)
            divergence = (wanted.exp() * (wanted - given)).sum(1)
            adversarial = adversarial - (weight * agree * divergence).sum() / count
        return (
            config.feature_weight * feature
            + config.one_hot_weight * one_hot
            + config.adversarial_weight * adversarial
        )

    def _take(self, positions):
        return self._samples[positions]

    def _augment(self, samples, mode: str):
        """Random crop and flip of each image, as the data set asks for."""
        how = self._dataset.preprocessing
        if self._dataset.is_text:
            return samples
        x = samples.float() / 255 if samples.dtype == torch.uint8 else samples
        if how.crop_padding:
            pad, (height, width) = how.crop_padding, x.shape[2:]
            padded = functional.pad(x, (pad,) * 4, mode=mode)
            corners = torch.randint(2 * pad + 1, (2, len(x), 1), device=self.device)
            rows = corners[0] + torch.arange(height, device=self.device)
            columns = corners[1] + torch.arange(width, device=self.device)
            owner = torch.arange(len(x), device=self.device)[:, None, None]
            x = padded.permute(0, 2, 3, 1)[owner, rows[:, :, None], columns[:, None]]
            x = x.permute(0, 3, 1, 2)
        if how.flip:
            flipped = torch.rand(len(x), 1, 1, 1, device=self.device) < 0.5
            x = torch.where(flipped, x.flip(3), x)
        return x

    def _apply(self, net, samples):
        """Logits in float32 and activations, computed in the configured precision."""
        half = self._config.precision == "bfloat16"
        with torch.autocast(self.device, torch.bfloat16) if half else contextlib.nullcontext():
            logits, taps = net(self._inputs(samples))
        return logits.float(), taps

    def _inputs(self, samples):
        if self._dataset.is_text:
            if samples.ndim == 2:
                return samples.long(), (samples != 0).long()
            return samples, torch.ones(samples.shape[:2], device=self.device)
        x = samples.float() / 255 if samples.dtype == torch.uint8 else samples
        return (x - self._mean) / self._std if self._dataset.preprocessing.mean else x

    def _statistics(self, taps):
        axes = (0,) if self._dataset.is_text else (0, 2, 3)
        taps = [tap.float() for tap in taps]
        return [(tap.mean(axes), tap.var(axes, correction=0)) for tap in taps]

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class _Prompts(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.vectors = torch.nn.Parameter(torch.randn(PROMPTS, width))

    def forward(self, embeddings, targets):
        del targets
        front = self.vectors.expand(len(embeddings), *self.vectors.shape)
        return torch.cat([front, embeddings], 1)


def _frozen(net):
    """A copy to judge with: only what it judges gets a gradient."""
    return copy.deepcopy(net).eval().requires_grad_(False)


def _trained(net):
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def measure(config: Config, dataset: Dataset, repeats: int) -> dict[str, Timing]:
    """PyTorch's timings, by the names of `stages`, and of a whole `arrival`."""
    peer = Peer(config, dataset)
    batches = peer.draw()
    targets = peer.judge(batches)
    uploaded = copy.deepcopy(peer.train_job())
    timings = {
        "client training": peer.time(peer.train_job, repeats),
        "teacher forward": peer.time(lambda: peer.judge(batches), repeats),
        "student distillation": peer.time(lambda: peer.distil(batches, targets), repeats),
        "synthesis": peer.time(peer.synthesise, repeats),
        "server step": peer.time(lambda: peer.step(uploaded), repeats),
    }
    share = due.syntheses_per_arrival(config, config.buffer_size)
    timings["arrival"] = Timing(
        timings["client training"].median
        + timings["server step"].median
        + share * timings["synthesis"].median,
        timings["client training"].spread
        + timings["server step"].spread
        + share * timings["synthesis"].spread,
    )
    return timings
