"""Keys and signatures on the command line: files, refusals, and secrets that show nowhere."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import termios
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from rdp_calc.documents import digest, pretty, read_document
from rdp_calc.errors import DataError, InvalidInput, RdpCalcError
from unlearn_runtime import keys as key_files
from unlearn_runtime.keys import Passphrase, load_signing_key, new_key, read_public_key

Call = Callable[..., Any]

PASSPHRASE = "gr\u00fcner Tee um f\u00fcnf"
DATA = ["--data", "builtin:breast-cancer"]


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys ``office`` and ``other``, and the files of their passphrases; made at the real cost."""
    folder = tmp_path_factory.mktemp("office")
    (folder / "words").write_text(PASSPHRASE + "\r\nsecond line\n")
    (folder / "wrong").write_text(PASSPHRASE + "!\n")
    (folder / "other-words").write_text("another passphrase")
    with contextlib.chdir(folder):
        assert main(["keys", "new", "office", "--passphrase-file", "words", "-q"]) == 0
        assert main(["keys", "new", "other", "--passphrase-file", "other-words", "-q"]) == 0
    return folder


@pytest.fixture
def certificate(finished: Path, empty_folder: Path) -> Path:
    """A copy of an unsigned certificate."""
    copy = empty_folder / "certificate.json"
    copy.write_bytes((finished / "run" / "certificate.json").read_bytes())
    return copy


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys whose passphrase costs little to try."""
    monkeypatch.setattr(key_files, "COST", 2**4)
    monkeypatch.setattr(key_files, "COSTS", (2**4, *key_files.COSTS))


def words(text: str | bytes) -> str:
    path = Path("passphrase.txt")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# new and show


def test_a_new_key(office: Path, rdp: Call) -> None:
    private, public = office / "office", office / "office.pub"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE(public.stat().st_mode) == 0o644
    assert not list(office.glob(".*"))
    shown = rdp(["keys", "show", str(public), "--json"])
    assert (shown.code, shown.err) == (0, "")
    assert shown.json["schema"] == "rdp-calc/public-key/1"
    # What --json prints is the file: a lost one is made again from the private key, without the passphrase.
    assert rdp(["keys", "show", str(private), "--json"]).out == public.read_text() == shown.out
    assert rdp(["keys", "show", str(private), "-q"]).out == shown.json["public_key"] + "\n"
    text = rdp(["keys", "show", str(public)]).out
    assert shown.json["public_key"] in text
    assert shown.json["fingerprint"] in text
    kdf = read_document(private)["kdf"]
    assert (kdf["name"], kdf["n"], kdf["r"], kdf["p"]) == ("scrypt", 2**17, 8, 1)


@pytest.mark.usefixtures("cheap")
@pytest.mark.slow
def test_a_pipe_that_delivers(rdp: Call) -> None:
    os.mkfifo("pipe")
    writer = subprocess.Popen(["sh", "-c", 'sleep 1; printf "%s\\nmore" "$0" > pipe; sleep 30', PASSPHRASE])
    try:
        assert rdp(["keys", "new", "office", "--passphrase-file", "pipe"]).code == 0
    finally:
        writer.kill()
        writer.wait()
    load_signing_key(Path("office"), Passphrase(PASSPHRASE))
    # As of a shell's <(command), which may take longer than a pipe may stand without a writer.
    reading, writing = os.pipe()
    with subprocess.Popen(["sh", "-c", 'sleep 6; printf %s "$0"', PASSPHRASE], stdout=writing):
        os.close(writing)
        file = f"/dev/fd/{reading}"
        assert Passphrase.from_file(Path(file)) == Passphrase(PASSPHRASE)
    os.close(reading)


@pytest.mark.slow
def test_a_pipe_that_nobody_writes_to(rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo("pipe")
    began = time.monotonic()
    found = rdp(["keys", "new", "office", "--passphrase-file", "pipe"])
    assert (found.code, found.out, found.err.count("\n")) == (2, "", 1)
    assert "no line came out of it in 5 s" in found.err
    assert time.monotonic() - began < 10
    # One that is open for writing and silent is waited for longer.
    monkeypatch.setattr(key_files, "_FOR_A_LINE", 1)
    silent = os.open("pipe", os.O_RDWR)
    found = rdp(["keys", "new", "office", "--passphrase-file", "pipe"])
    os.close(silent)
    assert found.code == 2
    assert "no line came out of it in 1 s" in found.err
    # A command that ended without a word.
    reading, writing = os.pipe()
    os.close(writing)
    found = rdp(["keys", "new", "office", "--passphrase-file", f"/dev/fd/{reading}"])
    os.close(reading)
    assert (found.code, os.listdir()) == (2, ["pipe"])


@pytest.mark.usefixtures("cheap")
def test_two_keys_share_nothing(rdp: Call) -> None:
    file = words(PASSPHRASE)
    for name in ("one", "two"):
        assert rdp(["keys", "new", name, "--passphrase-file", file]).code == 0
    one, two = (read_document(Path(name)) for name in ("one", "two"))
    for path in (("public_key",), ("kdf", "salt"), ("cipher", "nonce"), ("cipher", "sealed")):
        values = []
        for document in (one, two):
            for key in path:
                document = document[key]  # noqa: PLW2901
            values.append(document)
        assert values[0] != values[1]


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("there", ["office", "office.pub"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_existing_files_are_refused(there: str, kind: str, rdp: Call) -> None:
    path = Path(there)
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    before = sorted(os.listdir())
    found = rdp(["keys", "new", "office", "--passphrase-file", words(PASSPHRASE)])
    assert found.code == 2
    assert f"{there} exists" in found.err
    assert sorted(os.listdir()) == sorted([*before, "passphrase.txt"])
    assert kind != "file" or path.read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "at least one character"),
        ("\nlong enough but on the second line", "at least one character"),
        ("eleven char", "at least 12 characters"),
        ("abcdabcdabcdabcd", "5 of them different"),
        (" " * 40, "5 of them different"),
        ("tab\tis a control character", "control characters"),
        (b"\xff\xfe not UTF-8 at all", "UTF-8"),
        ("long " * 1000, "at most 4096"),
    ],
)
def test_passphrases_that_are_refused(text: str | bytes, reason: str, rdp: Call) -> None:
    found = rdp(["keys", "new", "office", "--passphrase-file", words(text)])
    assert (found.code, found.out) == (2, "")
    assert reason in found.err
    assert os.listdir() == ["passphrase.txt"]


@pytest.mark.usefixtures("cheap")
def test_the_same_letters_are_the_same_passphrase(rdp: Call) -> None:
    """A key made where accents are characters of their own opens where they are combined."""
    assert rdp(["keys", "new", "office", "--passphrase-file", words("gru\u0308ner Tee um fu\u0308nf\n")]).code == 0
    load_signing_key(Path("office"), Passphrase(PASSPHRASE))
    for other in (PASSPHRASE + " ", " " + PASSPHRASE, PASSPHRASE.lower(), "another passphrase"):
        with pytest.raises(InvalidInput, match="does not open"):
            load_signing_key(Path("office"), Passphrase(other))


def test_a_passphrase_is_no_option_value(rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rdp(["keys", "new", "office", "--passphrase", PASSPHRASE]).code == 2
    monkeypatch.setenv("RDP_CALC_PASSPHRASE", PASSPHRASE)
    for command in ("new", "sign"):
        assert "env var" not in rdp(["keys", command, "--help"]).out
    found = rdp(["keys", "new", "office", "--passphrase-file", "missing"])
    assert (found.code, found.err) == (
        2,
        "error: cannot read the passphrase file missing: No such file or directory.\n",
    )
    assert os.listdir() == []


#: The program, in a process of its own.
PROGRAM = [sys.executable, "-c", "from cli.main import entry_point; entry_point()"]


def test_without_a_terminal_nobody_is_asked() -> None:
    done = subprocess.run(
        [*PROGRAM, "keys", "new", "office"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--passphrase-file" in done.stderr
    assert os.listdir() == []


class Terminal:
    """A program at a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.screen = b""
        self._master, slave = os.openpty()

        def take() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self._program = subprocess.Popen(
            [*PROGRAM, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=take,  # noqa: PLW1509
        )
        os.close(slave)

    def read_until(self, text: bytes) -> None:
        while text not in self.screen:
            part = os.read(self._master, 1000)
            assert part, self.screen
            self.screen += part

    def type(self, prompt: bytes, text: str) -> None:
        self.read_until(prompt)
        os.write(self._master, text.encode() + b"\n")

    def end(self) -> int:
        with contextlib.suppress(OSError):
            while part := os.read(self._master, 1000):
                self.screen += part
        os.close(self._master)
        return self._program.wait()


def test_typed_passphrases_do_not_show(office: Path, rdp: Call) -> None:
    terminal = Terminal("keys", "new", "mine")
    terminal.type(b"Passphrase of mine: ", PASSPHRASE)
    terminal.type(b"The same again: ", PASSPHRASE)
    assert terminal.end() == 0
    assert PASSPHRASE.encode() not in terminal.screen
    assert b"Tee" not in terminal.screen
    load_signing_key(Path("mine"), Passphrase(PASSPHRASE))
    terminal = Terminal("keys", "new", "second")
    terminal.type(b"Passphrase of second: ", PASSPHRASE)
    terminal.type(b"The same again: ", PASSPHRASE + "x")
    assert terminal.end() == 2
    assert b"the two passphrases are different" in terminal.screen
    # The rule is applied before anyone types a second time.
    terminal = Terminal("keys", "new", "second")
    terminal.type(b"Passphrase of second: ", "short")
    assert terminal.end() == 2
    assert b"short" not in terminal.screen
    assert sorted(os.listdir()) == ["mine", "mine.pub"]


# Both files or none

KILLER = """
import os, signal, sys
from pathlib import Path
from unlearn_runtime import keys
link, calls = os.link, []
def killed(*arguments, **options):
    calls.append(1)
    if len(calls) == {call} and {before}:
        os.kill(os.getpid(), signal.SIGKILL)
    link(*arguments, **options)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
os.link = killed
keys.COST = 2 ** 4
keys.new_key(Path("office"), keys.Passphrase("another passphrase"))
"""


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(("call", "before"), [(1, True), (1, False), (2, True), (2, False)])
def test_killed_while_a_key_is_made(call: int, before: bool, rdp: Call) -> None:
    """The public half is never alone; a private key alone is whole, and its public half can be had from it."""
    done = subprocess.run([sys.executable, "-c", KILLER.format(call=call, before=before)], check=False)
    assert done.returncode == -signal.SIGKILL
    private, public = Path("office"), Path("office.pub")
    assert private.exists() == ((call, before) != (1, True))
    assert public.exists() == ((call, before) == (2, False))
    if not private.exists():
        # The next key of this name takes what was left away.
        assert list(Path().glob(".office*"))
        assert rdp(["keys", "new", "office", "--passphrase-file", words("another passphrase")]).code == 0
        assert not list(Path().glob(".office*"))
    key = load_signing_key(private, Passphrase("another passphrase"))
    derived = rdp(["keys", "show", "office", "--json"]).out
    assert json.loads(derived)["public_key"] == key.public_key
    assert not public.exists() or public.read_text() == derived


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), FileExistsError()])
def test_failures_leave_no_file(failing: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    link, calls = os.link, []

    def fails(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        if len(calls) == failing:
            raise error
        link(*arguments, **options)

    monkeypatch.setattr(os, "link", fails)
    with pytest.raises(InvalidInput if isinstance(error, FileExistsError) else type(error)):
        new_key(Path("office"), Passphrase(PASSPHRASE))
    assert len(calls) == failing
    assert os.listdir() == []


@pytest.mark.usefixtures("cheap")
def test_a_file_that_appears_meanwhile_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def late(source: Any, target: Any) -> None:
        Path("office.pub").write_text("somebody else's")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(InvalidInput, match="exists"):
        new_key(Path("office"), Passphrase(PASSPHRASE))
    assert os.listdir() == ["office.pub"]
    assert Path("office.pub").read_text() == "somebody else's"


# Files that were changed


@pytest.mark.parametrize("name", ["office", "office.pub"])
@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_every_bit_of_a_key_file(office: Path, name: str, step: int, empty_folder: Path) -> None:
    octets = (office / name).read_bytes()
    path = empty_folder / name
    for bit in range(0, 8 * len(octets), step):
        changed = bytearray(octets)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(DataError):
            read_public_key(path)
        if name == "office":
            with pytest.raises(DataError):
                load_signing_key(path, Passphrase(PASSPHRASE))


def test_damage_is_told_from_a_wrong_passphrase(office: Path, empty_folder: Path) -> None:
    document = read_document(office / "office")
    sealed = document["cipher"]["sealed"]
    damaged = {**document, "cipher": {**document["cipher"], "sealed": ("1" if sealed[0] == "0" else "0") + sealed[1:]}}
    (empty_folder / "damaged").write_text(pretty(damaged))
    with pytest.raises(DataError, match="is damaged"):
        load_signing_key(empty_folder / "damaged", Passphrase(PASSPHRASE))
    with pytest.raises(InvalidInput, match="does not open"):
        load_signing_key(office / "office", Passphrase(PASSPHRASE + "!"))


def test_key_files_are_spelled_as_they_were_written(office: Path, empty_folder: Path) -> None:
    for name, read in (("office", lambda path: load_signing_key(path, Passphrase(PASSPHRASE))), ("office.pub", None)):
        path = empty_folder / name
        for old, new in (("\n", "\t"), ("Ed25519", "\\u0045d25519"), ("rdp-calc/", "rdp-calc\\/")):
            path.write_text((office / name).read_text().replace(old, new))
            assert read_document(path) == read_document(office / name)
            with pytest.raises(DataError, match="not spelled"):
                (read or read_public_key)(path)


def resealed(document: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A private key file with one value changed and its digest computed again, as by someone who knows the format."""
    changed = json.loads(json.dumps(document))
    block = changed
    for key in path[:-1]:
        block = block[key]
    block[path[-1]] = value
    return {**changed, "digest": digest(changed)}


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("kdf", "n"), 2**40, "asks for scrypt"),
        (("kdf", "n"), 2**21, "asks for scrypt"),
        (("kdf", "n"), 2**15, "asks for scrypt"),
        (("kdf", "n"), 2**17 + 1, "asks for scrypt"),
        (("kdf", "n"), 131072.0, "kdf.n"),
        (("kdf", "r"), 2**30, "as rdp-calc writes it"),
        (("kdf", "p"), 2**30, "as rdp-calc writes it"),
        (("kdf", "name"), "pbkdf2", "as rdp-calc writes it"),
        (("kdf", "more"), 1, "as rdp-calc writes it"),
        (("cipher", "name"), "AES-256-CBC", "as rdp-calc writes it"),
        (("cipher", "sealed"), "00" * 10**6, "wrong form"),
        (("cipher", "sealed"), "", "wrong form"),
        (("cipher", "nonce"), "00", "wrong form"),
        (("kdf", "salt"), "zz" * 32, "wrong form"),
        (("public_key",), "00" * 32, "wrong form"),
        (("algorithm",), "X25519", "as rdp-calc writes it"),
        (("fingerprint",), "00" * 32, "as rdp-calc writes it"),
        (("private_key",), "00" * 32, "as rdp-calc writes it"),
        (("schema",), "rdp-calc/key/2", "as rdp-calc writes it"),
    ],
)
def test_key_files_that_ask_for_too_much(
    office: Path, path: tuple[str, ...], value: Any, reason: str, empty_folder: Path, rdp: Call
) -> None:
    document = resealed(read_document(office / "office"), path, value)
    file = empty_folder / "hostile"
    file.write_text(pretty(document))
    with pytest.raises(DataError):
        load_signing_key(file, Passphrase(PASSPHRASE))
    found = rdp(["keys", "show", str(file)])
    assert found.code == 6
    assert reason in found.err


@pytest.mark.usefixtures("cheap")
def test_every_field_in_clear_is_bound(empty_folder: Path) -> None:
    """Another public key over the same sealed bytes, with fingerprint and digest to match, does not open."""
    new_key(Path("one"), Passphrase(PASSPHRASE))
    new_key(Path("two"), Passphrase(PASSPHRASE))
    one, two = (read_document(Path(name)) for name in ("one", "two"))
    clear = {name: two[name] for name in ("public_key", "fingerprint")}
    for changes in (
        clear,
        {"cipher": {**one["cipher"], "nonce": two["cipher"]["nonce"]}},
        {"kdf": {**one["kdf"], "salt": two["kdf"]["salt"]}},
        {"kdf": {**one["kdf"], "n": 2**16}},
        {"cipher": {**one["cipher"], "sealed": two["cipher"]["sealed"]}},
    ):
        mixed = {**one, **changes}
        Path("mixed").write_text(pretty({**mixed, "digest": digest(mixed)}))
        with pytest.raises(InvalidInput, match="does not open"):
            load_signing_key(Path("mixed"), Passphrase(PASSPHRASE))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"schema": "rdp-calc/key/1"}', "-----BEGIN PRIVATE KEY-----"])
def test_files_that_are_no_keys(content: str, rdp: Call, certificate: Path) -> None:
    Path("file").write_text(content)
    for arguments in (["keys", "show", "file"], ["keys", "sign", "file", str(certificate)]):
        assert rdp(arguments).code == 6
    assert rdp(["verify", str(certificate), "--signer", "file"]).code == 6


# sign and verify


def test_sign_and_verify(office: Path, certificate: Path, finished: Path, rdp: Call) -> None:
    key, public = str(office / "office"), str(office / "office.pub")
    hexadecimal = rdp(["keys", "show", public, "-q"]).out.strip()
    sign = ["keys", "sign", key, str(certificate), "--passphrase-file", str(office / "words")]
    before = rdp(["verify", str(certificate), "--signer", public])
    assert before.code == 5
    assert "check signer: no valid signature" in before.err
    certificate.chmod(0o640)
    unsigned = read_document(certificate)
    done = rdp(sign)
    assert (done.code, done.err) == (0, "")
    assert "does not say when" in done.out
    assert stat.S_IMODE(certificate.stat().st_mode) == 0o640
    assert os.listdir() == ["certificate.json"]
    assert {**read_document(certificate), "signature": None} == unsigned
    for signer in (public, key, hexadecimal):
        found = rdp(["verify", str(certificate), "--signer", signer, "--json"])
        assert (found.code, found.json["holds"], found.json["signed_by"]) == (0, True, hexadecimal)
        assert {"spelling", "signature", "signer"} <= {check["name"] for check in found.json["checks"]}
    assert "give --signer" in rdp(["verify", str(certificate)]).out
    assert rdp(["keys", "show", str(certificate), "-q"]).out.strip() == hexadecimal
    # Once more changes nothing; another key takes no signature away.
    stamp = certificate.stat()
    assert rdp(sign).code == 0
    assert certificate.stat().st_ino == stamp.st_ino
    other = ["keys", "sign", str(office / "other"), str(certificate), "--passphrase-file", str(office / "other-words")]
    refused = rdp(other)
    assert refused.code == 6
    assert "signed by another key" in refused.err
    wrong = rdp(["verify", str(certificate), "--signer", str(office / "other.pub")])
    assert wrong.code == 5
    assert f"check signer: signed by {hexadecimal}, expected " in wrong.err
    # The other files still bind.
    run = finished / "run"
    arguments = ["--model", str(run / "model.safetensors"), "--plan", str(finished / "plan.json"), "--record"]
    arguments += [str(run / "private" / "audit.json"), *DATA, "--forget", "3,17", "--signer", public, "--json"]
    found = rdp(["verify", str(certificate), *arguments])
    assert found.json["holds"] is True
    assert found.json["not_shown"] == ["that the run happened as recorded"]


def test_keys_show_is_not_fooled(office: Path, certificate: Path, rdp: Call) -> None:
    found = rdp(["keys", "show", str(certificate)])
    assert (found.code, "is not signed" in found.err) == (6, True)
    public = rdp(["keys", "show", str(office / "office"), "-q"]).out.strip()
    claimed = {"algorithm": "Ed25519", "public_key": public, "value": "0" * 128}
    certificate.write_text(pretty({**read_document(certificate), "signature": claimed}))
    found = rdp(["keys", "show", str(certificate)])
    assert found.code == 6
    assert found.out == ""


@pytest.mark.parametrize("signer", ["00" * 32, "01" + "00" * 31, "AB" * 32, "missing", "ab" * 31, ""])
def test_signers_that_are_no_keys(signer: str, certificate: Path, rdp: Call) -> None:
    found = rdp(["verify", str(certificate), "--signer", signer])
    assert found.code in (2, 6)
    assert found.out == ""


def test_what_does_not_verify_is_not_signed(office: Path, finished: Path, certificate: Path, rdp: Call) -> None:
    sign = ["keys", "sign", "--passphrase-file", str(office / "words"), str(office / "office")]
    sound = read_document(certificate)
    claimed = {**sound, "claim": {**sound["claim"], "epsilon": 0.1}}
    for document, check in (
        (claimed, "certificate digest"),
        ({**claimed, "digest": digest(claimed)}, "claim epsilon"),
        ({**sound, "signature": "signed"}, "signature"),
    ):
        certificate.write_text(pretty(document))
        found = rdp(
            ["keys", "sign", str(office / "office"), str(certificate), "--passphrase-file", str(office / "words")]
        )
        assert found.code == 6
        assert f"nothing was signed: check {check}" in found.err
        assert certificate.read_text() == pretty(document)
    # The signature would make another spelling look like the issuer's own.
    certificate.write_text(pretty(sound).replace("\n", "\t"))
    found = rdp([*sign, str(certificate)])
    assert "check spelling" in found.err
    found = rdp([*sign, str(finished / "plan.json")])
    assert (found.code, "only certificates" in found.err) == (6, True)


def test_what_a_certificate_is_not_for(office: Path, certificate: Path, finished: Path, rdp: Call) -> None:
    """Another plan, model, record or data: exit 5, the check and what differs."""
    run = finished / "run"
    rdp(f"plan langevin {' '.join(DATA)} --loss logistic --l2 0.05 --epsilon 2 --delta 1/n --unlearn-steps 5 -o p.json")
    found = rdp(["verify", str(certificate), "--plan", "p.json"])
    assert found.code == 5
    assert "check plan: p.json has digest " in found.err
    assert "problem.group_size is 1, certified 2" in found.err
    found = rdp(["verify", str(certificate), "--plan", str(certificate)])
    assert (found.code, "is no plan" in found.err) == (5, True)
    found = rdp(["verify", str(certificate), "--model", str(run / "private" / "before.safetensors")])
    assert found.code == 5
    assert f"the released model has {read_document(certificate)['model_sha256']}" in found.err
    assert rdp(["run", str(finished / "plan.json"), *DATA, "--forget", "3,17", "-o", "again", "-q"]).code == 0
    record = ["--record", "again/private/audit.json", *DATA, "--forget", "3,17"]
    found = rdp(["verify", str(certificate), *record])
    assert (found.code, "is the record of another run" in found.err) == (5, True)
    record = ["--record", str(run / "private" / "audit.json")]
    found = rdp(["verify", str(certificate), *record, *DATA, "--forget", "3,18"])
    assert (found.code, "check forget_set binding" in found.err) == (5, True)
    found = rdp(["verify", str(certificate), *record, "--data", "builtin:digits", "--forget", "3,17"])
    assert found.code == 5
    assert "check data binding" in found.err or "check record" in found.err


# run


def test_a_run_signs_before_its_folder_appears(office: Path, finished: Path, rdp: Call) -> None:
    key = ["--key", str(office / "office"), "--passphrase-file", str(office / "words")]
    run = ["run", str(finished / "plan.json"), *DATA]
    assert rdp([*run, "--forget", "3", "-o", "new", "-q", *key]).code == 0
    assert rdp(["verify", "new/certificate.json", "--signer", str(office / "office.pub"), "-q"]).out == "ok\n"
    audit = read_document(Path("new/private/audit.json"))
    assert audit["certificate_digest"] == read_document(Path("new/certificate.json"))["digest"]
    found = rdp([*run, "--phase", "learn", "-o", "learned", *key])
    assert (found.code, "--phase learn writes none" in found.err) == (2, True)


def test_a_wrong_passphrase_costs_nothing(
    office: Path, finished: Path, rdp: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("the run began")

    monkeypatch.setattr("cli.commands.run.load_runtime", never)
    run = ["run", str(finished / "plan.json"), *DATA, "--forget", "3", "-o", "new"]
    key = ["--key", str(office / "office")]
    for arguments, code in (
        ([*key, "--passphrase-file", str(office / "wrong")], 2),
        ([*key, "--passphrase-file", "missing"], 2),
        (["--passphrase-file", str(office / "words")], 2),
        (["--key", "missing", "--passphrase-file", str(office / "words")], 6),
        (["--key", str(office / "office.pub"), "--passphrase-file", str(office / "words")], 6),
    ):
        found = rdp([*run, *arguments])
        assert found.code == code, found.err
        assert found.err.count("\n") == 1
    assert os.listdir() == []
    # With torchrun the first process signs; the others open no key.
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(AssertionError, match="the run began"):
        rdp([*run, *key, "--passphrase-file", str(office / "wrong")])


# Secrets


def forms(secret: bytes) -> Iterator[bytes]:
    """How bytes may show: raw, hexadecimal, escaped, base64 at each alignment."""
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    yield repr(secret)[2:-1].encode()
    yield str(list(secret))[1:-1].encode()
    for pad in range(3):
        encoded = base64.b64encode(bytes(pad) + secret)
        yield encoded[4 if pad else 0 : -4]
        yield base64.urlsafe_b64encode(bytes(pad) + secret)[4 if pad else 0 : -4]


@pytest.fixture(scope="module")
def secrets_of_office(office: Path) -> list[bytes]:
    private = load_signing_key(office / "office", Passphrase(PASSPHRASE))._private.private_bytes_raw()
    salt = bytes.fromhex(read_document(office / "office")["kdf"]["salt"])
    derived = Passphrase(PASSPHRASE).derive(salt, 2**17)
    texts = [PASSPHRASE.encode(), json.dumps(PASSPHRASE).encode(), repr(PASSPHRASE).encode(), b"Tee um"]
    return [*forms(private), *forms(derived), *forms(PASSPHRASE.encode()), *texts]


def test_forms_find_what_they_look_for() -> None:
    secret = bytes(range(100, 132))
    for pad in range(3):
        assert any(form in base64.b64encode(b"x" * pad + secret + b"yz") for form in forms(secret))


def test_secrets_show_nowhere(
    office: Path, certificate: Path, finished: Path, rdp: Call, secrets_of_office: list[bytes]
) -> None:
    key, right, wrong = str(office / "office"), str(office / "words"), str(office / "wrong")
    run = ["run", str(finished / "plan.json"), *DATA, "--forget", "3", "--key", key, "--passphrase-file"]
    Path("taken").mkdir()
    Path("taken/file").write_text("x")
    said = []
    for arguments, code in (
        (["keys", "show", key], 0),
        (["keys", "show", key, "--json"], 0),
        (["keys", "new", key, "--passphrase-file", right], 2),
        (["keys", "sign", key, str(certificate), "--passphrase-file", wrong], 2),
        (["keys", "sign", key, "missing.json", "--passphrase-file", right], 6),
        (["keys", "sign", key, str(certificate), "--passphrase-file", right, "--json"], 0),
        (["keys", "sign", key, str(certificate), "--passphrase-file", right], 0),
        ([*run, wrong, "-o", "new"], 2),
        ([*run, right, "-o", "taken"], 2),
        ([*run, right, "-o", "new", "--log", "log.jsonl", "--checkpoint", "saved", "--checkpoint-every", "0.001"], 0),
        (["verify", "new/certificate.json", "--signer", key], 0),
        # A passphrase where a file belongs: the parser may repeat what was typed, the key is not named.
        (["verify", "new/certificate.json", "--signer", str(office / "words")], 6),
    ):
        found = rdp(arguments)
        assert found.code == code, (arguments, found.err)
        said.append((found.out + found.err).encode())
    files = [path for folder in (Path(), office) for path in folder.rglob("*") if path.is_file()]
    content = {str(path): path.read_bytes() for path in files if path.parent != office or path.suffix == ".pub"}
    content[key] = Path(key).read_bytes()
    assert {"certificate.json", "log.jsonl", "new/private/audit.json"} <= content.keys()
    for name, octets in [*content.items(), *((str(number), text) for number, text in enumerate(said))]:
        assert not [form for form in secrets_of_office if form in octets], name


def test_objects_show_no_secret(office: Path, secrets_of_office: list[bytes]) -> None:
    import copy
    import pickle

    passphrase = Passphrase(PASSPHRASE)
    key = load_signing_key(office / "office", passphrase)
    for thing in (passphrase, key):
        for text in (repr(thing), str(thing), f"{thing!s}"):
            assert not [form for form in secrets_of_office if form in text.encode()]
        for steal in (pickle.dumps, copy.deepcopy, vars, json.dumps):
            with pytest.raises(TypeError):
                steal(thing)


def test_tracebacks_show_no_secret(
    office: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch, secrets_of_office: list[bytes]
) -> None:
    """Not even where the variables of every frame are shown, as some programs that report errors do."""
    seen = []

    def shown(action: Callable[[], Any], kind: type[BaseException]) -> None:
        try:
            action()
        except kind as error:
            found = traceback.TracebackException.from_exception(error, capture_locals=True)
            # The frame of this test holds the secrets itself.
            found.stack = traceback.StackSummary.from_list(
                [frame for frame in found.stack if not frame.filename.endswith("test_keys.py")]
            )
            seen.append("".join(found.format()).encode())
        else:
            raise AssertionError("no error")

    passphrase = Passphrase(PASSPHRASE)
    key = load_signing_key(office / "office", passphrase)
    shown(lambda: load_signing_key(office / "office", Passphrase.from_file(office / "wrong")), RdpCalcError)
    shown(lambda: new_key(office / "office", passphrase), RdpCalcError)
    shown(lambda: key.sign_certificate({"schema": "x"}), RdpCalcError)
    for bad in (PASSPHRASE + "\t", PASSPHRASE + "\udc00", PASSPHRASE * 500):
        shown(lambda bad=bad: Passphrase(bad), RdpCalcError)
    Path("bad").write_bytes(PASSPHRASE.encode() + b"\xff\n")
    shown(lambda: Passphrase.from_file(Path("bad")), RdpCalcError)
    Path("weak").write_text("Tee um fu")
    shown(lambda: Passphrase.from_file(Path("weak")).check_new(), RdpCalcError)

    def breaks(*arguments: Any) -> Any:
        raise RuntimeError("unexpected")

    monkeypatch.setattr("unlearn_runtime.keys.canonical", breaks)
    shown(lambda: load_signing_key(office / "office", passphrase), RuntimeError)
    monkeypatch.undo()
    monkeypatch.setattr("rdp_calc.signature.check_signature", breaks)
    shown(lambda: key.sign_certificate(read_document(certificate)), RuntimeError)
    monkeypatch.undo()
    monkeypatch.setattr(os, "link", breaks)
    shown(lambda: new_key(Path("other"), passphrase), RuntimeError)
    assert all(b" = " in text for text in seen)
    for text in seen:
        assert not [form for form in secrets_of_office if form in text], text.decode()


def test_what_is_loaded(office: Path, certificate: Path) -> None:
    """Keys need no torch, and nothing that is not signed needs cryptography."""
    script = (
        "import sys; from cli.main import main; code = main(sys.argv[1:]); print(*sorted(sys.modules)); sys.exit(code)"
    )

    def modules(*arguments: str) -> set[str]:
        command = [sys.executable, "-W", "error", "-c", script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return set(done.stdout.splitlines()[-1].split())

    assert not {"cryptography", "torch", "numpy"} & modules("verify", str(certificate), "-q")
    assert not {"cryptography", "torch", "numpy"} & modules("keys", "show", str(office / "office"), "-q")
    key = ["--passphrase-file", str(office / "words"), "-q"]
    signing = modules("keys", "sign", str(office / "office"), str(certificate), *key)
    assert "cryptography" in signing
    assert not {"torch", "numpy"} & signing
