"""Errors that are the user's to mend: one line each, that names what was given and what is allowed.

They speak Python: `field=value: reason`, other settings as `name=value`. The commands in
`experiments/` word them as flags.
"""

from typing import Any


class UserError(Exception):
    """Something that is the user's to mend. The message is one line for that user."""


class ConfigError(UserError, ValueError):
    """A value, file or folder that a user gave is not allowed.

    Attributes:
      field: the field of `Config`, or the argument, that has the value.
      value: what was given; None where it is the field itself that is wrong.
      reason: what is wrong with it, and what is allowed.
    """

    def __init__(self, field: str, value: Any, reason: str):
        super().__init__(field, value, reason)  # the arguments, so that it can be pickled
        self.field, self.value, self.reason = field, value, reason

    def __str__(self) -> str:
        given = self.field if self.value is None else f"{self.field}={self.value}"
        return f"{given}: {self.reason}"


class FileError(ConfigError):
    """A file that a user gave, or an entry of it, is not what it should be.

    Attributes:
      value: the file, and the entry.
      reason: what is wrong with it, and what is allowed.
    """

    def __init__(self, where: Any, reason: str):
        super().__init__("", where, reason)
        self.args = (where, reason)  # what makes it again when it is unpickled

    def __str__(self) -> str:
        return f"{self.value}: {self.reason}"


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The message of an error, in one line of bounded length."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= limit else words[:limit] + " ..."
