"""Keys on the command line: passphrases typed or read from a file, never an option value or an environment variable."""

from __future__ import annotations

import getpass
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from rdp_calc.errors import InvalidInput
from rdp_calc.signature import is_hex, is_public_key

if TYPE_CHECKING:
    from unlearn_runtime.keys import Passphrase, SigningKey


def read_signer(text: str) -> str:
    """The public key that --signer names: 64 hexadecimal digits, or a file that holds one."""
    if is_hex(text, 32):
        if not is_public_key(text):
            raise InvalidInput(f"--signer {text} is no Ed25519 public key.")
        return text
    from unlearn_runtime.keys import read_public_key

    return read_public_key(Path(text))


def ask_passphrase(key: Path, file: Path | None, *, new: bool = False) -> Passphrase:
    """The passphrase of ``key``: the first line of ``file``, or typed at the terminal without echo, twice for a new
    key. Raises InvalidInput where there is no terminal, and for a new one that is too weak.
    """
    from unlearn_runtime.keys import Passphrase

    if file is not None:
        passphrase = Passphrase.from_file(file)
        if new:
            passphrase.check_new()
        return passphrase
    if not sys.stdin.isatty():
        raise InvalidInput(f"the passphrase of {key} is typed at a terminal, here is none; use --passphrase-file FILE.")
    passphrase = _typed(f"Passphrase of {key}: ")
    if new:
        passphrase.check_new()
        if _typed("The same again: ") != passphrase:
            raise InvalidInput("the two passphrases are different; no key was made.")
    return passphrase


def unlock(key: Path | None, passphrase_file: Path | None) -> SigningKey | None:
    """The key that --key and --passphrase-file name, unlocked; None without --key, and in processes of torchrun other
    than the first, which sign nothing.
    """
    if key is None:
        if passphrase_file is not None:
            raise InvalidInput("--passphrase-file opens the key that --key names: give both.")
        return None
    if os.environ.get("RANK", "0") != "0":
        return None
    from unlearn_runtime.keys import load_signing_key, read_public_key

    # What is no key at all is said before anyone types.
    read_public_key(key)
    return load_signing_key(key, ask_passphrase(key, passphrase_file))


def _typed(prompt: str) -> Passphrase:
    from unlearn_runtime.keys import Passphrase

    try:
        with warnings.catch_warnings():
            # It warns, and goes on, where what is typed would be shown.
            warnings.simplefilter("error", getpass.GetPassWarning)
            return Passphrase(getpass.getpass(prompt, stream=sys.stderr))
    except (EOFError, getpass.GetPassWarning):
        raise InvalidInput("no passphrase could be typed without showing it; use --passphrase-file FILE.") from None
