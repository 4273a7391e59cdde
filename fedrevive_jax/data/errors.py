"""Messages of libraries in the one line that a user is shown."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of an error, in one line of bounded length."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= limit else words[:limit] + " ..."
