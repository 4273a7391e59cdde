"""Evaluates a checkpoint: python -m experiments.evaluate --workdir=DIR [--step=N].

Restores the global model alone and prints JSON; the figures equal the run's own.
"""

import json

from absl import flags

from experiments import flags as config_flags
from fedrevive_jax.config import whole_path
from fedrevive_jax.errors import ConfigError

WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run")
STEP = flags.DEFINE_integer("step", None, "global version; default: the newest checkpoint")
SPLIT = flags.DEFINE_string("split", None, "split of the data set; default: the run's own")
DATA_DIR = flags.DEFINE_string("data_dir", None, "where the data lie, if not where they lay")
T5_WEIGHTS = flags.DEFINE_string(
    "t5_weights", None, "where the pretrained weights lie, if not where they lay"
)


def main() -> None:
    if not WORKDIR.value:
        raise ConfigError("workdir", "", "must name the folder of a run")
    from fedrevive_jax.running.restore import evaluate_checkpoint

    figures = evaluate_checkpoint(
        whole_path("workdir", WORKDIR.value, bucket=True),
        step=STEP.value,
        split=SPLIT.value,
        data_dir=DATA_DIR.value,
        t5_weights=T5_WEIGHTS.value,
    )
    print(json.dumps({"workdir": WORKDIR.value, **figures}, indent=2))


if __name__ == "__main__":
    config_flags.run(main)
