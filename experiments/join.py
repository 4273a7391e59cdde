"""Works for a federation's server: python -m experiments.join --server=HOST:PORT ...

It trains on the data that are here, of --dataset and --data_dir, and sends back trained models with
statistics of their features; no sample leaves this machine. What is trained, and how long, the
server says. It ends on Ctrl-C or SIGTERM.
"""

import sys
from pathlib import Path

from absl import flags

from experiments import flags as config_flags
from fedrevive_jax.config import whole_path
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.presets import resolve
from fedrevive_jax.record.interruption import Interruption

SERVER = flags.DEFINE_string("server", None, "HOST:PORT at which the server listens")
CERTIFICATE = flags.DEFINE_string("certificate", "ca.crt", "the server's ca.crt")
KEY = flags.DEFINE_string("key", None, "this client's private key, see experiments.keys")
STATE = flags.DEFINE_string("state_dir", "runs/client.live", "folder for logs")
GRACE = config_flags.define_grace(30.0)  # several processes end, one after the other
# The rest is the server's to say.
config_flags.define(("dataset", "data_dir", "t5_weights", "precision", "convolution"))
flags.adopt_module_key_flags(config_flags)


def main() -> int:
    address = config_flags.address("server", SERVER.value)
    certificate, key = (_file(flag) for flag in (CERTIFICATE, KEY))
    config = resolve(method="fedbuff", **config_flags.given_values())
    config_flags.need_flower()
    from fedrevive_jax import data
    from fedrevive_jax.live.flower import hosting
    from fedrevive_jax.live.trainer import Options
    from fedrevive_jax.running import runner

    config = runner.settle(config)
    held = data.spec(config)  # what is wrong with the data is told here, not in a log
    print(f"{held.num_classes} classes of {config.dataset}; working for {SERVER.value}")
    with Interruption(GRACE.value) as interruption:
        hosting.join(
            Path(whole_path("state_dir", STATE.value)).absolute(),
            Options(config),
            f"{address[0]}:{address[1]}",
            certificate,
            key,
            lambda: interruption.requested,
        )
    print("left", file=sys.stderr)
    return interruption.status


def _file(flag: flags.FlagHolder) -> Path:
    path = Path(whole_path(flag.name, flag.value or ""))
    if not path.is_file():
        raise ConfigError(flag.name, flag.value or "", "is no file")
    return path.absolute()


if __name__ == "__main__":
    config_flags.run(main)
