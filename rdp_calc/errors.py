"""Every error rdp-calc raises on purpose, and the one line it shows.

A text says what is wrong, the value, and what is allowed or what to change. The command line maps each class to
one exit code (``exit_code``); nothing else in the library depends on these numbers.
"""

from __future__ import annotations

_LONGEST = 8000


class RdpCalcError(Exception):
    """Base of every error raised on purpose. Its text is one printable line, whatever names and values of files, or
    words of other libraries, went into it.
    """

    exit_code = 1

    def __str__(self) -> str:
        text = super().__str__()
        return text if text.isprintable() and len(text) <= _LONGEST else _one_line(text)


class InvalidInput(RdpCalcError):
    """A number out of its domain, or an option that is missing, conflicting or unknown."""

    exit_code = 2


class MissingInput(InvalidInput):
    """An input that the question needs and that was not given; the text names the option."""


class TargetUnreachable(RdpCalcError):
    """No admissible noise or number of steps meets the target; the text names the floor."""

    exit_code = 3


class NotApplicable(RdpCalcError):
    """A theorem whose conditions this problem does not meet."""

    exit_code = 4


class GuardFailed(RdpCalcError):
    """The runtime cannot carry out what the plan certifies."""

    exit_code = 4


class VerificationFailed(RdpCalcError):
    """A claim that could not be re-derived; the text names the failing check."""

    exit_code = 5


class DataError(RdpCalcError):
    """Data, record ids or a plan file that are unreadable or do not fit the plan."""

    exit_code = 6


def _one_line(text: str) -> str:
    """White space as one blank, and what else does not print, such as a change of writing direction, as an escape."""
    words = " ".join(text.split())
    if not words.isprintable():
        words = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words)
    return words if len(words) <= _LONGEST else words[: _LONGEST - 3] + "..."
