"""absl flags, one for each field of the configuration, and how user errors are shown."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import logging as standard_logging
import os
import platform
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

from fedrevive_jax.compute import processes
from fedrevive_jax.config import Config, whole_path
from fedrevive_jax.errors import ConfigError, FileError, UserError
from fedrevive_jax.presets import OF_PRESETS, REVIVALS, SCALES

COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache_dir",
    None,
    "folder that keeps compiled programs for the next start; off: none. Default: "
    "JAX_COMPILATION_CACHE_DIR, or fedrevive_jax in the user's cache folder.",
)


# How JAX's errors tell that one of its environment variables cannot be read.
WRONG_VARIABLE = ("for JAX flag jax_", "for environment 'JAX_")
# How JAX's errors tell that a device's memory is full.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")


def define(names: Sequence[str] | None = None) -> None:
    """Defines a flag for every field of `Config`, or for those named; unset means the preset's
    value. Without names those of the preset come along."""
    fields = [f for f in dataclasses.fields(Config) if names is None or f.name in names]
    for field in fields:
        limits = field.metadata
        words = limits["help"]
        if "choices" in limits:
            words += f" ({', '.join(limits['choices'])})"
        # Texts throughout: the configuration converts and checks, so that every wrong value gets
        # the same kind of message.
        default = "empty" if field.default == "" else field.default
        flags.DEFINE_string(field.name, None, f"{words}. Default: the preset's, else {default}.")
    for field in fields:
        flags.FLAGS[field.name].help = in_flags(flags.FLAGS[field.name].help)
    if names is not None:
        return
    flags.DEFINE_alias("conv", "convolution")
    flags.DEFINE_string(
        "preset_scale", None, f"size of the preset ({', '.join(SCALES)}). Default: {SCALES[0]}."
    )
    flags.DEFINE_string(
        "preset_revival",
        None,
        f"FedRevive's distillation in the preset ({', '.join(REVIVALS)}): the form that was found "
        f"best on a data set that the paper does not have, or its own. Default: {REVIVALS[0]}.",
    )


def given_values() -> dict[str, str | None]:
    """What the command line says of every field and of the preset; None where nothing."""
    names = [*(field.name for field in dataclasses.fields(Config)), *OF_PRESETS]
    return {name: flags.FLAGS[name].value for name in names if name in flags.FLAGS}


def worded(error: UserError) -> str:
    """An error of the library in the words of the command line."""
    if isinstance(error, FileError):
        return f"{error.value}: {in_flags(error.reason)}"
    if isinstance(error, ConfigError):
        given = error.field if error.value is None else f"{error.field}={error.value}"
        dashes = "--" if error.field in flags.FLAGS else ""
        return f"{dashes}{given}: {in_flags(error.reason)}"
    return in_flags(str(error))


def in_flags(text: str) -> str:
    """The library's `name`, name=value and overwrite=True as flags, where there is such a flag."""

    def flag(found: re.Match) -> str:
        return f"--{found['name']}" if found["name"] in flags.FLAGS else found[0]

    text = text.replace("overwrite=True", "--overwrite")
    text = re.sub(r"`(?P<name>\w+)`", flag, text)
    return re.sub(r"(?<![\w.=/`-])(?P<name>\w+)(?==)", flag, text)


def define_grace(seconds: float = 6.0) -> flags.FlagHolder[float]:
    """Defines the time that programs have which save at a signal."""
    return flags.DEFINE_float(
        "grace",
        seconds,
        "seconds after SIGTERM or SIGINT in which a run saves; then it ends anyway",
    )


def address(name: str, text: str | None) -> tuple[str, int]:
    """HOST:PORT of a flag.

    Raises:
      ConfigError: it is none.
    """
    host, _, port = (text or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(name, text or "", "must be HOST:PORT, as in fl.example.org:8443")
    return host, int(port)


def need_flower() -> None:
    """Tells in one line what a live federation wants beside the package.

    Raises:
      UserError: it is not installed.
    """
    missing = [name for name in ("flwr", "httpx", "uvicorn") if not find_spec(name)]
    if missing:
        raise UserError(f"needs {missing[0]}: python -m pip install -e '.[live]'")


def run(main: Callable[[], int | None]) -> None:
    """Runs a program; an error that is the user's to mend becomes one line and exit status 1."""

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(list(argv), known_only=False)
        except flags.Error as error:
            fail(str(error).splitlines()[0])
        except OSError as error:  # of the output, to which the help goes
            _end(error)
        except SystemExit:
            sys.exit(0)  # absl ends with 1 after printing the help that was asked for
        if len(rest) > 1:
            fail(f"{rest[1]}: unexpected argument; flags start with --")
        return rest

    def guarded(argv):
        del argv
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.ERROR)  # libraries log every step they take
        _show_warnings()
        try:
            keep_programs()
            status = main()
            sys.stdout.flush()  # here, where an error is told
            return status
        except UserError as error:
            return fail(worded(error))
        except OSError as error:
            return _end(error)
        except Exception as error:
            if processes.is_lost_contact(error):
                return fail(f"lost contact with the other processes ({str(error).splitlines()[0]})")
            if any(words in str(error) for words in WRONG_VARIABLE):
                return fail(str(error).splitlines()[0])
            if any(words in str(error) for words in OUT_OF_MEMORY):
                told = str(error).splitlines()[0].rstrip(".")
                return fail(
                    f"{told}; smaller --client_batch, --teacher_batch, --synthesis_batch, "
                    "--num_teachers or --pool_size need less memory, and --version_memory=host "
                    "and --cache_memory=host move what waits"
                )
            if processes.joined():
                traceback.print_exc()
                processes.leave(1)
            raise

    _make_streams_whole()
    app.define_help_flags()
    app.run(guarded, flags_parser=parse)


def _make_streams_whole() -> None:
    """Characters that the terminal's locale has not are written escaped; what is closed takes all.

    Where standard error is closed, Python would print errors among the output.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _end(error: OSError) -> NoReturn:
    """Ends the program after an error of the system that nobody has put into words."""
    with contextlib.suppress(OSError, ValueError):
        # What waits for the output goes nowhere; Python would try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):  # who read the output has gone, as `head` does
        processes.leave(128 + signal.SIGPIPE)
        sys.exit(128 + signal.SIGPIPE)
    fail(f"{error.filename or 'the output or a connection'}: {error.strerror or error}")


class _Worded(standard_logging.Formatter):
    """Shows the library's messages in the words of the command line."""

    def format(self, record: standard_logging.LogRecord) -> str:
        return in_flags(super().format(record))


def _show_warnings() -> None:
    """The package's own warnings are for the user: one line each on standard error."""
    handler = standard_logging.StreamHandler()
    handler.setFormatter(_Worded("warning: %(message)s"))
    logger = standard_logging.getLogger("fedrevive_jax")
    logger.setLevel(standard_logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False


def keep_programs() -> None:
    """Tells JAX, before it is imported, where to keep compiled programs.

    Raises:
      ConfigError: the folder that was asked for cannot be written.
    """
    given = COMPILATION_CACHE.value
    if given == "off":
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return
    if given is None and "JAX_COMPILATION_CACHE_DIR" in os.environ:
        _check_cache(os.environ["JAX_COMPILATION_CACHE_DIR"])
        return
    if given == "":
        raise ConfigError("compilation_cache_dir", "", "must be a folder, or off")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        folder = whole_path("compilation_cache_dir", given or str(caches / "fedrevive_jax"))
    except ConfigError:
        if given:
            raise
        return
    folder = Path(folder).absolute()
    # A program is for one kind of processor; hosts of several kinds may share a home.
    folder = folder / hashlib.sha256(processor().encode()).hexdigest()[:16]
    try:
        _make_writable(folder)
    except OSError as error:
        if given:
            raise ConfigError(
                "compilation_cache_dir", given, f"cannot be written ({error.strerror})"
            ) from None
        return  # nobody asked for it, and a run does without
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def _check_cache(folder: str) -> None:
    """Without a folder that can be written JAX would complain of every program."""
    if not folder or "://" in folder:
        return
    try:
        _make_writable(Path(folder))
    except OSError as error:
        standard_logging.getLogger("fedrevive_jax").warning(
            "JAX_COMPILATION_CACHE_DIR=%s: cannot be written (%s); no program is kept",
            folder,
            error.strerror,
        )
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"


def _make_writable(folder: Path) -> None:
    """Makes a folder, unless it is there and can be written.

    Raises:
      OSError: it cannot be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def processor() -> str:
    """What tells kinds of processors apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    told = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(told)])


def fail(message: str) -> NoReturn:
    """One line on standard error, exit status 1."""
    print(f"error: {message}", file=sys.stderr)
    processes.leave(1)
    sys.exit(1)
