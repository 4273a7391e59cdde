"""One run of a comparison: running it to its end, and what its folder tells of that."""

from collections.abc import Callable

from fedrevive_jax import data
from fedrevive_jax.config import Config
from fedrevive_jax.record import files
from fedrevive_jax.running import runner

# Marks a run that diverged or whose uploads were rejected, which would only end so again.
FAILED = "failed.json"


def run(config: Config, overwrite: bool, interruption: runner.Stopping | None = None) -> None:
    """Runs it, or goes on with it. One that diverges or rejects too much is marked.

    Args:
      config: what to run, with a folder.
      overwrite: start afresh.
      interruption: asks it to save and stop.

    Raises:
      UserError: see `runner.run`.
    """
    try:
        runner.run(config, keep_record=True, overwrite=overwrite, interruption=interruption)
    except (runner.DivergenceError, runner.RejectLimitError) as error:
        ended = {"by": type(error).__name__, "message": str(error)}
        files.write_json(config.run_dir / FAILED, ended)


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


def line(config: Config) -> str:
    """What is told of a run that is done."""
    folder = config.run_dir
    if (folder / FAILED).exists():
        return f"{folder.name}: {files.read_json(folder / FAILED)['message']}"
    accuracy = files.read_json(folder / files.SUMMARY)["final_accuracy"]
    return f"{folder.name}: accuracy {accuracy:.4f}"
