"""Times as the ledger writes them: UTC, to the second."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta

from rdp_calc.errors import InvalidInput

_FORM = "%Y-%m-%dT%H:%M:%SZ"

#: About a century; longer is a typing error.
MAX_DAYS = 36_500


def now() -> str:
    """The time as this machine's clock says."""
    return datetime.now(UTC).strftime(_FORM)


def read_time(name: str, text: str, *, end_of_day: bool = False) -> str:
    """An ISO 8601 date, or date and time, in UTC unless it names an offset. A date alone is the first second of its
    day, or with ``end_of_day`` the last. Raises InvalidInput.
    """
    try:
        day = read_date(text)
        if day is not None:
            found = datetime.combine(day, time(23, 59, 59) if end_of_day else time(), tzinfo=UTC)
        else:
            found = datetime.fromisoformat(text.strip())
            found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
        if found.year < 1000:
            raise ValueError
    except (ValueError, OverflowError):
        raise InvalidInput(
            f"{name} must be a date or time such as 2025-06-30 or 2025-06-30T12:00:00Z, got {text[:40]!r}."
        ) from None
    return found.strftime(_FORM)


def read_date(text: str) -> date | None:
    """A date without a time of day, in any form of ISO 8601; None for another text."""
    try:
        return date.fromisoformat(text.strip())
    except ValueError:
        return None


def after_days(start: str, days: int, *, end_of_day: bool = False) -> str:
    """The time some days after ``start``, or with ``end_of_day`` the last second of that day.

    Raises InvalidInput for days outside 0..36500.
    """
    if not 0 <= days <= MAX_DAYS:
        raise InvalidInput(f"--due-days must be 0..{MAX_DAYS}, got {days}.")
    try:
        found = datetime.strptime(start, _FORM).replace(tzinfo=UTC) + timedelta(days=days)
    except OverflowError:
        raise InvalidInput(f"--due-days {days} after {start} is beyond any calendar.") from None
    return (found.replace(hour=23, minute=59, second=59) if end_of_day else found).strftime(_FORM)
