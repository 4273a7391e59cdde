"""The project's own TFDS builders. Only `experiments.prepare` imports them, a run does not.

They write images as encoded PNG files, which TFDS stores as they are: no TensorFlow is needed.
"""

from pathlib import Path

import tensorflow_datasets as tfds


def manual_folder(dl_manager: tfds.download.DownloadManager) -> Path | None:
    """The folder of files that the user has, or None where they are to be downloaded."""
    try:
        return Path(dl_manager.manual_dir)
    except AssertionError:  # TFDS's way to say that it is missing or empty
        return None
