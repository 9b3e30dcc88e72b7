"""Every error rdp-calc raises on purpose, and the one line it shows.

A text says what is wrong, the value, and what is allowed or what to change. The command line maps each class to
one exit code (``exit_code``); nothing else in the library depends on these numbers.
"""

from __future__ import annotations


class RdpCalcError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


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
