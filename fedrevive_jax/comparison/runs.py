"""One run of a comparison: running it to its end, and what its folder tells of that."""

from collections.abc import Callable
from pathlib import Path

from fedrevive_jax import data
from fedrevive_jax.comparison import statistics
from fedrevive_jax.comparison.statistics import Run
from fedrevive_jax.compute import buckets
from fedrevive_jax.config import Config
from fedrevive_jax.record import files
from fedrevive_jax.running import runner

# Marks a run that diverged or whose uploads were rejected, which would only end so again.
FAILED = "failed.json"


def run(
    config: Config,
    overwrite: bool,
    interruption: runner.Stopping | None = None,
    publish: Callable[[], None] = lambda: None,
) -> None:
    """Runs it, or goes on with it. One that diverges or rejects too much is marked.

    Args:
      config: what to run, with a folder.
      overwrite: start afresh.
      interruption: asks it to save and stop.
      publish: called with every checkpoint, see `runner.run`.

    Raises:
      UserError: see `runner.run`.
    """
    try:
        runner.run(
            config,
            keep_record=True,
            overwrite=overwrite,
            interruption=interruption,
            publish=publish,
        )
    except (runner.DivergenceError, runner.RejectLimitError) as error:
        ended = {"by": type(error).__name__, "message": str(error)}
        with buckets.updated(config.run_dir, "workdir") as folder:
            files.write_json(folder / FAILED, ended)


def is_done(config: Config, digest_of: Callable[[Config], str] = data.digest) -> bool:
    """Whether it is finished or marked, on the data that are there now.

    Raises:
      ConfigError: the folder holds another run, see `runner.is_finished`.
    """
    if runner.is_finished(config, digest_of=digest_of):
        return True
    failed = (config.run_dir / FAILED).exists()
    if failed:
        runner.check_sources(config, digest_of)
    return failed


def read(folder: Path) -> Run:
    """What the folder of a run that is done has recorded; it may be in a bucket.

    Raises:
      ConfigError: see `statistics.read_run`.
    """
    with buckets.at_hand(folder, "workdir", _tells) as copy:
        run = statistics.read_run(copy, (copy / FAILED).exists())
    return run._replace(folder=folder)


def _tells(name: str) -> bool:
    """The files that `read` reads."""
    return "/" not in name and name.endswith((".json", ".jsonl", statistics.MADE))


def line(config: Config) -> str:
    """What is told of a run that is done."""
    name = config.run_dir.name
    with buckets.at_hand(config.run_dir, "workdir", (FAILED, files.SUMMARY).__contains__) as folder:
        if (folder / FAILED).exists():
            return f"{name}: {files.read_json(folder / FAILED)['message']}"
        return f"{name}: accuracy {files.read_json(folder / files.SUMMARY)['final_accuracy']:.4f}"
