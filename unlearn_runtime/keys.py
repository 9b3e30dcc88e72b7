"""Files of keys that sign certificates: the private key under a passphrase, and its public half.

A private key is a JSON document of schema ``rdp-calc/key/1``: the public key and its fingerprint in clear, the 32 bytes
of the private key sealed with AES-256-GCM under scrypt(passphrase), everything else in the file being associated data.
It is an envelope of its own, not PKCS #8: ``cryptography`` lets nobody choose the work factor there (its
``encryption_builder`` takes OpenSSH and PKCS #12 only; PKCS #8 gets PBKDF2 with OpenSSL's few thousand rounds), and
PKCS #8 would neither bind the public key nor let it be read without the passphrase. scrypt with n = 2^17, r = 8, p = 1
needs 128 MiB and about a third of a second for every guess. What a file asks for is bounded when it is read.

The digest in clear tells a damaged file from a wrong passphrase. It tells a guesser nothing: it covers sealed bytes.

Python cannot wipe memory: while a process holds an unlocked key, whoever reads its memory has the key.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rdp_calc.documents import canonical, digest, field, pretty, read_document
from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.signature import ALGORITHM, fingerprint, is_hex, is_public_key, sign_document
from unlearn_runtime.folders import check_parent, remove_stale, replacement, terminable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY_SCHEMA = "rdp-calc/key/1"
PUBLIC_KEY_SCHEMA = "rdp-calc/public-key/1"

#: The rule for new passphrases.
LEAST_CHARACTERS = 12
LEAST_DIFFERENT = 5
_MOST_BYTES = 4096

#: Seconds that a passphrase's pipe may have no writer, and that its writer may take.
_FOR_A_WRITER = 5
_FOR_A_LINE = 120

#: What new keys cost to unlock, and the costs a file may ask for: 64 MiB to 1 GiB of memory.
COST = 2**17
COSTS = tuple(2**power for power in range(16, 21))
_BLOCK, _PARALLEL = 8, 1


class Passphrase:
    """What unlocks a private key; it shows itself in no text, traceback or pickle.

    Compared as Unicode NFC, so that the same letters typed on another machine are the same passphrase.
    """

    __slots__ = ("_octets",)

    # Nowhere below is a secret bound to a name while an error can be raised: tools that show the variables of a
    # traceback (and pytest) would print it.
    def __init__(self, text: str) -> None:
        self._octets = unicodedata.normalize("NFC", text).encode("utf-8", errors="surrogatepass")
        del text
        allowed = self._is_text()
        if not allowed or not self._octets:
            raise InvalidInput("a passphrase must be UTF-8 of at least one character, without control characters.")
        if len(self._octets) > _MOST_BYTES:
            raise InvalidInput(f"a passphrase may have at most {_MOST_BYTES} bytes.")

    @classmethod
    def from_file(cls, path: Path) -> Passphrase:
        """The first line of a file, without its line end; blanks count. Raises InvalidInput where there is none.

        A pipe will do, as of ``<(pass show office)``; it is not waited for without end.
        """
        try:
            return cls(_line(_first_line(path)))
        except OSError as error:
            raise InvalidInput(f"cannot read the passphrase file {path}: {error.strerror}.") from None

    def check_new(self) -> None:
        """Raise InvalidInput unless it may protect a new key: 12 characters or more, 5 of them different."""
        length, different = self._counts()
        if length < LEAST_CHARACTERS or different < LEAST_DIFFERENT:
            raise InvalidInput(
                f"a new passphrase must have at least {LEAST_CHARACTERS} characters, {LEAST_DIFFERENT} of them"
                " different; five or more words drawn at random are a good one."
            )

    def derive(self, salt: bytes, cost: int) -> bytes:
        """32 bytes by scrypt with n = ``cost``, r = 8, p = 1. Raises GuardFailed where memory is short."""
        from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

        try:
            return bytes(Scrypt(salt=salt, length=32, n=cost, r=_BLOCK, p=_PARALLEL).derive(self._octets))
        except MemoryError:
            raise GuardFailed(f"a key needs {128 * _BLOCK * cost >> 20} MiB of memory to be unlocked.") from None

    def _is_text(self) -> bool:
        text = self._octets.decode("utf-8", errors="surrogatepass")
        return not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)

    def _counts(self) -> tuple[int, int]:
        text = self._octets.decode()
        return len(text), len(set(text))

    def __repr__(self) -> str:
        return "Passphrase(...)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Passphrase) and secrets.compare_digest(self._octets, other._octets)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> NoReturn:
        raise TypeError("a passphrase is not pickled")


class SigningKey:
    """An unlocked private key, which shows no more of itself than ``public_key`` (64 hexadecimal digits)."""

    __slots__ = ("_private", "public_key")

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public_key: str = private.public_key().public_bytes_raw().hex()

    def sign_certificate(self, document: dict[str, Any]) -> dict[str, Any]:
        """The certificate with this key's signature; see ``rdp_calc.signature.sign_document``."""
        return sign_document(document, self._private)

    def __repr__(self) -> str:
        return f"SigningKey(public_key={self.public_key!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private key is not pickled")


def _first_line(path: Path) -> bytes:
    """The first line of a file or pipe, or as much of it as tells that it is too long. Raises OSError, also for a pipe
    that nobody opens for writing within ``_FOR_A_WRITER`` seconds, or whose writer is silent for ``_FOR_A_LINE``.
    """
    # Nonblocking: opening or reading a pipe that nobody writes to would never end.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    held, began, written_to = bytearray(), time.monotonic(), False
    try:
        is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
        while len(held) < _MOST_BYTES + 3:
            try:
                octet = os.read(descriptor, 1)
            except BlockingIOError:
                # Someone has it open for writing: whoever asks a person for another passphrase first takes a while.
                written_to, limit = True, _FOR_A_LINE
            else:
                held += octet
                if octet == b"\n" or (not octet and (held or written_to or not is_pipe)):
                    break
                if octet:
                    continue
                limit = _FOR_A_WRITER
            if time.monotonic() - began > limit:
                raise TimeoutError(errno.ETIMEDOUT, f"no line came out of it in {limit} s")
            time.sleep(0.02)
        return bytes(held)
    except BaseException:
        held.clear()
        raise
    finally:
        os.close(descriptor)


def _line(octets: bytes) -> str:
    return octets.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", errors="surrogateescape")


def public_path(key: Path) -> Path:
    """Where the public half of a new key lies: beside it, with ``.pub`` added to the name."""
    return key.with_name(key.name + ".pub")


def new_key(path: Path, passphrase: Passphrase) -> SigningKey:
    """Make a key: ``path`` (mode 0600), the private key under ``passphrase``, and ``path``.pub (0644), its public half.

    Both files are written or none; existing ones are refused. A process killed between the two leaves the private key
    alone, whose public half can be derived again (``public_document``), never the public one alone. Raises
    InvalidInput for a passphrase that is too weak, files that exist and folders that cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    passphrase.check_new()
    public = public_path(path)
    for target in (path, public):
        remove_stale(target)
    for target in (path, public):
        if target.is_symlink() or target.exists():
            raise InvalidInput(f"{target} exists; choose a new name, a key is never overwritten.")
        check_parent(target)
    private = Ed25519PrivateKey.generate()
    key = SigningKey(private)
    sealed = _seal(private, key.public_key, passphrase)
    public_content = pretty(public_document(key.public_key)).encode()
    with terminable():
        try:
            with replacement(public, mode=0o644, new=True) as outer:
                outer.write(public_content)
                outer.flush()
                os.fsync(outer.fileno())
                with replacement(path, mode=0o600, new=True) as inner:
                    inner.write(pretty(sealed).encode())
        except BaseException as error:
            _withdraw(public, public_content)
            _withdraw(path, pretty(sealed).encode())
            if isinstance(error, FileExistsError):
                raise InvalidInput(
                    f"{path} or its .pub exists; choose a new name, a key is never overwritten."
                ) from None
            raise
    return key


def public_document(public_key: str) -> dict[str, Any]:
    """What a ``.pub`` file holds."""
    return {
        "schema": PUBLIC_KEY_SCHEMA,
        "algorithm": ALGORITHM,
        "public_key": public_key,
        "fingerprint": fingerprint(public_key),
    }


def load_signing_key(path: Path, passphrase: Passphrase) -> SigningKey:
    """The private key in a file of schema ``rdp-calc/key/1``; takes a third of a second and 128 MiB.

    Raises InvalidInput for a wrong passphrase, DataError for a file that is no such key, was changed, or asks for more
    than 1 GiB.
    """
    document = _read_key(path)
    private = _open(document, passphrase)
    if private is None:
        raise InvalidInput(f"the passphrase does not open {path}.")
    key = SigningKey(private)
    if key.public_key != document["public_key"]:
        raise DataError(f"the private key in {path} is not the one of its public_key.")
    return key


def read_public_key(path: Path) -> str:
    """The public key, 64 hexadecimal digits, in a ``.pub`` file or in the clear part of a private key.

    Raises DataError for a file that is neither, or was changed.
    """
    document = read_document(path, spelled=True)
    if document.get("schema") == KEY_SCHEMA:
        return str(_read_key(path)["public_key"])
    public_key = document.get("public_key")
    if not is_public_key(public_key):
        raise DataError(f"{path} holds no public key: field public_key must be one in 64 lowercase hexadecimal digits.")
    assert isinstance(public_key, str)
    if document != public_document(public_key):
        raise DataError(f"{path} is not a public key as rdp-calc writes it, or was changed.")
    return public_key


def _read_key(path: Path) -> dict[str, Any]:
    """A private key file, everything checked that can be checked without the passphrase."""
    document = read_document(path, spelled=True)
    if document.get("schema") != KEY_SCHEMA:
        raise DataError(f"{path} is no private key: schema must be {KEY_SCHEMA}, got {document.get('schema')!r}.")
    if document.get("digest") != digest(document):
        raise DataError(f"{path} was changed or is damaged: its digest does not fit; restore it from a copy.")
    cost = field(document, "kdf.n", "integer")
    if cost not in COSTS:
        raise DataError(
            f"{path} asks for scrypt with n = {cost}; allowed are powers of two in {COSTS[0]}..{COSTS[-1]}."
        )
    salt, nonce, sealed = (field(document, name, "text") for name in ("kdf.salt", "cipher.nonce", "cipher.sealed"))
    public_key = field(document, "public_key", "text")
    if not (is_hex(salt, 32) and is_hex(nonce, 12) and is_hex(sealed, 48) and is_public_key(public_key)):
        raise DataError(f"{path} is no private key: a field has the wrong form.")
    if document != _envelope(public_key, cost=cost, salt=salt, nonce=nonce, sealed=sealed):
        raise DataError(f"{path} is no private key as rdp-calc writes it: a field is missing, unknown or different.")
    return document


def _envelope(public_key: str, *, cost: int, salt: str, nonce: str, sealed: str) -> dict[str, Any]:
    document: dict[str, Any] = {
        **public_document(public_key),
        "schema": KEY_SCHEMA,
        "kdf": {"name": "scrypt", "n": cost, "r": _BLOCK, "p": _PARALLEL, "salt": salt},
        "cipher": {"name": "AES-256-GCM", "nonce": nonce, "sealed": sealed},
    }
    return {**document, "digest": digest(document)}


def _associated(document: dict[str, Any]) -> bytes:
    """What the cipher binds beside the private key: everything in the file but the sealed bytes and the digest."""
    cipher = {**document["cipher"], "sealed": ""}
    return canonical({**document, "cipher": cipher, "digest": ""})


def _seal(private: Ed25519PrivateKey, public_key: str, passphrase: Passphrase) -> dict[str, Any]:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    salt, nonce = secrets.token_bytes(32), secrets.token_bytes(12)
    parts: dict[str, Any] = {"cost": COST, "salt": salt.hex(), "nonce": nonce.hex()}
    associated = _associated(_envelope(public_key, sealed="", **parts))
    sealed = AESGCM(passphrase.derive(salt, COST)).encrypt(nonce, private.private_bytes_raw(), associated)
    return _envelope(public_key, sealed=sealed.hex(), **parts)


def _open(document: dict[str, Any], passphrase: Passphrase) -> Ed25519PrivateKey | None:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce, sealed = (bytes.fromhex(document["cipher"][name]) for name in ("nonce", "sealed"))
    cipher = AESGCM(passphrase.derive(bytes.fromhex(document["kdf"]["salt"]), document["kdf"]["n"]))
    try:
        return Ed25519PrivateKey.from_private_bytes(cipher.decrypt(nonce, sealed, _associated(document)))
    except InvalidTag:
        return None


def _withdraw(path: Path, content: bytes) -> None:
    """Remove a file that this process wrote, and no other."""
    with suppress(OSError):
        if path.read_bytes() == content:
            path.unlink()
