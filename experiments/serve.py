"""Serves a real federation: python -m experiments.serve --local_clients=6 [--method=... ...].

With --local_clients all of it is on this machine, and nothing can be reached from outside. Between
machines: --listen=HOST:PORT --certificates=DIR --clients=DIR, and `experiments.join` on each
client. The record is that of a simulation, with seconds in the place of simulated time.
"""

import dataclasses
import math
import resource
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import flags as config_flags
from fedrevive_jax.config import is_bucket, whole_path
from fedrevive_jax.errors import ConfigError, UserError
from fedrevive_jax.presets import OF_PRESETS, resolve
from fedrevive_jax.record.interruption import Interruption

LOCAL = flags.DEFINE_integer(
    "local_clients", 0, "clients on this machine, which share the training split between them"
)
PAUSES = flags.DEFINE_string(
    "pauses",
    "0,1,2,4",
    "seconds that jobs of the local clients take longer, in turn, to play slow ones",
)
LISTEN = flags.DEFINE_string("listen", None, "HOST:PORT at which clients of other machines come in")
CERTIFICATES = flags.DEFINE_string(
    "certificates", "certificates", "folder of the server's certificates, see experiments.keys"
)
CLIENTS = flags.DEFINE_string("clients", None, "folder of the public keys of those who may come in")
JOB_SECONDS = flags.DEFINE_float("job_seconds", 600.0, "how long an upload is waited for")
SAVE_SECONDS = flags.DEFINE_float("save_seconds", 10.0, "seconds between two checkpoints")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "start afresh in a folder that holds a run")
STATE = flags.DEFINE_string(
    "state_dir", None, "folder for Flower's database and the logs; default: beside the workdir"
)
GRACE = config_flags.define_grace(30.0)  # several processes end, one after the other
config_flags.define()
flags.adopt_module_key_flags(config_flags)

# What the number of clients decides where it is not said.
OF_CLIENTS = ("num_clients", "concurrency", "beta_s_max")
# Flags of clients on this machine, and of those on others.
OF_LOCAL, OF_LISTEN = (PAUSES,), (CERTIFICATES, CLIENTS)
# Of a live run where nothing else is asked for: it ends by versions, not by the clock.
ENDLESS, VERSIONS = "1e9", "300"


def main() -> int:
    for flag in (JOB_SECONDS, SAVE_SECONDS):
        if not 0 < flag.value < math.inf:
            raise ConfigError(flag.name, f"{flag.value:g}", "must be above 0 and finite")
    door, count = _door()
    pauses = _pauses(PAUSES.value, count)
    given = config_flags.given_values()
    if not given["max_time"]:
        given["max_time"], given["max_versions"] = ENDLESS, given["max_versions"] or VERSIONS
    workdir = f"runs/live_{given['dataset'] or 'digits'}_{given['method'] or 'fedrevive'}"
    given["workdir"] = given["workdir"] or workdir
    begun = _begun(given["workdir"]) if door else {}
    for name, value in {
        **begun,
        "num_clients": begun.get("num_clients", str(count)),
        "concurrency": begun.get("concurrency", given["num_clients"] or str(count)),
    }.items():
        given[name] = given[name] or value
    config = resolve(**given)
    if not given["beta_s_max"]:
        # It goes with how many work at the same time, and the preset's is for a crowd.
        preset = resolve(**{name: given[name] for name in ("dataset", "method", *OF_PRESETS)})
        scaled = preset.beta_s_max * config.concurrency / preset.concurrency
        config = dataclasses.replace(config, beta_s_max=scaled)
    if config.num_clients < count:
        beyond = "; the run was begun with fewer" if begun else ""
        raise ConfigError(
            "num_clients", config.num_clients, f"must be at least {count}, the clients{beyond}"
        )
    if is_bucket(str(config.run_dir)):
        raise ConfigError("workdir", config.run_dir, "must be on this machine")
    config_flags.need_flower()
    from fedrevive_jax.live import serving
    from fedrevive_jax.live.coordinator import Times
    from fedrevive_jax.live.flower import hosting
    from fedrevive_jax.running import runner

    config = runner.settle(config)
    if runner.is_finished(config, OVERWRITE.value):
        print(f"{config.run_dir} holds this run, finished; nothing to do")
        return 0
    state = Path(whole_path("state_dir", STATE.value or f"{config.run_dir}.live")).absolute()
    order = serving.Order(config, Times(job=JOB_SECONDS.value), SAVE_SECONDS.value, OVERWRITE.value)
    clients = [] if door else hosting.shared_between(config, pauses)
    began = time.monotonic()
    with Interruption(GRACE.value) as interruption:
        status = hosting.host(
            order,
            state,
            clients=clients,
            door=door and hosting.Door(*door),
            stop=lambda: interruption.requested,
            tell=lambda line: _tell(time.monotonic() - began, line),
        )
    if status["state"] == serving.FAILED:
        if status["field"]:
            raise ConfigError(*status["field"])
        raise UserError(status["line"])
    if status["state"] == serving.STOPPED:
        print(status["line"], file=sys.stderr)
        return interruption.status
    summary = status["summary"]
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"{sum(own.ru_utime + own.ru_stime for own in used):.0f} s of CPU", file=sys.stderr)
    print(
        f"{config.method} on {config.dataset}, live with {summary['clients_joined']} clients: "
        f"accuracy {summary['final_accuracy']:.4f} (best {summary['best_accuracy']:.4f}) "
        f"after {summary['versions']} versions, {summary['arrivals']} arrivals, "
        f"{summary['simulated_time']:.0f} s; record in {config.run_dir}"
    )
    return 0


def _begun(workdir: str) -> dict[str, str]:
    """What a run that is to be continued says of its clients, whose keys may have come or gone."""
    from fedrevive_jax.record import files, reading

    folder = Path(whole_path("workdir", workdir, bucket=True))
    if OVERWRITE.value or is_bucket(workdir) or not (folder / files.CONFIG).is_file():
        return {}
    kept = reading.read_config(folder)
    return {name: str(getattr(kept, name)) for name in OF_CLIENTS}


def _door() -> tuple[tuple[tuple[str, int], tuple[Path, ...], Path] | None, int]:
    """Where clients of other machines come in, and how many clients there are.

    Raises:
      ConfigError: it is not said where clients are, or a file is missing.
    """
    if LISTEN.value is None:
        if not 1 <= LOCAL.value <= 64:
            raise ConfigError(
                "local_clients", LOCAL.value, "must be 1 to 64, or give listen=HOST:PORT"
            )
        _refuse(OF_LISTEN, "goes with `listen`, not with `local_clients`")
        return None, LOCAL.value
    if LOCAL.value:
        raise ConfigError(
            "local_clients", LOCAL.value, "goes without `listen`; use experiments.join"
        )
    _refuse(OF_LOCAL, "goes with `local_clients`, not with `listen`")
    address = config_flags.address("listen", LISTEN.value)
    home = Path(whole_path("certificates", CERTIFICATES.value)).absolute()
    files = tuple(home / name for name in ("ca.crt", "server.crt", "server.key"))
    for path in files:
        if not path.is_file():
            raise ConfigError("certificates", CERTIFICATES.value, f"holds no {path.name}")
    folder = Path(whole_path("clients", CLIENTS.value or "")).absolute()
    count = len(list(folder.glob("*.pub"))) if CLIENTS.value else 0
    if not count:
        raise ConfigError(
            "clients", CLIENTS.value or "", "must be a folder with public keys, *.pub"
        )
    try:
        socket.create_server(address).close()
    except OSError as error:
        reason = f"cannot be listened at ({error.strerror or error})"
        raise ConfigError("listen", LISTEN.value, reason) from None
    return (address, files, folder), count


def _refuse(of_the_other: Sequence[flags.FlagHolder], reason: str) -> None:
    for flag in of_the_other:
        if flag.present:
            raise ConfigError(flag.name, flag.value, reason)


def _pauses(text: str, count: int) -> list[float]:
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 3600 for value in values):
        raise ConfigError("pauses", text, "must be seconds, 0 to 3600, separated by commas")
    return [values[number % len(values)] for number in range(count)]


def _tell(seconds: float, line: str) -> None:
    """One line that is written over where there is a terminal."""
    end = "\r" if sys.stderr.isatty() else "\n"
    print(f"{seconds:6.0f} s  {line:<70}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    config_flags.run(main)
