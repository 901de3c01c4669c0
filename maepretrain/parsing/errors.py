"""A mistake of the user, in one line."""


class UserError(Exception):
    """A mistake in what was asked, already put into one line."""


def one_line(message: str) -> str:
    """The message in one line, without the traceback that a loader process puts before it."""
    if message.startswith("Caught ") and "Original Traceback" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(message.split())
