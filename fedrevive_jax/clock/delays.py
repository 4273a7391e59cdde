"""How long the three phases of a client's job take: download, local training, upload.

Each client has *persistent* mean times, drawn once for the population; each of its jobs ("visits")
then draws its own durations around them. A draw is addressed by (seed, phase, visit, client), so it
does not depend on the order in which the virtual clock asks for it. Times are in simulated units.
"""

import csv
import math
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from fedrevive_jax.compute.streams import Stream, numpy_generator
from fedrevive_jax.config import Config
from fedrevive_jax.data import names
from fedrevive_jax.errors import ConfigError, one_line


class Durations(NamedTuple):
    """Durations of one visit of every client, float64 arrays of shape [N]."""

    download: np.ndarray
    train: np.ndarray
    upload: np.ndarray


class DelayModel(Protocol):
    """Anything that tells the durations of the visit-th job of all N clients."""

    def durations(self, visit: int) -> Durations: ...


@dataclass(frozen=True)
class Phase:
    """The law of one phase.

    Attributes:
      law: `constant`, `exponential`, `uniform`, `lognormal` or `halfnormal`.
      means: the possible persistent means of a client.
      probabilities: the share of clients that has each mean.
      spread: half-width for `uniform` (time units), sigma of the logarithm for `lognormal`; the
        other laws have none.
    """

    law: str
    means: tuple[float, ...]
    probabilities: tuple[float, ...] = (1.0,)
    spread: float = 0.0

    def client_means(self, generator: np.random.Generator, num_clients: int) -> np.ndarray:
        return generator.choice(self.means, size=num_clients, p=self.probabilities)

    def draw(self, generator: np.random.Generator, means: np.ndarray) -> np.ndarray:
        """One duration for each client around its mean; every law keeps that mean."""
        shape = means.shape
        if self.law == "constant":
            return means.copy()
        if self.law == "exponential":
            return means * generator.standard_exponential(shape)
        if self.law == "uniform":
            return means + self.spread * generator.uniform(-1.0, 1.0, shape)
        if self.law == "lognormal":
            sigma = self.spread
            return means * np.exp(sigma * generator.standard_normal(shape) - sigma**2 / 2)
        if self.law == "halfnormal":
            return means * math.sqrt(math.pi / 2) * np.abs(generator.standard_normal(shape))
        raise ValueError(f"unknown law {self.law!r}")


# The two schedules of arXiv 2511.00655: (download, train, upload).
PUBLISHED: dict[str, tuple[Phase, Phase, Phase]] = {
    "default": (
        Phase("constant", (0.1,)),
        Phase("exponential", (1.0, 1.3, 1.6), (0.25, 0.5, 0.25)),
        Phase("uniform", (0.15, 0.25), (0.5, 0.5), spread=0.02),
    ),
    "shifted": (
        Phase("constant", (0.02,)),
        Phase("exponential", (0.1,)),
        Phase("uniform", (0.05, 0.10), (0.5, 0.5), spread=0.01),
    ),
}


class RandomDelays:
    """Durations drawn from a law per phase."""

    def __init__(self, phases: tuple[Phase, Phase, Phase], num_clients: int, seed: int):
        self._phases = phases
        self._seed = seed
        self._means = tuple(
            phase.client_means(numpy_generator(seed, Stream.CLIENT_PROFILE, i), num_clients)
            for i, phase in enumerate(phases)
        )

    def durations(self, visit: int) -> Durations:
        return Durations(
            *(
                phase.draw(numpy_generator(self._seed, Stream.DURATION, i, visit), means)
                for i, (phase, means) in enumerate(zip(self._phases, self._means, strict=True))
            )
        )


class TraceDelays:
    """Durations replayed from a CSV file of measured ones.

    The header names the columns `download`, `train`, `upload` and optionally `client`, in letters
    of any case, with commas, semicolons or tabs between them. With `client`, simulated client i
    replays the rows of the (i mod recorded clients)-th recorded client in file order, wrapping
    round. Recorded clients are in natural order, 2 before 10. Without `client`, every visit takes a
    random row.
    """

    def __init__(self, path: str, num_clients: int, seed: int):
        rows, owners = _read_trace(path)
        self._rows = rows
        self._seed = seed
        self._num_clients = num_clients
        self._recorded: tuple[np.ndarray, np.ndarray] | None = None
        if owners is not None:
            order = np.argsort(owners, kind="stable")
            self._rows = rows[order]
            _, first, count = np.unique(owners[order], return_index=True, return_counts=True)
            recorded = np.arange(num_clients) % len(first)
            self._recorded = first[recorded], count[recorded]

    def durations(self, visit: int) -> Durations:
        if self._recorded is None:
            generator = numpy_generator(self._seed, Stream.DURATION, 3, visit)
            picked = generator.integers(len(self._rows), size=self._num_clients)
        else:
            first, count = self._recorded
            picked = first + visit % count
        return Durations(*self._rows[picked].T)


COLUMNS = ("download", "train", "upload")
CLIENT = "client"
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}


def _read_trace(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Durations [rows, 3] and the number of each row's client, or None where none are named."""
    try:
        if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
            raise ConfigError("delay_trace", path, "is no file")
        with Path(path).open(newline="", encoding="utf-8-sig") as stream:
            first = stream.readline()
            stream.seek(0)
            separator = max(SEPARATORS, key=first.count)
            reader = csv.reader(stream, delimiter=separator)
            header = _header(path, next(reader, []))
            rows, owners = [], []
            for fields in reader:
                if not any(field.strip() for field in fields):
                    continue
                row = dict(zip(header, fields, strict=False))
                if len(fields) != len(header):
                    raise ConfigError(
                        "delay_trace",
                        path,
                        f"line {reader.line_num}: has {len(fields)} fields, the header has "
                        f"{len(header)}, with a {SEPARATORS[separator]} between them",
                    )
                try:
                    values = [float(row[name]) for name in COLUMNS]
                except ValueError:
                    values = [math.nan]
                if not all(math.isfinite(v) and v >= 0 for v in values) or values[1] <= 0:
                    raise ConfigError(
                        "delay_trace",
                        path,
                        f"line {reader.line_num}: durations must be finite "
                        "numbers, download and upload >= 0, train > 0",
                    )
                rows.append(values)
                if CLIENT in header:
                    owners.append(_owner(path, row[CLIENT], reader.line_num))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        message = one_line(error)
        raise ConfigError(
            "delay_trace", path, f"cannot be read as CSV in UTF-8 ({message})"
        ) from None
    if not rows:
        raise ConfigError("delay_trace", path, "no rows; at least one is needed")
    if not owners:
        return np.asarray(rows), None
    numbers = {owner: number for number, owner in enumerate(names.ordered(owners))}
    return np.asarray(rows), np.asarray([numbers[owner] for owner in owners])


def _header(path: str, fields: list[str]) -> list[str]:
    """The columns' names, cleaned. Columns of other names are not read.

    Raises:
      ConfigError: a column is missing, comes twice, or is named nearly as one that is read.
    """
    header = [field.strip().casefold() for field in fields]
    known = (*COLUMNS, CLIENT)
    allowed = "; the header must name download, train, upload and may name client"
    for given, name in zip(fields, header, strict=True):
        if name in known:
            if header.count(name) > 1:
                raise ConfigError("delay_trace", path, f"has two columns {name!r}{allowed}")
        elif any(word in name for word in known) or get_close_matches(name, known, cutoff=0.8):
            raise ConfigError(
                "delay_trace", path, f"column {given!r} looks like one that is read{allowed}"
            )
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        separators = ", ".join(SEPARATORS.values())
        raise ConfigError(
            "delay_trace", path, f"no column {missing[0]!r}{allowed}, separated by {separators}"
        )
    return header


def _owner(path: str, name: str, line: int) -> str:
    try:
        return names.clean(name)
    except ValueError as error:
        raise ConfigError("delay_trace", path, f"line {line}: the client {error}") from None


def create(config: Config) -> DelayModel:
    """The delay model that a configuration names."""
    if config.delays == "trace":
        return TraceDelays(config.delay_trace, config.num_clients, config.seed)
    phases = PUBLISHED.get(config.delays)
    if phases is None:
        phases = (
            Phase("constant", (config.delay_download,)),
            Phase(config.delays, (config.delay_mean,), spread=config.delay_spread),
            Phase("constant", (config.delay_upload,)),
        )
    return RandomDelays(phases, config.num_clients, config.seed)
