"""The private file beside a ledger: the salt that turns row numbers into record ids nobody else can guess.

A row number has few possible values, so a plain hash of it would tell who was forgotten. Whoever holds the salt can
recover the row numbers; whoever holds the ledger alone cannot.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rdp_calc import documents
from rdp_calc.documents import pretty
from rdp_calc.errors import DataError, InvalidInput
from unlearn_runtime.folders import replacement

SECRET_SCHEMA = "rdp-calc/ledger-secret/1"

_SALT_BYTES = 32


@dataclass(frozen=True)
class Secret:
    """The salt of one ledger, 32 random bytes."""

    salt: bytes = field(repr=False)

    @classmethod
    def new(cls) -> Secret:
        return cls(secrets.token_bytes(_SALT_BYTES))

    @property
    def sha256(self) -> str:
        """What the ledger names its secret by."""
        return hashlib.sha256(self.salt).hexdigest()

    def record(self, row: int) -> bytes:
        """The id under which a training record stands in the ledger, 32 bytes."""
        return hmac.digest(self.salt, b"rdp-calc/record/1" + row.to_bytes(8, "little"), "sha256")

    def head(self, count: int, last: bytes) -> bytes:
        """The code of a ledger of ``count`` entries whose last hash is ``last``, 32 bytes."""
        return hmac.digest(self.salt, b"rdp-calc/ledger-head/1" + count.to_bytes(8, "little") + last, "sha256")

    def state(self, sha256: str) -> str:
        """The keyed fingerprint of a file by its SHA-256. Without a key it would let anyone who can make a state again
        from a guess at the data, as one without noise, test the guess.
        """
        return hmac.digest(self.salt, b"rdp-calc/ledger-state/1" + bytes.fromhex(sha256), "sha256").hex()

    def data(self, fingerprint: str) -> str:
        """What the ledger keeps of the keyed data fingerprint of a learning record."""
        return hmac.digest(self.salt, b"rdp-calc/ledger-data/1" + bytes.fromhex(fingerprint), "sha256").hex()


def secret_path(ledger: Path) -> Path:
    """Where the secret of a ledger lies: LEDGER.secret beside it, through symbolic links."""
    real = Path(os.path.realpath(ledger))
    return real.with_name(real.name + ".secret")


def read_secret(ledger: Path, expected: str, *, only_mine: bool = True) -> Secret:
    """The secret of ``ledger``, whose SHA-256 must be ``expected``.

    Raises DataError where it is missing, with ``only_mine`` readable by others, damaged, or that of another ledger.
    """
    path = secret_path(ledger)
    try:
        status = path.lstat()
    except OSError as error:
        raise DataError(
            f"the secret {path} cannot be read: {error.strerror}; put the file back that was made with the ledger."
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"the secret {path} is not a regular file; put the file itself there.")
    if only_mine and status.st_mode & 0o077:
        raise DataError(f"others may read the secret {path}; protect it: chmod 600 {path}.")
    document = documents.read_document(path)
    if documents.field(document, "schema", "text") != SECRET_SCHEMA:
        raise DataError(f"schema of {path} must be {SECRET_SCHEMA}.")
    try:
        salt = bytes.fromhex(documents.field(document, "salt", "text"))
    except ValueError:
        raise DataError(f"field salt of {path} must be hexadecimal.") from None
    secret = Secret(salt)
    if len(salt) != _SALT_BYTES or not hmac.compare_digest(secret.sha256, expected):
        raise DataError(f"{path} is not the secret of this ledger (ledger mismatch).")
    return secret


def write_secret(ledger: Path, secret: Secret) -> Path:
    """Write the secret of a new ledger, never over another file. Raises InvalidInput where one is there."""
    path = secret_path(ledger)
    content = pretty({"schema": SECRET_SCHEMA, "salt": secret.salt.hex()}).encode()
    try:
        with replacement(path, new=True) as stream:
            stream.write(content)
    except FileExistsError:
        raise InvalidInput(
            f"{path} exists, the secret of a ledger that is not here; choose a new name, never delete a secret in use."
        ) from None
    return path


@contextmanager
def run_lock(ledger: Path) -> Iterator[None]:
    """The one planning or running process of a ledger; ends with the process. Raises DataError where there is one."""
    path = secret_path(ledger)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"the secret {path} cannot be read: {error.strerror}.") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process is planning or running a release of {ledger}; wait for it. Requests may still be"
                " registered."
            ) from None
        yield
    finally:
        with suppress(OSError):
            os.close(descriptor)
