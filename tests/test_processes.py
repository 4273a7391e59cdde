"""Several processes that compute together: two of them on this machine, joined by JAX."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from fedrevive_jax.compute import processes
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import make_network
from fedrevive_jax.record import files, reading
from fedrevive_jax.running import runner
from tests.toys import SMALL, small

# With distillation, so that everything that is ever split is; teachers that two do not divide.
METHOD = "dd_fedrevive"
RUN = {"max_time": 5.0, "checkpoint_every": 7, "eval_every": 4, "client_batch": 2}


def two(folder, *others, program=("experiments.main",), **second):
    """Runs the command as two processes; `second` changes flags of the second one, and `program` is
    the module that it runs, with arguments of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = {
        **SMALL, **RUN, "method": METHOD, "workdir": folder, "mesh": "auto",
        "coordinator_address": address, "num_processes": 2,
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *module]
            + [f"--{name}={value}" for name, value in {**flags, **own, "process_id": i}.items()]
            + [*others],
            env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, (own, module) in enumerate((({}, ("experiments.main",)), (second, program)))
    ]
    ends = [process.communicate() for process in started]
    return [
        subprocess.CompletedProcess(p.args, p.returncode, *end)
        for p, end in zip(started, ends, strict=True)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The configuration of a run by one process, and the folder of the same run by two."""
    folder = tmp_path_factory.mktemp("runs")
    config = small(METHOD, **RUN, workdir=str(folder / "one"))
    runner.run(config, keep_record=True)
    first, second = two(folder / "two")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "accuracy" in first.stdout
    assert "accuracy" not in second.stdout
    return config, folder / "two"


def rows(folder):
    return files.read_rows(folder / files.ARRIVALS)


def assert_same_run(folder, expected):
    """The same arrivals; parameters and losses agree as when jobs are trained together."""
    assert len(rows(folder)) == len(rows(expected)) > 10
    for a, b in zip(rows(folder), rows(expected), strict=True):
        assert {**a, "loss": 0} == {**b, "loss": 0}
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    model = make_network("digitsnet", input_shape=(8, 8, 1), num_classes=10, width=4)
    (version, params), (same, others) = (reading.read_params(f, model) for f in (folder, expected))
    assert version == same
    for a, b in zip(*map(jax.tree.leaves, (params, others)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    evaluations = [
        [row["version"] for row in runner.read_evaluations(f)] for f in (folder, expected)
    ]
    assert evaluations[0] == evaluations[1]


def cut(folder, to):
    """A copy of a finished run, as if it had been interrupted after its last checkpoint but one."""
    shutil.copytree(folder, to)
    (to / files.SUMMARY).unlink()
    *_, version, newest = sorted(int(path.name) for path in (to / "checkpoints").iterdir())
    shutil.rmtree(to / "checkpoints" / str(newest))
    return version


@pytest.mark.slow
def test_two_processes_finish_the_run_of_one(runs):
    config, folder = runs
    assert_same_run(folder, config.run_dir)
    assert files.read_json(folder / files.SUMMARY)["devices"] == 2
    assert any(row["beta"] > 0 for row in rows(folder))


@pytest.mark.slow
def test_two_continue_what_one_began(runs, tmp_path):
    config, _ = runs
    version = cut(config.run_dir, tmp_path / "run")
    first, second = two(tmp_path / "run")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert f"continued from version {version}" in first.stdout
    assert_same_run(tmp_path / "run", config.run_dir)


@pytest.mark.slow
def test_one_continues_what_two_began(runs, tmp_path):
    config, folder = runs
    version = cut(folder, tmp_path / "run")
    config = dataclasses.replace(config, workdir=str(tmp_path / "run"))
    assert runner.run(config, keep_record=True).resumed_version == version
    assert_same_run(tmp_path / "run", folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_saves_and_ends_both(tmp_path, number):
    """They stop before the same arrival, and go on from there."""
    folder = tmp_path / "run"
    # Long enough for JAX's notice, which takes a second or two to reach all.
    flags = ("--method=fedbuff", "--max_time=40", "--eval_every=1000", "--checkpoint_every=1000")
    ends = two(folder, *flags, "--grace=100", program=("tests.killed_run", "20", number.name))
    saved = set()
    for end in ends:
        assert end.returncode == 128 + (number if end is ends[1] else signal.SIGTERM), end.stderr
        saved.add(int(end.stderr.partition("interrupted: saved at version ")[2]))
    (version,) = saved
    assert version > 0
    assert not (folder / files.SUMMARY).exists()
    arrivals = len(rows(folder))
    first, second = two(folder, *flags)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert f"continued from version {version}" in first.stdout
    assert [row["index"] for row in rows(folder)] == list(range(len(rows(folder))))
    assert len(rows(folder)) > arrivals > 10


@pytest.mark.slow
def test_an_error_of_one_process_ends_both(tmp_path):
    """The folder is the first one's business; a flag that differs is noticed by the second."""
    (tmp_path / "thesis.tex").write_text("years of work")
    for message, ends in (
        ("holds thesis.tex but no config.json", two(tmp_path)),
        ("seed: 1, but 0 on process 0", two(tmp_path / "a", seed=1)),
    ):
        assert [end.returncode for end in ends] == [1, 1]
        for end in ends:
            last = end.stderr.splitlines()[-1]
            assert last.startswith("error: ")
            assert message in last
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("maybe",), "distributed=maybe: must be one of auto, on, off"),
        (("off", None, "2"), "num_processes=2: needs distributed=auto or on"),
        (("on", "host"), "coordinator_address=host: must be host:port"),
        (("on", "1234"), "coordinator_address=1234: must be host:port"),
        (("on", ":1234"), "coordinator_address=:1234: must be host:port"),
        (("auto", "host:1", "two"), "num_processes=two: must be a whole number"),
        (("on", "host:1", "2", "-1"), "process_id=-1: must be a whole number"),
    ],
)
def test_flags_that_make_no_sense(arguments, message):
    with pytest.raises(ConfigError, match=message):
        processes.join(*arguments)


def test_a_wait_is_told_and_ends(monkeypatch, caplog):
    monkeypatch.setattr(processes, "TOLD_AFTER", 0.01)
    never = threading.Event()
    with pytest.raises(TimeoutError):
        processes._in_time(never.wait, 0.02, "waiting for Godot")
    assert caplog.messages == ["waiting for Godot"]
    never.set()


def test_what_needs_no_wait_is_not_told(caplog):
    came = []
    processes._in_time(lambda: came.append(1), 60, "waiting")
    with pytest.raises(KeyError, match="own"):
        processes._in_time(lambda: {}["own"], 60, "waiting")
    assert came == [1]
    assert not caplog.messages


@pytest.mark.slow
@pytest.mark.parametrize("process_id", ["0", "1"])
def test_one_of_two_announced_processes(process_id):
    """One line while it waits, one line at the end, and no stack trace of C++."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = f"""if True:
        import sys
        from fedrevive_jax.compute import processes
        processes.TOLD_AFTER = 0.5
        try:
            processes.join("auto", "{address}", "2", "{process_id}", timeout=1)
        except Exception as error:
            print(error, file=sys.stderr)
            processes.leave(1)
    """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    waits, gives_up = ended.stderr.splitlines()
    others = f"the other processes (2 in all) at {address}"
    assert waits.startswith(f"waiting up to 1 s for {others}; each has to be started, or do")
    assert gives_up.startswith(f"distributed=auto: {others} were not there after 1 s")
