"""What a certificate says, what it must never say, and how it is tied to the files of its run."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from rdp_calc import Plan, verify_document
from rdp_calc.documents import digest, read_document
from rdp_calc.errors import DataError
from unlearn_runtime.bindings import binding_checks
from unlearn_runtime.execution import Execution
from unlearn_runtime.run import run_plan

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
MakePlan = Callable[..., Plan]
Blobs = Callable[..., tuple[Array, Array]]
Save = Callable[..., str]

#: The only leaves of a certificate that may depend on data, forgotten ids or noise: four keyed fingerprints, the hash
#: of the released model, and the digest over all of it.
MAY_DIFFER = {
    ("fingerprints", "data"),
    ("fingerprints", "retained"),
    ("fingerprints", "forget_set"),
    ("fingerprints", "model_before"),
    ("model_sha256",),
    ("digest",),
}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        yield path, len(value)
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[tuple[Any, ...]]:
    first, second = dict(leaves(one)), dict(leaves(other))
    return {path for path in first.keys() | second.keys() if first.get(path) != second.get(path)}


class Run:
    """The folder of one complete run, and what it was given."""

    def __init__(self, folder: Path, plan: Path, data: str, forget: str) -> None:
        self.folder, self.plan, self.data, self.forget = folder, plan, data, forget
        self.certificate = read_document(folder / "certificate.json")
        self.audit = read_document(folder / "private" / "audit.json")

    def check(self, **changes: Any) -> dict[str, bool]:
        """The binding checks, all files given unless a change replaces or drops one: name to passed."""
        certificate = changes.pop("certificate", self.certificate)
        given: dict[str, Any] = {
            "model": self.folder / "model.safetensors",
            "plan": self.plan,
            "record": self.folder / "private" / "audit.json",
            "data": self.data,
            "forget": self.forget,
        }
        before = verify_document(certificate)
        report = binding_checks(before, certificate, **(given | changes))
        return {check.name: check.passed for check in report.checks[len(before.checks) :]}


@pytest.fixture
def complete(tmp_path: Path, make_plan: MakePlan, blobs: Blobs, save_npz: Save) -> Run:
    plan = make_plan().to_json()
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    x, y = blobs(n=70)
    data = save_npz(x[:60], y[:60], x[60:], y[60:])
    run_plan(plan, data=data, output=tmp_path / "run", forget="5,17", execution=Execution(chains=2, retrain="fresh"))
    return Run(tmp_path / "run", tmp_path / "plan.json", data, "5,17")


# Content


def test_certificate_holds_and_repeats_the_plan(complete: Run, make_plan: MakePlan) -> None:
    plan = make_plan().to_json()
    certificate = complete.certificate
    assert certificate["schema"] == "rdp-calc/certificate/1"
    assert certificate["plan"] == plan
    assert certificate["plan_digest"] == plan["digest"]
    assert certificate["claim"] == {
        "epsilon": 1.0,
        "delta": 1e-3,
        "mu": plan["verification"]["mu"],
        "adjacency": "remove",
        "group_size": 3,
        "level": "certified",
    }
    assert certificate["signature"] is None
    assert [check["pass"] for check in certificate["checks"]] == [True] * len(certificate["checks"])
    assert {"rdp-calc", "torch", "numpy", "python"} <= set(certificate["versions"])
    report = verify_document(certificate)
    assert report.holds
    assert (report.kind, report.level, report.claim_level) == ("certificate", "interval", "certified")
    assert report.delta_upper is not None
    assert report.delta_upper <= 1e-3
    assert any("that the run happened" in text for text in report.not_shown)


def test_same_plan_other_data_ids_and_noise(tmp_path: Path, make_plan: MakePlan, blobs: Blobs, save_npz: Save) -> None:
    plan = make_plan().to_json()
    x, y = blobs()
    far = np.round(10 * x)
    certificates = []
    for name, rows, labels, forget, chains in (
        ("one", x, y, "5,17", 1),
        ("more forgotten", x, y, "0-2", 1),
        ("other rows", far, y[::-1], "59", 1),
        ("more chains", x, y, "5", 4),
    ):
        data = save_npz(rows, labels, name=name)
        run_plan(plan, data=data, output=tmp_path / name, forget=forget, execution=Execution(chains=chains))
        certificates.append(read_document(tmp_path / name / "certificate.json"))
    for other in certificates[1:]:
        assert differing(certificates[0], other) == MAY_DIFFER


def test_fingerprints_are_keyed_afresh(tmp_path: Path, make_plan: MakePlan, blobs: Blobs, save_npz: Save) -> None:
    # Two runs that agree in every byte they read and compute: a fingerprint without a fresh key would repeat.
    plan, data = make_plan().to_json(), save_npz(*blobs())
    runs = []
    for name in ("one", "other"):
        run_plan(plan, data=data, output=tmp_path / name, forget="5", execution=Execution(seed=1))
        runs.append(read_document(tmp_path / name / "certificate.json"))
    assert runs[0]["model_sha256"] == runs[1]["model_sha256"]
    assert differing(*runs) == MAY_DIFFER - {("model_sha256",)}
    keys = [read_document(tmp_path / name / "private" / "audit.json")["key"] for name in ("one", "other")]
    assert keys[0] != keys[1]
    assert all(len(bytes.fromhex(key)) >= 32 for key in keys)


def unkeyed_hashes(run: Run) -> set[str]:
    """Hashes of everything private, in the encodings a careless program would use."""
    arrays = dict(np.load(run.data))
    ids = [int(text) for text in run.forget.split(",")]
    blobs = [array.tobytes() for array in arrays.values()]
    blobs += [array.astype(kind).tobytes() for array in arrays.values() for kind in ("<f4", "<f8", "<i8")]
    blobs += [Path(run.data).read_bytes(), run.data.encode(), Path(run.data).name.encode()]
    blobs += [path.read_bytes() for path in (run.folder / "private").iterdir()]
    blobs += [load_file(run.folder / "private" / "before.safetensors")["weight"].tobytes()]
    blobs += [np.array(ids, dtype=kind).tobytes() for kind in ("<i4", "<i8", ">i8")]
    blobs += [json.dumps(ids).encode(), run.forget.encode(), str(ids).encode(), bytes.fromhex(run.audit["key"])]
    blobs += [str(i).encode() for i in ids] + [arrays["X_train"][i].tobytes() for i in ids]
    return {
        hashlib.new(name, blob).hexdigest() for blob in blobs for name in ("md5", "sha1", "sha256", "sha512", "blake2b")
    }


def test_certificate_has_no_unkeyed_trace_of_the_private_side(complete: Run) -> None:
    text = (complete.folder / "certificate.json").read_text()
    assert not [value for value in unkeyed_hashes(complete) if value in text]
    assert complete.audit["key"] not in text
    # No path, and nothing that says where or when or by which process it was made.
    for private in (str(complete.folder.parent), complete.data, "data.npz", complete.audit["time"]):
        assert private not in text
    # No metric: every accuracy of the private file, as JSON would write it.
    metrics = read_document(complete.folder / "private" / "metrics.json")
    numbers = {value for _, value in leaves(metrics) if isinstance(value, float) and value not in (0.0, 1.0)}
    assert numbers
    stored = {value for _, value in leaves(complete.certificate)}
    assert not numbers & stored
    # No id and no number of forgotten records: 5 and 17 are not among its numbers, and 2 is only if it means nothing.
    integers = {value for path, value in leaves(complete.certificate) if isinstance(value, int) and len(path) < 9}
    assert not {5, 17} & integers - {len(complete.certificate["checks"])}
    # No rounding error that was measured.
    assert complete.audit["rounding_error"] not in stored


def test_hash_search_can_find(complete: Run) -> None:
    raw = np.load(complete.data)["X_train"]
    assert hashlib.sha256(raw.tobytes()).hexdigest() in unkeyed_hashes(complete)
    assert hashlib.sha256(b"5,17").hexdigest() in unkeyed_hashes(complete)


def test_public_files_are_the_model_and_the_certificate(complete: Run) -> None:
    assert sorted(p.name for p in complete.folder.iterdir()) == ["certificate.json", "model.safetensors", "private"]
    header = (complete.folder / "model.safetensors").read_bytes()
    # 8 bytes of length, then a JSON header that may carry metadata: there is none.
    described = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert list(described) == ["weight"]


def test_released_file_does_not_show_which_arithmetic_was_chosen(
    tmp_path: Path, make_plan: MakePlan, blobs: Blobs, save_npz: Save
) -> None:
    # Left to itself a run looks at all records, the forgotten ones too, to choose float32 or float64. That choice must
    # not leave the private folder, or one record could show in the type of the released numbers.
    chosen, released = set(), set()
    for n in (60, 20_000):
        x, y = blobs(n=n)
        plan = make_plan(n=n, learned=1, unlearned=1).to_json()
        for phase, forget in (("learn", None), ("all", "1")):
            output = tmp_path / f"{phase} {n}"
            summary = run_plan(plan, data=save_npz(x, y), output=output, phase=phase, forget=forget)
            chosen.add(summary["matrix_dtype"])
            released.add(str(load_file(output / "model.safetensors")["weight"].dtype))
    assert chosen == {"float32", "float64"}
    assert len(released) == 1


# Private side


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("phase", ["learn", "all"])
def test_private_modes(
    phase: str, mask: int, tmp_path: Path, make_plan: MakePlan, blobs: Blobs, save_npz: Save
) -> None:
    plan, data = make_plan().to_json(), save_npz(*blobs())
    before = os.umask(mask)
    try:
        run_plan(plan, data=data, output=tmp_path / "run", phase=phase, forget=None if phase == "learn" else "1")
    finally:
        os.umask(before)
    private = tmp_path / "run" / "private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in private.iterdir()}
    assert len(found) == 3
    assert set(found.values()) == {0o600}


def test_audit_record(complete: Run) -> None:
    audit = complete.audit
    assert audit["forgotten_ids"] == [5, 17]
    assert audit["certificate_digest"] == complete.certificate["digest"]
    assert audit["data_source"] == complete.data
    assert 0 <= audit["rounding_error"] <= audit["rounding_limit"]


# Bindings


def test_bindings_hold(complete: Run) -> None:
    passed = complete.check()
    assert set(passed) == {"model", "plan", "data binding", "forget_set binding", "model_before binding"}
    assert all(passed.values())
    report = binding_checks(
        verify_document(complete.certificate),
        complete.certificate,
        model=complete.folder / "model.safetensors",
        plan=None,
        record=None,
        data=None,
        forget=None,
    )
    assert not any("--model" in text for text in report.not_shown)
    assert any("--record" in text for text in report.not_shown)


def test_ids_may_be_given_in_any_order_and_form(complete: Run, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("17\n5\n")
    for forget in ("17,5", f"@{tmp_path / 'ids.txt'}"):
        assert all(complete.check(forget=forget).values())


def test_wrong_model_or_plan(complete: Run, tmp_path: Path, make_plan: MakePlan) -> None:
    released = bytearray((complete.folder / "model.safetensors").read_bytes())
    released[-1] ^= 1
    (tmp_path / "other.safetensors").write_bytes(released)
    before = complete.folder / "private" / "before.safetensors"
    for model in (tmp_path / "other.safetensors", before):
        assert complete.check(model=model) == {
            "model": False,
            "plan": True,
            "data binding": True,
            "forget_set binding": True,
            "model_before binding": True,
        }
    (tmp_path / "other.json").write_text(json.dumps(make_plan(epsilon=1.1).to_json()))
    # A plan whose content changed but which still carries the old digest is another plan.
    edited = make_plan().to_json()
    edited["parameters"]["unlearn_steps"] = 400
    (tmp_path / "edited.json").write_text(json.dumps(edited))
    for plan in ("other.json", "edited.json"):
        assert not complete.check(plan=tmp_path / plan)["plan"]
    for missing in ({"model": tmp_path / "none"}, {"plan": tmp_path / "none"}):
        with pytest.raises(DataError):
            complete.check(**missing)


def test_wrong_data(complete: Run, blobs: Blobs, save_npz: Save) -> None:
    x, y = blobs(n=70)
    x, y = x[:60], y[:60]
    nudged, relabelled = x.copy(), y.copy()
    nudged[30, 2] = np.nextafter(nudged[30, 2], 1)
    relabelled[59] = 1 - relabelled[59]
    for name, (rows, labels) in {"nudged": (nudged, y), "relabelled": (x, relabelled)}.items():
        passed = complete.check(data=save_npz(rows, labels, name=name))
        assert (passed["data binding"], passed["forget_set binding"]) == (False, True)
    # The test set is no part of what is bound.
    assert all(complete.check(data=save_npz(x, y, name="no test set")).values())


@pytest.mark.parametrize("forget", ["5", "17", "5,18", "5,16", "5,17,18", "0-59"])
def test_wrong_forget_set(complete: Run, forget: str) -> None:
    passed = complete.check(forget=forget)
    assert (passed["data binding"], passed["forget_set binding"]) == (True, False)


def test_wrong_record(complete: Run, tmp_path: Path) -> None:
    for changes in ({"key": "00" * 32}, {"key": "zz"}, {"key": None}):
        (tmp_path / "audit.json").write_text(json.dumps(complete.audit | changes))
        passed = complete.check(record=tmp_path / "audit.json")
        assert not all(passed.values())
        assert passed["model"]
    for content in ("", "{}", "[]"):
        (tmp_path / "audit.json").write_text(content)
        passed = complete.check(record=tmp_path / "audit.json")
        assert not all(passed.values())


def test_another_model_before(complete: Run) -> None:
    before = complete.folder / "private" / "before.safetensors"
    octets = bytearray(before.read_bytes())
    octets[-1] ^= 1
    before.write_bytes(octets)
    assert {name for name, passed in complete.check().items() if not passed} == {"model_before binding"}
    # It is private and may have been deleted; then nothing is said of it.
    before.unlink()
    assert all(complete.check().values())
    assert "model_before binding" not in complete.check()


def test_the_record_of_another_run(complete: Run, tmp_path: Path) -> None:
    (tmp_path / "audit.json").write_text(json.dumps(complete.audit | {"certificate_digest": "0" * 64}))
    assert complete.check(record=tmp_path / "audit.json") == {"model": True, "plan": True, "record": False}


def test_plans_have_no_bindings(complete: Run, make_plan: MakePlan) -> None:
    plan = make_plan().to_json()
    report = binding_checks(
        verify_document(plan),
        plan,
        model=complete.folder / "model.safetensors",
        plan=None,
        record=None,
        data=None,
        forget=None,
    )
    assert not report.holds


# Changed certificates


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("claim", "epsilon"), 0.5),
        (("claim", "delta"), 1e-4),
        (("claim", "mu"), 0.1),
        (("claim", "group_size"), 60),
        (("claim", "adjacency"), "replace"),
        (("claim", "level"), "conditional"),
        (("claim", "level"), None),
        (("executed", "noise_std"), 1e-9),
        (("executed", "learn_steps"), 5),
        (("executed", "unlearn_steps"), 3),
        (("executed", "unlearn_steps"), 4.0),
        (("executed", "released_chain"), 1),
        (("executed", "random_source"), "seeded-insecure"),
        (("executed", "random_source"), "dice"),
        (("fingerprints", "data"), ""),
        (("fingerprints", "forget_set"), None),
        (("fingerprints", "retained"), "f" * 63),
        (("model_sha256",), "x" * 64),
        (("plan_digest",), "0" * 64),
        (("plan", "parameters", "sigma"), 1e-9),
        (("plan", "parameters", "noise_std"), 1e-9),
        (("plan", "target", "epsilon"), 0.5),
        (("plan", "digest"), "0" * 64),
        (("checks", 0, "pass"), False),
        (("checks", 0, "pass"), 1),
        (("signature",), "signed"),
        (("plan",), None),
    ],
    ids=str,
)
def test_changed_certificate_fails_even_with_a_right_digest(complete: Run, path: tuple[Any, ...], value: Any) -> None:
    changed = copy.deepcopy(complete.certificate)
    block = changed
    for key in path[:-1]:
        block = block[key]
    assert block[path[-1]] != value or type(block[path[-1]]) is not type(value)
    block[path[-1]] = value
    assert not verify_document(changed).holds
    changed["digest"] = digest(changed)
    assert not verify_document(changed).holds


@pytest.mark.parametrize("remove", ["one", "all"])
def test_certificate_without_its_run_checks(complete: Run, remove: str) -> None:
    changed = copy.deepcopy(complete.certificate)
    changed["checks"] = changed["checks"][1:] if remove == "one" else []
    changed["digest"] = digest(changed)
    assert not verify_document(changed).holds


def test_certificate_of_a_seeded_run_cannot_claim_more(
    tmp_path: Path, make_plan: MakePlan, blobs: Blobs, save_npz: Save
) -> None:
    run_plan(
        make_plan().to_json(),
        data=save_npz(*blobs()),
        output=tmp_path / "run",
        forget="1",
        execution=Execution(seed=1),
    )
    certificate = read_document(tmp_path / "run" / "certificate.json")
    assert verify_document(certificate).holds
    for level in ("certified", "conditional"):
        changed = copy.deepcopy(certificate)
        changed["claim"]["level"] = level
        changed["digest"] = digest(changed)
        assert not verify_document(changed).holds
