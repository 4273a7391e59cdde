"""Small runs of the paper's workloads, on data prepared as a user's would be, only fewer."""

import json
import math
from pathlib import Path

from fedrevive_jax.presets import resolve
from fedrevive_jax.running import restore, runner
from tests import prepared
from tests.commands import call, flags

RECORD = {
    "config.json", "metrics.jsonl", "arrivals.jsonl", "summary.json", "curves.png", "report.html",
    "tensorboard", "checkpoints", "live", "run.lock", "clients.npz", "origin.json",
}  # fmt: skip
DISTILS = ("fedrevive", "dd_fedrevive")


def prepare(name: str, folder: Path) -> Path:
    prepared.write(name, folder, train=200, test=60, writers=24)
    return folder


def check_small_run(dataset: str, method: str, data_dir: Path, folder: Path) -> None:
    """A run by the preset at scale small: its whole record, and its model restored."""
    config = resolve(
        dataset, method, preset_scale="small", data_dir=str(data_dir), workdir=str(folder),
        convolution="lax",  # compiles a third faster; other tests hold both ways to agree
    )  # fmt: skip
    result = runner.run(config, keep_record=True)
    expected = set(RECORD)
    if dataset == "newsgroups":
        expected.add("tokenizer.json")
    elif method == "fedrevive":
        expected.add("synthetic.png")
    if method in DISTILS:
        expected.add("revival.png")
    assert {path.name for path in folder.iterdir()} == expected

    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(r["loss"]) for r in rows if r["kind"] == "evaluation")
    distilled = [r for r in rows if r["kind"] == "dfkd" and r["distillation"] is not None]
    assert bool(distilled) == (method in DISTILS)
    synthesised = [r for r in rows if r["kind"] == "dfkd" and r["synthesis"] is not None]
    assert bool(synthesised) == (method == "fedrevive")
    arrivals = [json.loads(row) for row in (folder / "arrivals.jsonl").read_text().splitlines()]
    assert len(arrivals) == result.summary["arrivals"] > 0
    assert all(row["accepted"] for row in arrivals)

    figures = restore.evaluate_checkpoint(folder)
    assert figures["accuracy"] == result.summary["final_accuracy"]
    assert figures["version"] == result.summary["versions"]


def check_commands(dataset: str, data_dir: Path, folder: Path) -> None:
    """The same as commands: run, then evaluate, from another place of the data."""
    arguments = {"dataset": dataset, "method": "afl_dw", "preset_scale": "small"}
    run = call(*flags(**arguments, data_dir=data_dir, workdir=folder, max_time=2))
    assert run.returncode == 0, run.stderr
    # So few samples leave some of FEMNIST's 62 classes without any.
    assert all(line.startswith("warning: ") and "class" in line for line in run.stderr.splitlines())
    moved = data_dir.rename(data_dir.with_name("moved"))
    gone = call(*flags(workdir=folder), program="evaluate")
    assert gone.returncode == 1
    assert f"python -m experiments.prepare --dataset={dataset} --data_dir=" in gone.stderr
    evaluated = call(*flags(workdir=folder, data_dir=moved), program="evaluate")
    assert evaluated.returncode == 0, evaluated.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert json.loads(evaluated.stdout)["accuracy"] == summary["final_accuracy"]
