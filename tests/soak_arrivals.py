"""python -m tests.soak_arrivals [ARRIVALS [METHOD ...]]: a toy model's long run must not wear out.

FedRevive and FedBuff on the scalar model, driven as a run is: windows of trained jobs, server
steps, evaluations, rows, checkpoints; with failing clients. Prints resident memory, compilations,
live versions and time, and fails where one of them grows.
"""

import gc
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from fedrevive_jax import data
from fedrevive_jax.presets import resolve
from fedrevive_jax.running.recorder import Recorder
from fedrevive_jax.simulation.simulator import Simulation
from tests.toys import scalar_model

LONG = 20_000
CONCURRENCY = 8


class Figures(NamedTuple):
    """What a soak saw after its warm-up.

    Attributes:
      arrivals: uploads after the warm-up.
      mb_per_thousand: growth of resident memory, MB per 1,000 arrivals, by a straight line through
        all readings.
      compilations: XLA compilations.
      live_versions: the most at one moment, warm-up included.
      backwards: arrivals earlier than the one before, warm-up included.
      seconds: wall time.
    """

    arrivals: int
    mb_per_thousand: float
    compilations: int
    live_versions: int
    backwards: int
    seconds: float


def toy_data() -> data.Dataset:
    """Grey 4x4 images of two classes, dark and light."""
    labels = np.arange(40, dtype=np.int32) % 2
    grey = np.where(labels == 0, 40, 200).astype(np.uint8)
    images = np.broadcast_to(grey[:, None, None, None], (40, 4, 4, 1)).copy()
    positions = np.arange(40)
    splits = dict(
        zip(("train", "validation", "test", "distillation"), np.split(positions, 4), strict=True)
    )
    return data.Dataset("toy", 2, images, labels, splits)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def soak(method: str, arrivals: int, warm_up: int, folder: Path) -> Figures:
    """Runs so many arrivals, recorded in a folder, and looks at memory every 250 of them."""
    config = resolve(
        "custom", method, num_clients=20, concurrency=CONCURRENCY, max_time=1e6,
        max_versions=arrivals, buffer_size=1, samples_per_client=4, local_iterations=1,
        batch_size=2, num_teachers=2, latent_size=2, generator_features=1, synthesis_batch=2,
        synthesis_steps=1, pool_size=8, distillation_steps=1, distillation_batch=2,
        proxy_samples=2, freeze_versions=2, warmup_versions=3, beta_s_max=5, eval_every=50,
        fault_rate=0.1, checkpoint_every=250,
    )  # fmt: skip
    simulation = Simulation(config, toy_data(), scalar_model())
    recorder = Recorder(simulation, folder)
    recorder.resume()
    compiled = [0]

    def count(event: str, seconds: float, **_) -> None:
        del seconds
        compiled[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    began, before, live, backwards = time.monotonic(), 0.0, 0, 0
    readings: list[tuple[int, float]] = []
    recorder.start()
    for receipt in simulation.arrivals():
        index = simulation.position
        recorder.observe(receipt)
        now = float(simulation.schedule.time[index - 1])
        backwards += now < before
        before = now
        live = max(live, len(simulation.server.live_versions))
        if index == warm_up:
            warm = compiled[0]
        if index >= warm_up and index % 250 == 0:
            gc.collect()
            readings.append((index, resident_mb()))
    result = recorder.finish()
    recorder.close()
    assert result.summary["arrivals"] == arrivals
    slope = np.polyfit(*np.asarray(readings).T, 1)[0] * 1000
    return Figures(
        arrivals - warm_up, float(slope), compiled[0] - warm, live, backwards,
        time.monotonic() - began,
    )  # fmt: skip


def check(figures: Figures) -> None:
    assert figures.compilations == 0
    assert figures.live_versions <= CONCURRENCY + 1
    assert figures.backwards == 0
    assert figures.mb_per_thousand < 1.0


def main(arrivals: int, methods: list[str]) -> None:
    logging.getLogger("fedrevive_jax").setLevel(logging.ERROR)  # a line for every bad upload
    for method in methods or ("fedrevive", "fedbuff"):
        with tempfile.TemporaryDirectory() as folder:
            figures = soak(method, arrivals, arrivals // 10, Path(folder))
        print(method, figures._asdict(), flush=True)
        check(figures)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else LONG, sys.argv[2:])
