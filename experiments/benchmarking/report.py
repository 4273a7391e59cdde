"""The figures of a benchmark as a table and as plain numbers."""

import os
import platform
from importlib import metadata
from typing import Any

import jax

from experiments.benchmarking.measuring import Timing
from experiments.benchmarking.stages import Measured

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")


def figures(
    measured: Measured,
    peers: dict[str, Timing],
    peak: tuple[float, str],
    peer_device: str = "",
    devices: int = 1,
) -> dict[str, Any]:
    """Everything that was measured, as JSON holds it; keys that end in `ratio` say how many times
    faster than PyTorch (or than one job at a time) it is.

    Args:
      measured: see `stages.measure`.
      peers: PyTorch's timings by stage, and of a whole `arrival`; empty without a peer.
      peak: FLOP/s of all devices and where the number is from.
      peer_device: where PyTorch computed.
      devices: how many computed with JAX.
    """
    config = measured.config
    arrival = measured.arrival.median
    stages = {}
    for name, stage in measured.stages.items():
        seconds, own = stage.timing.median, {}
        own["milliseconds"] = 1e3 * seconds
        own["spread_milliseconds"] = 1e3 * stage.timing.spread
        if stage.flops:
            own["gflop"] = stage.flops / 1e9
            own["share_of_peak"] = stage.flops / seconds / peak[0]
        if name in peers:
            own["peer_milliseconds"] = 1e3 * peers[name].median
            own["ratio"] = peers[name].median / seconds
        stages[name] = own
    result = {
        "machine": machine(devices),
        "model": config.model,
        "width": config.model_width,
        "precision": config.precision,
        "convolution": config.convolution,
        "jobs_in_a_call": measured.jobs_in_a_call,
        "jobs_trained_per_arrival": measured.padding,
        "mesh": config.mesh,
        "stages": stages,
        "arrival_milliseconds": 1e3 * arrival,
        "arrival_spread_milliseconds": 1e3 * measured.arrival.spread,
        "arrivals_per_second": 1 / arrival,
        "arrival_gflop": measured.flops / 1e9,
        "arrival_share_of_peak": measured.flops / arrival / peak[0],
        "peak_tflops": peak[0] / 1e12,
        "peak_source": peak[1],
        "host_milliseconds": 1e3 * measured.host,
        "schedule_arrivals_per_second": measured.schedule_rate,
        "compile_seconds": measured.compile_seconds,
        "compilations": measured.compilations,
        "recompilations": measured.recompilations,
        "peak_bytes": measured.peak_bytes,
        "live_bytes": measured.live_bytes,
        "planned_bytes": measured.planned_bytes,
        "live_over_planned": measured.live_bytes / measured.planned_bytes,
        "live_versions": measured.live_versions,
        "concurrency": config.concurrency,
        "window_ratio": measured.window_ratio,
    }
    if "arrival" in peers:
        result["peer_arrival_milliseconds"] = 1e3 * peers["arrival"].median
        result["arrival_ratio"] = peers["arrival"].median / arrival
        result["peer_device"] = peer_device
    return result


def machine(devices: int) -> dict[str, str]:
    """The devices, so many as computed, and the versions behind a figure."""
    device = jax.devices()[0]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": f"{devices} x {device.device_kind}",
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **versions,
    }


def table(told: dict[str, Any]) -> str:
    """The figures as Markdown."""
    peer = "arrival_ratio" in told
    header = ["stage", "ms", "±", "GFLOP", "of peak", *(["PyTorch ms", "ratio"] if peer else [])]
    rows = [header, ["---"] * len(header)]

    def row(name, own):
        cells = [
            name,
            f"{own['milliseconds']:.4g}",
            f"{own['spread_milliseconds']:.2g}",
            f"{own['gflop']:.4g}" if "gflop" in own else "",
            f"{own['share_of_peak']:.0%}" if "share_of_peak" in own else "",
        ]
        if peer:
            there = "ratio" in own
            cells.append(f"{own['peer_milliseconds']:.4g}" if there else "")
            cells.append(f"{own['ratio']:.2f}" if there else "")
        rows.append(cells)

    for name, own in told["stages"].items():
        row(name, own)
    whole = {
        "milliseconds": told["arrival_milliseconds"],
        "spread_milliseconds": told["arrival_spread_milliseconds"],
        "gflop": told["arrival_gflop"],
        "share_of_peak": told["arrival_share_of_peak"],
    }
    if peer:
        whole["peer_milliseconds"] = told["peer_arrival_milliseconds"]
        whole["ratio"] = told["arrival_ratio"]
    row("**whole arrival**", whole)
    versions = ", ".join(f"{name} {value}" for name, value in told["machine"].items())
    if peer:
        versions += f"; PyTorch on {told['peer_device']}, {told['precision']}"
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    lines += [
        "",
        f"{told['model']}, width {told['width']}, {told['precision']}, convolution "
        f"{told['convolution']}, {told['jobs_in_a_call']} jobs in a call, "
        f"{told['jobs_trained_per_arrival']:.2f} trained per arrival. {versions}.",
        f"{told['arrivals_per_second']:.3g} arrivals/s; windows {told['window_ratio']:.2f} times "
        f"as fast as one job in a call; host {told['host_milliseconds']:.2f} ms an arrival; "
        f"schedule {told['schedule_arrivals_per_second']:,.0f} arrivals/s; peak "
        f"{told['peak_tflops']:.3g} TFLOP/s ({told['peak_source']}).",
        f"Compilations: {told['compilations']} in {told['compile_seconds']:.1f} s, "
        f"{told['recompilations']} after warm-up. Memory: arrays {told['live_bytes'] / 1e9:.3g} GB "
        f"between calls ({told['live_over_planned']:.2f} of the plan), peak "
        f"{told['peak_bytes'] / 1e9:.3g} GB; {told['live_versions']} live versions at concurrency "
        f"{told['concurrency']}.",
    ]
    return "\n".join(lines) + "\n"
