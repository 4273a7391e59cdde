"""Prepares a data set: python -m experiments.prepare --dataset=NAME --data_dir=DIR.

Downloads it, or takes the files in --manual_dir, and writes it as ArrayRecord files, which runs
read from --data_dir=DIR. cifar10, cifar100 and fashion_mnist need TensorFlow for that, runs do not.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from absl import flags

from experiments import flags as config_flags
from fedrevive_jax.config import whole_path
from fedrevive_jax.data import tfds_reader
from fedrevive_jax.data.errors import entries
from fedrevive_jax.errors import ConfigError, one_line

DATASET = flags.DEFINE_string("dataset", None, "data set to prepare")
DATA_DIR = flags.DEFINE_string("data_dir", None, "folder to write to")
MANUAL_DIR = flags.DEFINE_string("manual_dir", "", "folder with files that need no download")

TFDS_OWN = ("cifar10", "cifar100", "fashion_mnist")
NAMES = (*TFDS_OWN, "femnist", "newsgroups")


def main() -> None:
    print(prepare(DATASET.value or "", DATA_DIR.value or "", MANUAL_DIR.value))


def prepare(name: str, data_dir: str, manual_dir: str = "") -> str:
    """Prepares a data set unless it is prepared already; says where it is and what it holds.

    Raises:
      ConfigError: a name or folder is wrong, a package is missing, the download or the files that
        were given fail, or what lies in the folder already is damaged. Nothing is left behind that
        a run would take for a prepared data set.
    """
    if name not in NAMES:
        raise ConfigError("dataset", name, f"must be one of {', '.join(NAMES)}")
    if not data_dir:
        raise ConfigError("data_dir", "", "must name the folder to write to")
    data_dir = whole_path("data_dir", data_dir)
    manual = Path(whole_path("manual_dir", manual_dir)) if manual_dir else None
    if manual and not entries(manual):
        raise ConfigError("manual_dir", manual_dir, "no such folder, or it is empty")
    words = "is prepared already"
    if not tfds_reader.version_folders(name, data_dir):
        _write(name, Path(data_dir), manual)
        words = "is prepared"
    prepared = tfds_reader.find(name, data_dir)
    sizes = {
        split: sum(length for _, length in tfds_reader.check_shards(prepared, split))
        for split in prepared.builder.info.splits
    }
    counts = ", ".join(f"{size} {split}" for split, size in sizes.items())
    return f"{name} {words} in {prepared.folder}: {counts}"


def _write(name: str, root: Path, manual: Path | None) -> None:
    import tensorflow_datasets as tfds

    builder_class = _builder_class(name)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    before = _unfinished(root, name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        builder = builder_class(data_dir=root, file_format="array_record")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual)
        )
    except ConfigError:
        raise
    except Exception as error:  # of downloads, of archives, of disks: TFDS passes all kinds on
        by_hand = builder_class.MANUAL_DOWNLOAD_INSTRUCTIONS
        raise ConfigError(
            "dataset",
            name,
            f"cannot be prepared ({one_line(error)})"
            + (f"; without a download: --manual_dir with {by_hand}" if by_hand else ""),
        ) from error
    finally:
        for path in _unfinished(root, name) - before:
            shutil.rmtree(path, ignore_errors=True)


def _builder_class(name: str) -> type:
    """The TFDS builder; TFDS's own image builders encode with TensorFlow."""
    if name == "femnist":
        from fedrevive_jax.data.builders.femnist import Femnist

        return Femnist
    if name == "newsgroups":
        from fedrevive_jax.data.builders.newsgroups import Newsgroups

        return Newsgroups
    if importlib.util.find_spec("tensorflow") is None:
        raise ConfigError(
            "dataset",
            name,
            "to prepare it takes TensorFlow, pip install -e '.[tfds]'; runs do without",
        )
    import tensorflow_datasets as tfds

    return tfds.builder_cls(name)


def _unfinished(root: Path, name: str) -> set[Path]:
    """What TFDS writes to before a version, an extraction or a download is whole."""
    return {
        *root.glob(f"{name}/incomplete.*"),
        *root.glob("downloads/extracted/incomplete.*"),
        *root.glob("downloads/**/*.tmp.*"),
    }


if __name__ == "__main__":
    config_flags.run(main)
