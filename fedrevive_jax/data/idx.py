"""Reader of IDX files, the format of the MNIST family, plain or gzipped."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from fedrevive_jax.errors import ConfigError


def read_idx(folder: str, name: str, dimensions: int) -> np.ndarray:
    """Reads `folder/name` or `folder/name.gz` as a uint8 array of that many dimensions.

    Raises:
      ConfigError: the file is missing, cut short, too long, or not an IDX file of bytes.
    """
    path = Path(folder, name).expanduser()
    try:
        if not path.is_file():
            path = path.with_name(name + ".gz")
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except FileNotFoundError:
        raise ConfigError("data_dir", folder, f"no file {name} or {name}.gz") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError("data_dir", folder, f"{path.name} cannot be read ({error})") from None
    header = 4 + 4 * dimensions
    if len(raw) < header or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise ConfigError(
            "data_dir",
            folder,
            f"{path.name} is not an IDX file of bytes in {dimensions} dimensions",
        )
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    expected = header + math.prod(shape)  # in whole numbers that do not wrap round
    if len(raw) != expected:
        raise ConfigError(
            "data_dir", folder, f"{path.name} holds {len(raw)} bytes, its header says {expected}"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
