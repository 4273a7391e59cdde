"""What surrounds a command: its output, its locale, files that cannot be read or written."""

import io
import os
import subprocess
import sys

import pytest

from experiments import flags as config_flags
from tests.commands import call


def main(*arguments, **where):
    command = [sys.executable, "-m", "experiments.main", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **where)


@pytest.mark.parametrize("argument", ["--help", "--dry_run"])
def test_an_output_that_nobody_reads(argument):
    """As with `| head`: the status of SIGPIPE, and no word."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = main(argument, stdout=writing)
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("argument", ["--help", "--dry_run"])
def test_an_output_that_is_full(argument):
    with open("/dev/full", "w") as full:
        ended = main(argument, stdout=full)
    assert ended.returncode == 1
    assert ended.stderr == "error: the output or a connection: No space left on device\n"


def test_streams_that_are_closed_or_of_another_locale(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(UnicodeEncodeError):
        print("café")
    config_flags._make_streams_whole()
    print("café")
    print("lost", file=sys.stderr)
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"caf\\xe9\n"


def test_an_error_of_the_system_is_one_line():
    """A name that no file can have."""
    name = "/" + "x" * 300
    result = call("--dry_run", "--dataset=image_folder", f"--data_dir={name}")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert "File name too long" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_cache_that_cannot_be_written_is_told_once(tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    for fine in ("", "gs://bucket/programs", str(tmp_path / "new")):
        config_flags._check_cache(fine)
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "true"
    assert not caplog.messages
    config_flags._check_cache(str(blocked / "programs"))
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    (told,) = caplog.messages
    assert told.endswith("cannot be written (Not a directory); no program is kept")


def test_a_home_is_where_its_user_keeps_a_key(tmp_path):
    """A shell leaves `--out=~/me` as it is."""
    made = subprocess.run(
        [sys.executable, "-m", "experiments.keys", "--client", "--out=~/me"],
        env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["me", "me.pub"]
