"""Runs a method on a data set: python -m experiments.main [--dataset=... --method=... ...].

The same command run again continues an unfinished run, and does nothing to a finished one. A run
that gets SIGTERM or SIGINT saves and ends with status 143 or 130. On several hosts the same command
is run on each; a signal to one of them stops all, before the same arrival.
"""

import json
import sys
from typing import Any

from absl import flags

from experiments import flags as config_flags
from fedrevive_jax.compute import processes
from fedrevive_jax.config import Config
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.presets import resolve
from fedrevive_jax.record.interruption import InterruptedRunError, Interruption

DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the plan as JSON; no training")
TARGET = flags.DEFINE_string(
    "target",
    None,
    "with --dry_run: compile the run's programs for TPUs that need not be there, like v5e:1x1 or "
    "v6e:2x4, and tell what they would take; wants the extra `tpu`",
)
PROFILE = flags.DEFINE_bool("profile", False, "trace a few windows into WORKDIR/profile")
GRACE = config_flags.define_grace()
OVERWRITE = flags.DEFINE_bool("overwrite", False, "start afresh in a folder that holds a run")
DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    "auto",
    "whether other processes compute together with this one, over --mesh=auto: auto where a "
    f"cluster is recognised ({', '.join(processes.MODES)})",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, where no cluster tells it"
)
NUM_PROCESSES = flags.DEFINE_string(
    "num_processes", None, "processes that compute together, where no cluster tells it"
)
PROCESS_ID = flags.DEFINE_string(
    "process_id", None, "number of this process, where no cluster tells it"
)
config_flags.define()
flags.adopt_module_key_flags(config_flags)


def main() -> int:
    watch = Interruption(GRACE.value)
    config = resolve(**config_flags.given_values())
    if TARGET.value is not None and not DRY_RUN.value:
        raise ConfigError("target", TARGET.value, "is for --dry_run; a run uses the devices it has")
    if DRY_RUN.value:
        print(json.dumps(_planned(config), indent=2))
        return 0
    processes.join(DISTRIBUTED.value, COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    from fedrevive_jax.compute import environment

    environment.check()
    # After joining: JAX's own service would take SIGTERM away again.
    with watch as interruption:
        try:
            _run(config, interruption)
        except InterruptedRunError as message:
            print(message, file=sys.stderr)
    return interruption.status


def _planned(config: Config) -> dict[str, Any]:
    if TARGET.value is None:
        from fedrevive_jax.simulation.planning import plan

        return plan(config)
    import jax

    from fedrevive_jax.compute.target import described
    from fedrevive_jax.simulation import compiling

    # Only a chip that is there can read its programs back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    return compiling.plan(config, described(TARGET.value))


def _run(config: Config, interruption: Interruption) -> None:
    from fedrevive_jax.running import runner

    if processes.first(lambda: runner.is_finished(config, OVERWRITE.value)):
        if processes.is_first():
            print(f"{config.run_dir} holds this run, finished; nothing to do")
        return
    result = runner.run(
        config,
        keep_record=True,
        overwrite=OVERWRITE.value,
        interruption=interruption,
        profile=PROFILE.value,
    )
    if not processes.is_first():
        return
    if result.resumed_version is not None:
        print(f"continued from version {result.resumed_version}")
    summary = result.summary
    print(
        f"{config.method} on {config.dataset}, seed {config.seed}: "
        f"accuracy {summary['final_accuracy']:.4f} (best {summary['best_accuracy']:.4f}) "
        f"after {summary['versions']} versions, {summary['arrivals']} arrivals, "
        f"{summary['wall_seconds']:.0f} s; record in {config.run_dir}"
    )


if __name__ == "__main__":
    config_flags.run(main)
