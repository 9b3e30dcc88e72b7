"""rdp-calc statement: what it prints and writes, what it refuses, and that it replaces nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rdp_calc.documents import pretty, read_document
from rdp_calc.signature import sign_document

Call = Callable[..., Any]

GOLDEN = Path(__file__).parents[1] / "golden" / "certificate-v1.json"

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture(autouse=True)
def certificate(empty_folder: Path) -> None:
    (empty_folder / "cert.json").write_text(GOLDEN.read_text(encoding="utf-8"), encoding="utf-8")


def test_forms(rdp: Call) -> None:
    starts = {
        "text": "Statement of unlearning\n===",
        "markdown": "# Statement of unlearning\n",
        "html": "<!DOCTYPE html>",
    }
    for form, start in starts.items():
        found = rdp(f"statement cert.json --format {form}")
        assert (found.code, found.err) == (0, "")
        assert found.out.startswith(start)
        assert found.out.endswith("\n")
        assert "rdp-calc verify cert.json --model model.safetensors" in found.out
    assert rdp("statement cert.json").out == rdp("statement cert.json --format text").out


def test_quiet_and_json(rdp: Call) -> None:
    assert rdp("statement cert.json -q").out == "certified\n"
    document = rdp("statement cert.json --json").json
    assert (document["schema"], document["level"], document["output"]) == ("rdp-calc/statement/1", "certified", None)
    assert document["certificate_digest"] == read_document(GOLDEN)["digest"]


@pytest.mark.parametrize(
    ("name", "form"), [("s.txt", "text"), ("s.md", "markdown"), ("s.html", "html"), ("S.HTML", "html")]
)
def test_files_hold_what_is_printed(rdp: Call, name: str, form: str) -> None:
    printed = rdp(f"statement cert.json --format {form}").out
    found = rdp(f"statement cert.json -o {name}")
    assert (found.code, found.out, found.err) == (0, f"{name}: statement, level certified\n", "")
    assert Path(name).read_text(encoding="utf-8") == printed
    # Its own statement may be replaced, and nothing is left beside it.
    assert rdp(f"statement cert.json -o {name} --format {form} --json").json["output"] == name
    assert sorted(path.name for path in Path.cwd().iterdir()) == sorted(["cert.json", name])


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ("statement", 2, ["CERT"]),
        ("statement missing.json", 6, ["missing.json"]),
        ("statement cert.json -o s.pdf", 2, [".html", "print"]),
        ("statement cert.json -o s.docx", 2, [".txt", ".md", ".html"]),
        ("statement cert.json -o cert.json", 2, [".txt"]),
        ("statement cert.json --format pdf", 2, ["markdown"]),
        ("statement cert.json --format text -o s.html", 2, ["--format text", "s.html"]),
        ("statement cert.json -o none/s.html", 2, ["none"]),
        ("statement cert.json -o folder.md", 2, ["folder"]),
        ("statement cert.json --model other.bin", 5, ["model"]),
        ("statement cert.json --model missing.bin", 6, ["missing.bin"]),
        ("statement cert.json --signer " + "0" * 64, 2, ["--signer"]),
    ],
)
def test_refusals(rdp: Call, arguments: str, code: int, named: list[str]) -> None:
    Path("other.bin").write_bytes(b"model")
    Path("folder.md").mkdir()
    before = sorted(Path.cwd().iterdir())
    found = rdp(arguments)
    assert (found.code, found.out) == (code, "")
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    for word in named:
        assert word in found.err
    assert sorted(Path.cwd().iterdir()) == before


@pytest.mark.parametrize("name", ["notes.txt", "notes.md", "notes.html"])
@pytest.mark.parametrize(
    "content", [b"", b"my notes\n", b"\xff\xfe Statement of unlearning", b"Statement of unlearning?"]
)
def test_what_is_no_statement_is_not_replaced(rdp: Call, name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    found = rdp(f"statement cert.json -o {name}")
    assert (found.code, found.out) == (2, "")
    assert "is not a statement" in found.err
    assert Path(name).read_bytes() == content


def test_a_link_is_not_replaced(rdp: Call) -> None:
    assert rdp("statement cert.json -o real.txt").code == 0
    for target in ("real.txt", "nowhere.txt"):
        Path("link.txt").symlink_to(target)
        assert rdp("statement cert.json -o link.txt").code == 2
        Path("link.txt").unlink()


@pytest.mark.parametrize("flags", ["", "--json", "-q", "-o s.html"])
def test_a_certificate_that_does_not_hold(rdp: Call, flags: str) -> None:
    document = read_document(GOLDEN)
    document["claim"]["epsilon"] = 0.5
    Path("edited.json").write_text(pretty(document))
    found = rdp(f"statement edited.json {flags}")
    assert (found.code, found.out) == (5, "")
    assert "digest" in found.err
    assert not Path("s.html").exists()


def test_a_certificate_spelled_otherwise_gets_no_statement(rdp: Call) -> None:
    Path("spelled.json").write_text(GOLDEN.read_text().replace('"schema"', '"\\u0073chema"', 1))
    found = rdp("statement spelled.json")
    assert (found.code, found.out) == (5, "")
    assert "spelling" in found.err


def test_a_plan_gets_no_statement(rdp: Call) -> None:
    Path("plan.json").write_text(pretty(read_document(GOLDEN)["plan"]))
    found = rdp("statement plan.json")
    assert (found.code, found.out) == (6, "")
    assert "certificate" in found.err


def test_the_signer_that_was_asked_for(rdp: Call) -> None:
    signed = sign_document(read_document(GOLDEN), KEY)
    Path("signed.json").write_text(pretty(signed))
    key = signed["signature"]["public_key"]
    assert "compare the fingerprint" in " ".join(rdp("statement signed.json").out.split())
    found = rdp(f"statement signed.json --signer {key}")
    assert found.code == 0
    assert "It is the key that was asked for" in " ".join(found.out.split())
    assert f"--signer {key}" in found.out
    other = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw().hex()
    for arguments in (f"statement signed.json --signer {other}", f"statement cert.json --signer {key}"):
        refused = rdp(arguments)
        assert (refused.code, refused.out) == (5, "")
        assert "signer" in refused.err


def test_the_model_of_a_run(rdp: Call, finished: Path) -> None:
    run = finished / "run"
    found = rdp(["statement", str(run / "certificate.json"), "--model", str(run / "model.safetensors")])
    assert found.code == 0
    text = " ".join(found.out.split())
    assert "So was the file of the model: it is the one named." in text
    assert read_document(run / "certificate.json")["model_sha256"] in text
    assert "So was the file" not in rdp(["statement", str(run / "certificate.json")]).out


def test_file_names_are_only_shown(rdp: Call) -> None:
    name = "a <b>'\x1b[31m.json"
    Path(name).write_text(GOLDEN.read_text())
    for form in ("text", "markdown", "html"):
        found = rdp(["statement", name, "--format", form])
        assert found.code == 0
        assert "\x1b" not in found.out
    assert "<b>'" not in found.out


def test_torch_is_not_loaded(shell: Call, empty_folder: Path) -> None:
    import sys

    code = (
        "import sys, json; from cli.main import main; main(['statement', 'cert.json', '-o', 's.html']);"
        " print(json.dumps(sorted(sys.modules)))"
    )
    found = shell([sys.executable, "-W", "error", "-c", code], empty_folder)
    assert (found.code, found.err) == (0, "")
    modules = set(json.loads(found.out.splitlines()[-1]))
    assert not modules & {"torch", "numpy", "scipy", "mpmath", "matplotlib", "safetensors", "unlearn_runtime.bindings"}
