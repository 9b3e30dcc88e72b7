"""After a release people delete the forgotten records from their data: what is left of them may not matter any more."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file

from rdp_calc import verify_document
from rdp_calc.documents import digest, read_document
from rdp_calc.errors import DataError, GuardFailed
from rdp_calc.history import History
from rdp_calc.plan import DataSpec, Plan, plan_from_json
from unlearn_runtime.bindings import data_fingerprint, record_digests
from unlearn_runtime.data import Dataset
from unlearn_runtime.execution import Execution
from unlearn_runtime.models.builtin import build
from unlearn_runtime.network import Network
from unlearn_runtime.network_records import prepare_network_records
from unlearn_runtime.removed import blanked
from unlearn_runtime.run import run_plan

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
PlanFile = Callable[[str], Path]
Write = Callable[..., str]

LOGISTIC = "--loss logistic --l2 0.1"
SOLVED = "--tolerance 1e-8 --residual 1e-8"
LANGEVIN = f"langevin {LOGISTIC} --unlearn-steps 4 --execute-learn-steps 6 --bound shifted"
CHAINS = {
    "langevin": LANGEVIN,
    "langevin, none": f"{LANGEVIN} --preprocess none",
    "noisy-sgd": f"noisy-sgd {LOGISTIC} --batch-size 20 --unlearn-epochs 2 --execute-learn-steps 3 --bound shifted",
    "descent-to-delete": f"descent-to-delete {LOGISTIC} --unlearn-steps 9 --execute-learn-steps 9 --bound shifted",
    "gradient-norm": f"gradient-norm {LOGISTIC} --tolerance 1e-8",
}
FROM_LEARNED = {
    "newton": f"newton {LOGISTIC} {SOLVED}",
    "newton, none": f"newton {LOGISTIC} {SOLVED} --preprocess none",
    "newton, zero-out": f"newton {LOGISTIC} {SOLVED} --adjacency zero-out",
    "hessian-free": f"hessian-free --batch-size 20 --step-size 0.5 --epochs 3 {LOGISTIC}",
}
JACKKNIFE = f"jackknife {LOGISTIC} {SOLVED}"
DP_SGD = "dp-sgd --model mlp:5 --batch-size 20 --steps 5 --clip-norm 1 --step-size 0.2 --adjacency zero-out"
FINETUNE = (
    "noisy-finetune --model mlp:5 --learn epochs=3,step-size=0.5,batch-size=16 --batch-size 16 --init-clip 1"
    " --grad-clip 1 --step-size 0.1 --unlearn-steps 6"
)

#: What may stand where removed records stood.
LEFT = {
    "zeros": 0.0,
    "themselves": None,
    "ones": 1.0,
    "huge": 1e300,
}


@pytest.fixture
def write(tmp_path: Path, two_classes: str) -> Write:
    """Writes the data with other features (None: their own) or labels for some records."""

    def make(name: str, records: list[int] | int = 0, rows: Any = None, labels: Any = None) -> str:
        arrays = dict(np.load(two_classes))
        if rows is not None:
            arrays["X_train"][records] = rows
        if labels is not None:
            arrays["y_train"][records] = labels
        np.savez(tmp_path / f"{name}.npz", **arrays)
        return str(tmp_path / f"{name}.npz")

    return make


@pytest.fixture
def template(plan_file: PlanFile) -> Callable[[str], Plan]:
    return lambda text: plan_from_json(read_document(plan_file(text)))


@contextmanager
def refused(match: str, error: type[Exception] = DataError) -> Iterator[None]:
    with pytest.raises(error, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


def release(plan: Plan, data: str, start: Path, ids: str, output: Path, **options: Any) -> Path:
    more: dict[str, Any] = {"continuing": True, "execution": Execution(seed=7), **options}
    run_plan(plan.to_json(), data=data, phase="unlearn", start=start, forget=ids, output=output, **more)
    certificate = read_document(output / "certificate.json")
    assert verify_document(certificate).holds
    return output


def learn(plan: Plan, data: str, output: Path) -> Path:
    run_plan(plan.to_json(), data=data, phase="learn", output=output, execution=Execution(seed=7))
    return output


@pytest.mark.parametrize("name", CHAINS)
def test_what_is_left_of_removed_records_changes_no_bit(
    name: str, template: Callable[[str], Plan], write: Write, tmp_path: Path
) -> None:
    first = History.of(template(CHAINS[name]))
    data = write("data")
    learned = learn(first.template, data, tmp_path / "learned")
    one = first.next_plan(2)
    start = release(one, data, learned, "5,7", tmp_path / "one")
    two = first.after(one, 2).next_plan(1)
    found = set()
    for left, rows in LEFT.items():
        for label in (0, 1, None):
            changed = write("changed", [5, 7], rows, label)
            output = release(two, changed, start, "9", tmp_path / f"two {left} {label}")
            # All that does not depend on keys and times: the model, its state, its measures, the choice of precision.
            audit = read_document(output / "private" / "audit.json")
            metrics = read_document(output / "private" / "metrics.json")
            kept = [audit.get(key) for key in ("matrix_dtype", "rounding_error", "rounding_limit", "gradient_norm")]
            found.add(
                (
                    (output / "model.safetensors").read_bytes(),
                    (output / "private" / "state.safetensors").read_bytes(),
                    json.dumps([metrics["before"], metrics["after"], kept]),
                )
            )
    assert len(found) == 1


def test_a_retained_record_that_changed_is_noticed(
    template: Callable[[str], Plan], write: Write, tmp_path: Path, two_classes: str
) -> None:
    history = History.of(template(LANGEVIN))
    data = write("data")
    learned = learn(history.template, data, tmp_path / "learned")
    one = history.next_plan(2)
    start = release(one, data, learned, "5,7", tmp_path / "one")
    two = history.after(one, 2).next_plan(1)
    arrays = dict(np.load(two_classes))
    for record in [number for number in range(60) if number not in (5, 7)]:
        nudged = arrays["X_train"].copy()
        nudged[[5, 7]] = 0
        nudged[record, 1] = np.nextafter(nudged[record, 1], 1)
        labels = arrays["y_train"].copy()
        for x, y in ((nudged, labels), (arrays["X_train"], np.where(np.arange(60) == record, 1 - labels, labels))):
            np.savez(tmp_path / "other.npz", **{**arrays, "X_train": x, "y_train": y})
            with refused("other data"):
                release(two, str(tmp_path / "other.npz"), start, "9", tmp_path / "no")
    for rows, labels in (
        # Rows removed from the file instead of overwritten, and other places for the same rows.
        (np.delete(arrays["X_train"], [5, 7], axis=0), np.delete(arrays["y_train"], [5, 7])),
        (np.roll(arrays["X_train"], 1, axis=0), np.roll(arrays["y_train"], 1)),
        (arrays["X_train"].astype(np.float32), arrays["y_train"]),
    ):
        np.savez(tmp_path / "other.npz", **{**arrays, "X_train": rows, "y_train": labels})
        with refused("other data"):
            release(two, str(tmp_path / "other.npz"), start, "9", tmp_path / "no")
    # Before it is removed a record of a chain must be there.
    with refused("other data"):
        release(two, write("early", [5, 7, 9], 0.0), start, "9", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_plan_with_all_requests_goes_on_without_the_removed_records(
    plan_file: PlanFile, write: Write, tmp_path: Path, two_classes: str, rdp_calc_command: Callable[..., str]
) -> None:
    # The command line, without a ledger: learn, two requests of one plan, the records of the first deleted in between.
    plan = plan_file(f"langevin {LOGISTIC} --requests 2:4,1:3 --execute-learn-steps 6")
    blank = write("blank", [5, 7], 0.0, 1)
    for data, phase in (
        (two_classes, f"learn -o {tmp_path}/learned"),
        (two_classes, f"unlearn --start {tmp_path}/learned --forget 5,7 -o {tmp_path}/one"),
        (blank, f"unlearn --start {tmp_path}/one --forget 9 -o {tmp_path}/two"),
    ):
        rdp_calc_command(f"run {plan} --data {data} --phase {phase} -q")
    # A verifier with the private record accepts the data before the deletion and after it, and no others.
    everything = write("all gone", [5, 7, 9], 0.0)
    for folder, ids, good in (
        ("one", "5,7", (two_classes, blank)),
        ("two", "9", (two_classes, blank, everything.replace(" ", "\\ "))),
    ):
        check = f"verify {tmp_path}/{folder}/certificate.json --record {tmp_path}/{folder}/private/audit.json"
        for data in good:
            rdp_calc_command(f"{check} --forget {ids} --data {data} -q")
        for other in ([3], [8, 9] if folder == "one" else [8]):
            assert "data" in rdp_calc_command(f"{check} --forget {ids} --data {write('other', other, 0.0)} -q", 5)
    # What a run forgot itself must be there to evaluate it; what was removed before need not.
    rdp_calc_command(f"evaluate {tmp_path}/two --data {blank} -q")
    rdp_calc_command(f"evaluate {tmp_path}/two --data {two_classes} -q")
    assert "other data" in rdp_calc_command(f"evaluate {tmp_path}/one --data {blank} -q", 6)
    report = json.loads(
        rdp_calc_command(
            f"verify {tmp_path}/two/certificate.json --record {tmp_path}/two/private/audit.json --forget 9"
            f" --data {everything.replace(' ', chr(92) + ' ')} --json"
        )
    )
    (check,) = [check for check in report["checks"] if check["name"] == "data binding"]
    assert "forgotten ones were deleted" in check["detail"]


@pytest.mark.parametrize("name", FROM_LEARNED)
def test_methods_that_start_from_the_learned_state_do_without_removed_records(
    name: str, template: Callable[[str], Plan], write: Write, tmp_path: Path
) -> None:
    history = History.of(template(FROM_LEARNED[name]))
    data = write("data")
    learned = learn(history.template, data, tmp_path / "learned")
    two = history.after(history.next_plan(2), 2).next_plan(1)
    assert not np.array_equal(np.load(data)["X_train"][9], np.zeros(4))
    models = []
    for left, rows in LEFT.items():
        changed = write("changed", [5, 7], rows, None if rows is None else 1)
        output = release(two, changed, learned, "5,7,9", tmp_path / f"two {left}")
        models.append(load_file(output / "model.safetensors")["weight"])
    # With the records there sums over all records are made in another order, and are rounded otherwise.
    whole = models.pop(1)
    assert all(np.array_equal(models[0], other) for other in models)
    assert np.abs(models[0] - whole).max() <= 1e-6
    with refused("record 8 is not what"):
        release(two, write("changed", [5, 8], 0.0), learned, "5,7,9", tmp_path / "no")
    with refused("record 9 is not what"):
        release(two, write("changed", [9], 0.0), learned, "5,7", tmp_path / "no")
    with refused("record 12 is not what"):
        release(two, write("changed", 12, None, 1 - np.load(data)["y_train"][12]), learned, "5,7", tmp_path / "no")
    digests = learned / "private" / "records.npy"
    content = digests.read_bytes()
    digests.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with refused("records.npy is not what"):
        release(two, write("changed", [5, 7], 0.0), learned, "5,7,9", tmp_path / "no")
    digests.unlink()
    with refused("cannot read .*records.npy"):
        release(two, write("changed", [5, 7], 0.0), learned, "5,7,9", tmp_path / "no")


def test_the_jackknife_needs_what_it_forgets(template: Callable[[str], Plan], write: Write, tmp_path: Path) -> None:
    history = History.of(template(JACKKNIFE))
    learned = learn(history.template, write("data"), tmp_path / "learned")
    two = history.after(history.next_plan(2), 2).next_plan(1)
    with refused("record 5 was deleted .* jackknife reads all records it forgets"):
        release(two, write("changed", [5], 0.0), learned, "5,7,9", tmp_path / "no")


@pytest.mark.slow
def test_dp_sgd_looks_at_no_record_again(template: Callable[[str], Plan], write: Write, tmp_path: Path) -> None:
    history = History.of(template(f"{DP_SGD} --group-size 6"))
    learned = learn(history.template, write("data"), tmp_path / "learned")
    plan = history.after(history.next_plan(2), 2).next_plan(1)
    models = []
    for left, rows in LEFT.items():
        output = release(plan, write("changed", [5, 7], rows), learned, "5,7,9", tmp_path / left)
        models.append((output / "model.safetensors").read_bytes())
        assert read_document(output / "private" / "metrics.json")["after"]["forget_loss"]["chains"] == 1
    assert len(set(models)) == 1


def test_any_model_goes_on_without_the_removed_records(
    template: Callable[[str], Plan], write: Write, tmp_path: Path
) -> None:
    plan = template(FINETUNE)
    data = write("data")
    first = release(plan, data, learn(plan, data, tmp_path / "learned"), "7", tmp_path / "first")
    found = set()
    for left, rows in LEFT.items():
        changed = write("changed", 7, rows)
        output = release(plan, changed, first, "5", tmp_path / left, continuing=left != "ones")
        metrics = read_document(output / "private" / "metrics.json")
        assert read_document(output / "private" / "audit.json")["removed_before"] == [7]
        found.add(((output / "model.safetensors").read_bytes(), json.dumps([metrics["before"], metrics["after"]])))
    assert len(found) == 1
    # A third release from one that was made of data without the first records.
    third = release(plan, write("gone", [5, 7], 0.0), output, "11", tmp_path / "third")
    assert read_document(third / "private" / "audit.json")["removed_before"] == [5, 7]


def test_records_longer_than_the_norm_are_refused_as_long_as_they_are_there(
    template: Callable[[str], Plan], write: Write, tmp_path: Path
) -> None:
    plan = template(CHAINS["langevin, none"])
    with refused("row 7", GuardFailed):
        learn(plan, write("long", 7, 3.0), tmp_path / "learned")


def test_records_removed_before_are_not_measured_on(blobs: Callable[..., tuple[Array, Array]]) -> None:
    x, y = blobs(n=9)
    network = Network(build("mlp:3", 4, 2, None), device=torch.device("cpu"))
    plan = cast("Any", SimpleNamespace(data=DataSpec(features=4, classes=("0", "1")), method=None))
    dataset = Dataset(x_train=x, y_train=y, x_test=None, y_test=None, source="here")
    for gone, shown in ((None, [2, 5, 7]), (np.array([2, 7]), [5]), (np.array([2, 5, 7]), [])):
        split = prepare_network_records(plan, dataset, np.array([2, 5, 7]), network=network, gone=gone)
        assert split.retained is not None
        assert len(split.retained.rows) == 6
        assert (split.forgotten is None) == (not shown)
        if split.forgotten is not None:
            assert np.array_equal(split.forgotten.rows.numpy(), x[shown].astype(np.float32))


# The fingerprints themselves


def test_fingerprints_without_some_records(blobs: Callable[..., tuple[Array, Array]]) -> None:
    x, y = blobs(n=9000, d=3)
    key = b"k" * 32

    def dataset(rows: Array, labels: Array) -> Dataset:
        return Dataset(x_train=rows, y_train=labels, x_test=None, y_test=None, source="here")

    whole = dataset(x, y)
    gone = np.array([0, 4095, 4096, 8999])
    expected = data_fingerprint(key, whole, without=gone)
    other = x.copy()
    other[gone] = 7
    assert (
        data_fingerprint(key, dataset(other, np.where(np.isin(np.arange(9000), gone), 1, y)), without=gone) == expected
    )
    assert data_fingerprint(key, whole, without=gone[::-1]) == expected
    # Which records are left out, and how many there are, counts.
    zero = x.copy()
    zero[gone] = 0
    others = [
        data_fingerprint(key, whole),
        data_fingerprint(key, dataset(zero, y)),
        data_fingerprint(key, whole, without=gone[:3]),
        data_fingerprint(key, whole, without=np.array([0, 4095, 4096, 9000])),
        data_fingerprint(b"l" * 32, whole, without=gone),
        data_fingerprint(key, dataset(x[:8999], y[:8999]), without=gone),
        data_fingerprint(key, dataset(x.astype(np.float32), y), without=gone),
    ]
    assert len({expected, *others}) == len(others) + 1
    assert data_fingerprint(key, whole, without=np.array([], dtype=np.int64)) == data_fingerprint(key, whole)
    # The arrays are not touched.
    assert np.array_equal(x, blobs(n=9000, d=3)[0])


def test_digests_of_records_show_which_were_changed(blobs: Callable[..., tuple[Array, Array]]) -> None:
    x, y = blobs(n=20, d=3)
    key = b"k" * 32
    before = record_digests(key, Dataset(x_train=x, y_train=y, x_test=None, y_test=None, source="here"))
    assert len(np.unique(before, axis=0)) == 20
    rows, labels = x.copy(), y.copy()
    rows[4, 2] = np.nextafter(rows[4, 2], 9)
    labels[7] = 1 - labels[7]
    rows[[11, 13]] = rows[[13, 11]]
    after = record_digests(key, Dataset(x_train=rows, y_train=labels, x_test=None, y_test=None, source="there"))
    assert np.flatnonzero((before != after).any(axis=1)).tolist() == [4, 7, 11, 13]


def test_blanking(blobs: Callable[..., tuple[Array, Array]]) -> None:
    x, y = blobs(n=6, d=3)
    for removed in ([0, 4], [0, 1, 2, 3, 4]):
        for writeable in (True, False):
            rows, labels = x.copy(), y.copy().astype(str)
            rows.flags.writeable = labels.flags.writeable = writeable
            given = Dataset(x_train=rows, y_train=labels, x_test=x, y_test=labels, source="here")
            found = blanked(given, np.array(removed))
            left = [number for number in range(6) if number not in removed]
            assert not found.x_train[removed].any()
            assert set(found.y_train[removed]) == {str(y[left[0]])}
            assert np.array_equal(found.x_train[left], x[left])
            assert found.y_train[left].tolist() == [str(y[number]) for number in left]
            assert np.shares_memory(found.x_train, rows) == writeable
            assert found.x_test is x


def test_a_release_record_whose_digest_was_made_to_fit(
    template: Callable[[str], Plan], write: Write, tmp_path: Path
) -> None:
    # Naming more records as removed does not open the data: their places are in the fingerprint.
    history = History.of(template(LANGEVIN))
    data = write("data")
    one = history.next_plan(2)
    start = release(one, data, learn(history.template, data, tmp_path / "learned"), "5", tmp_path / "one")
    path = start / "private" / "learning.json"
    record = read_document(path) | {"removed_ids": [3, 5]}
    path.write_text(json.dumps(record | {"digest": digest(record)}))
    with refused("other data"):
        release(history.after(one, 2).next_plan(1), write("changed", 3, 0.0), start, "9", tmp_path / "no")
