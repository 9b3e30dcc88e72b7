"""Nothing is sent anywhere: every verb runs where a connection would end the process, in Python or below it.

Two guards: an audit hook, which sees what Python code does by name, and a filter of the kernel (seccomp, Linux), which
ends the process at the first internet socket, whoever opens it. Where the kernel allows a network namespace without
interfaces, the answers in it are the same.
"""

from __future__ import annotations

import ast
import pkgutil
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cli.commands

ROOT = Path(__file__).resolve().parents[1]

#: Installs both guards, then runs command lines, one in a line of stdin; tells on stderr what ended it.
GUARDED = r"""
import ctypes, faulthandler, os, platform, shlex, signal, struct, sys, traceback

def forbid(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], (str, bytes)):
        return  # a path: a socket of this machine's own
    if event in WORDS or event.startswith(("urllib.", "http.", "ftplib.", "smtplib.", "poplib.", "imaplib.")):
        os.write(2, f"network: {event}\n".encode() + "".join(traceback.format_stack()).encode())
        os._exit(99)

WORDS = {"socket." + name for name in (
    "connect bind getaddrinfo gethostbyname gethostbyaddr getnameinfo getservbyname sendto sendmsg sethostname".split()
)}
sys.addaudithook(forbid)

# BPF: the process ends where it calls socket() for AF_INET or AF_INET6.
NUMBERS = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
if sys.platform == "linux" and platform.machine() in NUMBERS:
    architecture, call = NUMBERS[platform.machine()]
    steps = [
        (0x20, 0, 0, 4), (0x15, 0, 5, architecture), (0x20, 0, 0, 0), (0x15, 0, 3, call), (0x20, 0, 0, 16),
        (0x15, 2, 0, 2), (0x15, 1, 0, 10), (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00030000),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    header = struct.pack("HL", len(steps), ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    blocked = libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, header, 0, 0) == 0
    faulthandler.register(signal.SIGSYS, chain=True)
    print("kernel" if blocked else "audit hook alone", file=sys.stderr, flush=True)

exec(sys.argv[1]) if len(sys.argv) > 1 else None
if len(sys.argv) == 1:
    from cli.main import main
    for line in sys.stdin:
        print(">", line, end="", file=sys.stderr, flush=True)
        wanted, arguments = line.split(" ", 1)
        code = main(shlex.split(arguments))
        if code != int(wanted):
            sys.exit(f"{arguments.strip()}: exit code {code}")
"""

SIZES = "--dataset-size 1000 --loss logistic --l2 0.05 --epsilon 1 --delta 1/n"
DATA = "--data builtin:breast-cancer"
TARGET = "--loss logistic --l2 0.05 --epsilon 1 --delta 1/n"

#: Answers, plans, keys; the expected exit code, then the command.
ACCOUNTING = f"""
0 --version
0 --help
0 sigma langevin {SIZES} --unlearn-steps 2
0 sigma dp-sgd --dataset-size 1000 --batch-size 100 --epochs 1 --epsilon 1 --delta 1/n
0 epsilon langevin --dataset-size 1000 --loss logistic --l2 0.05 --delta 1/n --unlearn-steps 2 --sigma 0.1
0 steps langevin {SIZES} --sigma 0.1
0 compare {SIZES} --unlearn-steps 2 --init-clip 1
0 curve langevin --sweep unlearn_steps=1:10 {SIZES} -o curve.png
0 explain shifted
0 reproduce koloskova-eps
0 doctor
2 sigma nothing
6 verify missing.json
0 plan langevin {DATA} {TARGET} --group-size 2 --unlearn-steps 2 --execute-learn-steps 5 -o plan.json
0 plan show plan.json
0 verify plan.json
0 keys new key --passphrase-file words
0 keys show key
"""

#: A model is learned, released, signed, described, and entered in a ledger; data that is an address is refused.
RELEASING = f"""
0 run plan.json {DATA} --phase learn -o learned
0 run plan.json {DATA} --phase unlearn --start learned --forget 3,17 --key key --passphrase-file words -o run
0 verify run/certificate.json --signer key.pub --model run/model.safetensors --record run/private/audit.json {DATA} \
  --forget 3,17
0 statement run/certificate.json -o statement.html
0 ledger init model.ledger --plan plan.json
0 ledger run model.ledger {DATA} -o first
0 ledger request model.ledger --forget 5 --due-days 30
0 ledger plan model.ledger
0 ledger run model.ledger {DATA} -o release
0 ledger status model.ledger
0 ledger export model.ledger -o model.jsonl
0 ledger verify model.jsonl
6 run plan.json --data https://example.org/rows.npz --forget 3 -o away
6 run plan.json --data s3://bucket/rows.parquet --forget 3 -o away
"""

#: What takes longer: networks, attacks, everything that trains many models.
TRAINING = f"""
0 run plan.json {DATA} --forget 3 --secure-noise --checkpoint saved --log log.jsonl -o whole
0 keys sign key whole/certificate.json --passphrase-file words
0 baseline retrain {DATA} --model logistic --learn epochs=1,step-size=0.1 --forget 3,17 -o again
0 evaluate run again --attack loss
0 audit plan.json {DATA} --forget 3 --trials 20
0 plan noisy-finetune {DATA} --model mlp:4 --epsilon 1 --delta 1/n --init-clip 1 --grad-clip 1 --step-size 0.01 \
  --learn epochs=1,step-size=0.1 -o network.json
0 run network.json {DATA} --forget 3 -o network
0 features {DATA} --model mlp:4 --start network -o features.npz
0 reproduce hessian-free-distance --scale 0.001 -o distance
0 demo
"""


def commands(text: str) -> str:
    return "".join(f"{line}\n" for line in text.replace("\\\n", " ").splitlines() if line)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "words").write_text("correct horse battery\n")
    return tmp_path


def guarded(text: str, folder: Path, *arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, "-c", GUARDED, *arguments],
        input=commands(text),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def filtered() -> bool:
    """Whether the kernel's part of the guard works here."""
    return "kernel" in guarded("", Path.cwd(), "pass").stderr


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import socket; socket.gethostbyname('localhost')",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/')",
        "import urllib.request\ntry: urllib.request.urlopen('http://127.0.0.1:9/')\nexcept BaseException: pass",
    ],
)
def test_the_guard_ends_what_python_connects(code: str, tmp_path: Path) -> None:
    found = guarded("", tmp_path, code)
    # The kernel comes first where a socket is opened before anything is asked of it.
    assert found.returncode in (99, -signal.SIGSYS)


@pytest.mark.parametrize("family", [2, 10])
def test_the_guard_ends_what_other_code_opens(family: int, tmp_path: Path) -> None:
    if not filtered():
        pytest.skip("this kernel takes no filter")
    found = guarded("", tmp_path, f"import ctypes; ctypes.CDLL(None).socket({family}, 1, 0)")
    assert found.returncode == -signal.SIGSYS
    # A child is held by it as well.
    inner = f"import ctypes; ctypes.CDLL(None).socket({family}, 1, 0)"
    code = f"import subprocess, sys; sys.exit(-subprocess.run([sys.executable, '-c', {inner!r}]).returncode)"
    assert guarded("", tmp_path, code).returncode == signal.SIGSYS


def test_the_guard_lets_files_and_local_sockets_be(tmp_path: Path) -> None:
    found = guarded("", tmp_path, "import socket; socket.socketpair(); open('note', 'w').write('x'); print('through')")
    assert (found.returncode, found.stdout) == (0, "through\n")


def test_on_linux_the_kernel_helps() -> None:
    if sys.platform == "linux" and platform.machine() == "x86_64":
        assert filtered() or "seccomp" not in Path("/proc/self/status").read_text().lower()


@pytest.mark.slow
def test_a_release_and_all_before_it_open_no_connection(folder: Path) -> None:
    found = guarded(ACCOUNTING + RELEASING, folder)
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_training_opens_no_connection(folder: Path) -> None:
    found = guarded(ACCOUNTING + RELEASING + TRAINING, folder)
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_without_any_network_everything_works(folder: Path) -> None:
    alone = ("unshare", "-rn")
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no network namespaces here")
    found = guarded(ACCOUNTING + RELEASING + TRAINING, folder, before=alone)
    assert found.returncode == 0, found.stderr


def test_every_verb_is_among_them() -> None:
    said = [line.split() for line in commands(ACCOUNTING + RELEASING + TRAINING).splitlines()]
    verbs = {info.name for info in pkgutil.iter_modules(cli.commands.__path__)}
    assert {words[1] for words in said if words[0] == "0"} >= verbs
    ledger = pkgutil.iter_modules([str(Path(cli.commands.__path__[0]) / "ledger")])
    assert {words[2] for words in said if words[1] == "ledger"} == {i.name for i in ledger if i.name[0] != "_"}


#: Modules that reach a network, but for the part of urllib that takes addresses apart.
CLIENTS = {
    *("socket", "ssl", "http", "urllib", "ftplib", "smtplib", "poplib", "imaplib", "nntplib", "telnetlib", "xmlrpc"),
    *("asyncio", "socketserver", "webbrowser", "requests", "urllib3", "httpx", "aiohttp", "fsspec", "boto3", "wandb"),
    *("huggingface_hub", "datasets", "transformers", "torchvision", "mlflow", "grpc", "paramiko"),
}

#: Names by which libraries in use here fetch things.
FETCHERS = {"load_state_dict_from_url", "download_url_to_file", "urlretrieve", "urlopen", "from_pretrained", "hub"}


def sources() -> Iterator[Path]:
    for package in ("rdp_calc", "unlearn_runtime", "cli"):
        yield from (ROOT / package).rglob("*.py")


def reaching(text: str) -> set[str]:
    """What a source imports or names that could reach a network."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name in FETCHERS or name.startswith("fetch_"):
                found.add(name)
        for name in names:
            parts = name.split(".")
            if (parts[0] in CLIENTS and name != "urllib.parse" and not name.startswith("urllib.parse.")) or (
                set(parts) & FETCHERS or parts[-1].startswith("fetch_")
            ):
                found.add(name)
            elif parts[:2] == ["torch", "distributed"]:
                found.add("torch.distributed")
    return found


def test_no_module_imports_a_network_client() -> None:
    assert sum(1 for _ in sources()) > 100
    found = {str(path.relative_to(ROOT)): reaching(path.read_text()) for path in sources()}
    # Processes that torchrun started, and only those, talk to each other.
    assert {name: names for name, names in found.items() if names} == {
        "unlearn_runtime/distributed.py": {"torch.distributed"}
    }


@pytest.mark.parametrize(
    "text",
    [
        "import socket",
        "import urllib.request",
        "from urllib import request",
        "from urllib.request import urlopen as get",
        "def f():\n    import requests",
        "from sklearn.datasets import fetch_openml",
        "import sklearn.datasets\nsklearn.datasets.fetch_openml('x')",
        "import torch\ntorch.hub.load('a', 'b')",
        "from torch import distributed",
    ],
)
def test_what_the_search_finds(text: str) -> None:
    assert reaching(text)


def test_what_the_search_lets_be() -> None:
    assert not reaching("import urllib.parse\nfrom urllib.parse import quote\nimport pathlib\nfrom torch import nn")
