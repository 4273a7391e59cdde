"""python -m tests.soak_kills [--kills=50] [--signals=20] [--seed=0] [--out=DIR]: many real faults.

Kills: small runs of FedRevive and of FedBuff with B > 1 get SIGKILL at random times, from the first
import to the last save, and are started again by the same command until they are finished; then
everything is compared with a run that was never interrupted.

Signals: the digits preset gets SIGTERM or SIGINT at random times; it must end with status 143 or
130 within 10 seconds, the step that it says it has saved must be whole on disk, and the run must go
on from there. Prints the counts and ends with status 1 if anything was not as it should be.
"""

import argparse
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from fedrevive_jax.config import Config
from fedrevive_jax.presets import resolve
from fedrevive_jax.record import files, reading
from fedrevive_jax.record.checkpoint import Checkpoints
from fedrevive_jax.running import runner
from fedrevive_jax.simulation.simulator import Simulation
from tests.killed_run import as_flags
from tests.toys import small

# Of the promise for the digits preset, in seconds.
LIMIT = 10.0


def command(config: Config) -> subprocess.Popen:
    """The run of a configuration as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.main", *as_flags(runner.settle(config))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def differences(config: Config, reference: Config) -> list[str]:
    """What two finished runs do not have in common; [] where they are the same bit for bit."""
    found = []
    states = []
    for one in (config, reference):
        simulation, checkpoints = Simulation(one), Checkpoints(one.run_dir, read_only=True)
        step = checkpoints.steps()[-1]
        saved = checkpoints.load(
            step, simulation.server.params, lambda s, own=simulation: own.shapes(s["simulation"])
        )
        states.append((saved.record["simulation"], saved.params, saved.arrays))
    if states[0][0] != states[1][0]:
        found.append("the plain record")
    for a, b in zip(*map(jax.tree.leaves, [state[1:] for state in states]), strict=True):
        if not np.array_equal(a, b):
            found.append("an array")
    rows = [(one.run_dir / files.ARRIVALS).read_bytes() for one in (config, reference)]
    if rows[0] != rows[1]:
        found.append(files.ARRIVALS)
    metrics = [
        [{**row, "wall_seconds": 0} for row in files.read_rows(one.run_dir / files.METRICS)]
        for one in (config, reference)
    ]
    if json.dumps(metrics[0]) != json.dumps(metrics[1]):
        found.append(files.METRICS)
    return found


def kills(method: str, count: int, rng: random.Random, out: Path, **settings) -> bool:
    """Kills runs of a method `count` times in all."""
    reference = small(
        method, checkpoint_every=5, eval_every=4, workdir=str(out / "whole"), **settings
    )
    for folder in ("warm", "whole"):  # the first compiles what the others find in the cache
        began = time.monotonic()
        process = command(dataclasses.replace(reference, workdir=str(out / folder)))
        assert process.wait() == 0, process.stderr.read()
        whole = time.monotonic() - began
    done = finished = wrong = corrupt = 0
    while done < count:
        config = dataclasses.replace(reference, workdir=str(out / f"killed{finished}"))
        while not runner.is_finished(config):
            process = command(config)
            try:
                process.wait(rng.uniform(0, 1.2 * whole) if done < count else None)
            except subprocess.TimeoutExpired:
                process.kill()
                done += 1
            corrupt += "corrupt" in process.communicate()[1]
            if process.returncode not in (0, -signal.SIGKILL):
                print(f"  ended with status {process.returncode}", flush=True)
                return False
        finished += 1
        found = differences(config, reference)
        wrong += bool(found)
        print(f"  {method}: {done} kills, {finished} finished {found or ''}", flush=True)
        shutil.rmtree(config.run_dir)
    print(
        f"{method} (B={reference.buffer_size}): {done} kills, {finished} runs finished, "
        f"{finished - wrong} of them bit for bit as the uninterrupted one, {corrupt} corrupt "
        f"checkpoints; uninterrupted {whole:.0f} s",
        flush=True,
    )
    return not wrong and not corrupt


def signals(number: signal.Signals, count: int, rng: random.Random, out: Path) -> bool:
    """Sends a signal to the digits preset `count` times; the runs go on in between."""
    good = sent = saved = ended = part = 0
    slowest = 0.0
    config = resolve("digits", "fedrevive", workdir=str(out / f"{number.name}{part}"))
    while sent < count:
        process = command(config)
        try:
            process.wait(rng.uniform(5, 60))
        except subprocess.TimeoutExpired:
            sent += 1
            began = time.monotonic()
            process.send_signal(number)
            words = process.communicate()[1]
            took = time.monotonic() - began
            slowest = max(slowest, took)
            told = words.partition("interrupted: saved at version ")[2]
            # A process that a signal has ended; shells show 143 or 130 for both.
            ended += process.returncode == -number
            right = process.returncode in (128 + number, -number) and took <= LIMIT
            if told:
                saved += 1
                right &= reading.read_params(config.run_dir, Simulation(config).model)[0] == int(
                    told
                )
            good += right
            last = words.strip().splitlines()[-1:] or [""]
            print(f"  {number.name}: {process.returncode} in {took:.1f} s; {last[0]}", flush=True)
        else:
            process.communicate()  # it was done before
        if (config.run_dir / files.SUMMARY).exists():
            part += 1
            config = dataclasses.replace(config, workdir=str(out / f"{number.name}{part}"))
    print(
        f"{number.name}: {good} of {count} as promised, {saved} with a fresh save, {ended} "
        f"ended while Python started or at the end of the grace; slowest {slowest:.1f} s",
        flush=True,
    )
    return good == count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each method")
    parser.add_argument("--signals", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="folder; default: a temporary one")
    given = parser.parse_args()
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        results = []
        if given.kills:
            results.append(kills("fedrevive", given.kills, rng, out / "fedrevive"))
            results.append(
                kills("fedbuff", given.kills, rng, out / "fedbuff", server_optimizer="adam")
            )
        if given.signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                results.append(signals(number, given.signals, rng, out))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
