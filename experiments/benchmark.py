"""Measures the parts of an arrival: python -m experiments.benchmark [--model=convnet --peer=torch].

Random data of the preset's shapes, a warm-up, medians of several calls whose results are waited
for. --peer=torch runs the same work, stage by stage, in eager PyTorch in the same process.
--convolutions measures the ways to compute the model's convolutions instead. Other settings of a
run change what is measured, but for data set, method and folder.
"""

import json
import sys
from pathlib import Path

from absl import flags

from experiments import flags as config_flags
from fedrevive_jax.config import whole_path
from fedrevive_jax.errors import ConfigError

PEER = flags.DEFINE_string("peer", None, "what to compare with: torch")
REPEATS = flags.DEFINE_integer("repeats", 5, "calls of every stage")
ARRIVALS = flags.DEFINE_integer("arrivals", 5, "whole arrivals that are timed")
PEAK = flags.DEFINE_float(
    "peak_tflops", None, "TFLOP/s of the device; default: published, or else measured"
)
JSON = flags.DEFINE_string("json", None, "file to write all figures to")
CONVOLUTIONS = flags.DEFINE_bool("convolutions", False, "measure the ways of convolution")
config_flags.define()
flags.adopt_module_key_flags(config_flags)


def main() -> None:
    from experiments.benchmarking import convolution_table, measuring, report, stages
    from fedrevive_jax.compute import environment
    from fedrevive_jax.compute.devices import make_mesh

    given = {name: value for name, value in config_flags.given_values().items() if value}
    name = given.pop("model", None) or "convnet"
    if name not in stages.WORKLOADS:
        raise ConfigError("model", name, f"must be one of {', '.join(stages.WORKLOADS)}")
    for field in ("dataset", "method", "workdir"):
        if field in given:
            raise ConfigError(field, given[field], "is fixed here; --model chooses the work")
    if PEER.value not in (None, "torch"):
        raise ConfigError("peer", PEER.value, "must be torch")
    for flag in (REPEATS, ARRIVALS):
        if flag.value < 1:
            raise ConfigError(flag.name, flag.value, "must be at least 1")
    if PEAK.value is not None and not PEAK.value > 0:
        raise ConfigError("peak_tflops", PEAK.value, "must be above 0")
    environment.check()
    config, dataset = stages.workload(name, **given)
    mesh = make_mesh(config.mesh)
    devices = 1 if mesh is None else mesh.size
    if PEER.value:
        if devices > 1:
            raise ConfigError("mesh", config.mesh, "must be 1 with --peer=torch, on one device")
        if config.judges != "all":
            raise ConfigError("judges", config.judges, "must be all with --peer=torch")
        _require_torch(name)
    if CONVOLUTIONS.value:
        if dataset.is_text:
            raise ConfigError("convolutions", None, "t5 has none")
        rows = convolution_table.measure(config, dataset, REPEATS.value, _say)
        print(convolution_table.table(rows), end="", flush=True)
        _write(rows)
        return
    measured = stages.measure(
        config, dataset, repeats=REPEATS.value, arrivals=ARRIVALS.value, say=_say
    )
    peers, peer_device = {}, ""
    if PEER.value:
        from experiments.benchmarking import torch_peer

        _say("the same in PyTorch")
        peers = torch_peer.measure(config, dataset, REPEATS.value)
        peer_device = torch_peer.device_name()
    if PEAK.value is not None:
        peak = PEAK.value * 1e12, "given"
    else:
        one, source = measuring.peak_flops(config.precision)
        peak = one * devices, source
    told = report.figures(measured, peers, peak, peer_device, devices)
    print(report.table(told), end="", flush=True)  # before a file that may not be writable
    _write(told)


def _require_torch(name: str) -> None:
    import importlib.util

    for package in ("torch", *(["transformers"] if name == "t5" else [])):
        if importlib.util.find_spec(package) is None:
            raise ConfigError("peer", "torch", f"needs {package}, pip install -e '.[parity]'")

    import jax

    if jax.default_backend() != "cpu":
        from experiments.benchmarking import torch_peer

        torch_peer.device_of_peer()  # told before the measurement, not after


def _write(told) -> None:
    if JSON.value:
        try:
            Path(whole_path("json", JSON.value)).write_text(
                json.dumps(told, indent=2) + "\n", encoding="utf-8"
            )
        except OSError as error:
            raise ConfigError("json", JSON.value, f"cannot be written ({error.strerror})") from None


def _say(line: str) -> None:
    print(f"{line} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    config_flags.run(main)
