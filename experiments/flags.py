"""absl flags, one for each field of the configuration, and how user errors are shown."""

import dataclasses
import logging as standard_logging
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from fedrevive_jax import processes
from fedrevive_jax.config import Config, UserError
from fedrevive_jax.presets import SCALES


def define() -> None:
    """Defines a flag for every field of `Config`; unset means the preset's value."""
    for field in dataclasses.fields(Config):
        limits = field.metadata
        words = limits["help"]
        if "choices" in limits:
            words += f" ({', '.join(limits['choices'])})"
        # Texts throughout: the configuration converts and checks, so that every wrong value gets
        # the same kind of message.
        flags.DEFINE_string(field.name, None, f"{words}. Default: the preset's.")
    flags.DEFINE_string(
        "preset_scale", None, f"size of the preset ({', '.join(SCALES)}). Default: {SCALES[0]}."
    )


def given_values() -> dict[str, str | None]:
    """What the command line says of every field and of the preset's scale; None where nothing."""
    names = [*(field.name for field in dataclasses.fields(Config)), "preset_scale"]
    return {name: flags.FLAGS[name].value for name in names}


def run(main: Callable[[], int | None]) -> None:
    """Runs a program; an error that is the user's to mend becomes one line and exit status 1."""

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(list(argv), known_only=False)
        except flags.Error as error:
            fail(str(error).splitlines()[0])
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
            return main()
        except UserError as error:
            return fail(str(error))
        except Exception as error:
            if processes.is_lost_contact(error):
                return fail(f"lost contact with the other processes ({str(error).splitlines()[0]})")
            if processes.joined():
                traceback.print_exc()
                processes.leave(1)
            raise

    app.define_help_flags()
    app.run(guarded, flags_parser=parse)


def _show_warnings() -> None:
    """The package's own warnings are for the user: one line each on standard error."""
    handler = standard_logging.StreamHandler()
    handler.setFormatter(standard_logging.Formatter("warning: %(message)s"))
    logger = standard_logging.getLogger("fedrevive_jax")
    logger.setLevel(standard_logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False


def fail(message: str) -> None:
    """One line on standard error, exit status 1."""
    print(f"error: {message}", file=sys.stderr)
    processes.leave(1)
    sys.exit(1)
