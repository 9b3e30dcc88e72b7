"""Many independent unlearned models and as many references: run anew from a plan, or taken from the folder of a run.

U is what a run publishes. R is the reference that its certificate names: for methods whose guarantee includes learning
the same pipeline on the retained records; for methods that take any model the same procedure from another model, one
trained on the retained records where the plan holds a training, otherwise the opposite of the model that is unlearned
(their bounds hold for every pair of models to start from, so any pair may be audited). Those start from one fixed model
each, so that only the randomness that certifies is drawn again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file

from rdp_calc import documents
from rdp_calc.certificate import CERTIFICATE_SCHEMA
from rdp_calc.documents import read_document
from rdp_calc.errors import DataError, InvalidInput, VerificationFailed
from rdp_calc.regular_files import check_folder, check_regular
from rdp_calc.training import ANY_MODEL
from rdp_calc.verify import verify_document
from unlearn_runtime import run
from unlearn_runtime.admission import Admitted, admit
from unlearn_runtime.bindings import data_fingerprint, file_sha256, left_out
from unlearn_runtime.distributed import World
from unlearn_runtime.execution import Execution, check_tails, noisy_steps
from unlearn_runtime.job import Job, State
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.release import CHAINS
from unlearn_runtime.stepper import Progress, Stepper
from unlearn_runtime.tensor_files import DAMAGED

Array = npt.NDArray[np.float64]

#: Populations drawn where no number is asked for: as many as take some seconds, within these limits.
MOST_TRIALS, FEWEST_TRIALS = 4000, 100

#: Matrix-product operations (GLMs) and seconds (networks) that a default number of trials may take, roughly.
_OPERATIONS = 1e11
_SECONDS = 8.0

#: How far the grid of released numbers moves them, relative to the noise.
_GRID = 2.0**-20

#: Methods whose chains share slots drawn for the run: a reference drawn later would have others.
_SLOTTED = ("noisy-sgd", "hessian-free")

_OPPOSITE = "the same procedure from the opposite of the start model; the bound holds for every pair of start models"
_RETAINED = "the same procedure from a model trained on the retained records alone"
_RETRAINED = "the same pipeline run from the start on the retained records"


def _silent(text: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Populations:
    """Models (R, p), one a row, numbers in the order of the model file. ``document`` is the plan.

    ``directions`` (name, (p,)) are known to separate the models that noise was added to; ``source`` and ``reference``
    say where U and R are from.
    """

    document: dict[str, Any]
    claim: dict[str, Any]
    unlearned: Array
    retrained: Array
    source: str
    reference: str
    directions: list[tuple[str, Array]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How populations are run. ``trials`` None: as many as take some seconds. ``seed`` repeats an audit; nothing that
    is audited is released, so it costs nothing.
    """

    trials: int | None = None
    device: str = "auto"
    dtype: str | None = None
    seed: int | None = None
    start: Path | None = None
    model: str | None = None
    center: Path | None = None
    progress: Progress | None = None
    announce: Callable[[str], None] = _silent


def of_plan(document: dict[str, Any], *, data: str, forget: str, settings: Settings) -> Populations:
    """Both populations run anew, by the runtime itself. Raises what a run of the plan raises."""
    bench = _Bench(document, data=data, forget=forget, settings=settings)
    trials = bench.trials
    settings.announce(f"running 2 x {trials} independent models")
    with torch.no_grad(), run.memory_named(bench.execution):
        job = bench.job()
        directions = []
        if bench.any_model:
            start = bench.start(job)
            other, reference = bench.other_start(job, start)
            unlearned = job.unlearn(_tiled(start, trials))
            retrained = job.unlearn(_tiled(other, trials), name="reference")
            directions.append(("difference of the start models", _difference(job, start, other)))
        else:
            start, reference = bench.start(job), _RETRAINED
            unlearned, retrained = job.unlearn(start), job.retrain(start, "fresh")
        return Populations(
            document=document,
            claim=_claim(document),
            unlearned=_numbers(job, unlearned),
            retrained=_numbers(job, retrained),
            source=f"{trials} runs of the plan",
            reference=reference,
            directions=directions,
        )


def of_folder(folder: Path, *, data: str | None, forget: str | None, settings: Settings) -> Populations:
    """The populations of a run: its own models where it kept several and no number of trials is asked for, otherwise
    new ones of its plan on its data and ids. ``data`` and ``forget`` replace what its private record names.

    Raises DataError for a folder that is not that of a release, or whose data are other ones; VerificationFailed for
    models that are not those of the release.
    """
    certificate = _certificate(folder)
    plan, record = documents.field(certificate, "plan", "object"), read_document(folder / "private" / "audit.json")
    if documents.field(record, "certificate_digest", "text") != certificate["digest"]:
        raise DataError(f"{folder}/private/audit.json belongs to another certificate.")
    asked = {"--data": data, "--forget": forget}
    data = data or documents.field(record, "data_source", "text")
    ids = [documents.field({"id": i}, "id", "integer") for i in documents.field(record, "forgotten_ids", "list")]
    forget = forget or ",".join(map(str, ids))
    again = documents.field(record, "removed_before", "list", optional=True)
    kept = _kept(folder)
    if settings.trials is not None or kept is None or len(kept["after"]) < 2:
        if again:
            raise InvalidInput(
                f"{folder} answers a later request, whose run cannot be repeated from its folder; run that request with"
                " --trials R --retrain and audit its folder without --trials."
            )
        if kept is None and settings.trials is None:
            settings.announce(f"{folder} holds one model, so the run is repeated")
        found = of_plan(plan, data=data, forget=forget, settings=_started(plan, folder, settings))
        return replace(found, claim=_claim(certificate["plan"], certificate))
    _check_released(folder, certificate, kept["after"])
    shared: dict[str, Any] = {"document": plan, "claim": _claim(plan, certificate), "unlearned": kept["after"]}
    source = f"the {len(kept['after'])} models that {folder} kept"
    complete = plan["method"] not in ANY_MODEL and _reference_kept(plan, record, kept)
    for name in asked if complete else ["--forget"]:
        if asked[name] is not None:
            raise InvalidInput(f"{name} has no say in the models that {folder} kept; run others with --trials N.")
    if complete:
        return Populations(**shared, retrained=kept["retrained"], source=source, reference=_RETRAINED)
    if plan["method"] in _SLOTTED or again:
        raise InvalidInput(f"{folder} has no retrained models to compare with; run again with --trials R --retrain.")
    return _with_new_reference(folder, certificate, record, kept, data, forget, settings, shared, source)


def _with_new_reference(
    folder: Path,
    certificate: dict[str, Any],
    record: dict[str, Any],
    kept: dict[str, Array],
    data: str,
    forget: str,
    settings: Settings,
    shared: dict[str, Any],
    source: str,
) -> Populations:
    trials = len(kept["after"])
    settings.announce(f"running {trials} independent references")
    bench = _Bench(
        shared["document"],
        data=data,
        forget=forget,
        settings=replace(_started(shared["document"], folder, settings), trials=trials),
    )
    key = bytes.fromhex(documents.field(record, "key", "text"))
    found = bench.admitted.dataset
    without = left_out(record, len(found.y_train))
    if data_fingerprint(key, found, without=without) != documents.field(certificate, "fingerprints.data", "text"):
        raise DataError(f"{data} is not the data that {folder} was made from; give them with --data.")
    directions = []
    with torch.no_grad(), run.memory_named(bench.execution):
        job = bench.job()
        if bench.any_model:
            start = bench.start(job)
            other, reference = bench.other_start(job, start)
            retrained = job.unlearn(_tiled(other, trials), name="reference")
            directions.append(("difference of the start models", _difference(job, start, other)))
        else:
            retrained, reference = job.retrain(None, "fresh"), _RETRAINED
        numbers = _numbers(job, retrained)
    if numbers.shape[1] != shared["unlearned"].shape[1]:
        raise DataError(f"{folder}/{CHAINS} has models of {shared['unlearned'].shape[1]} numbers, not of the plan.")
    return Populations(**shared, retrained=numbers, source=source, reference=reference, directions=directions)


class _Bench:
    """What a run of the plan needs, checked as a run checks it; nothing is written."""

    def __init__(self, document: dict[str, Any], *, data: str, forget: str, settings: Settings) -> None:
        self.settings = settings
        self.execution = Execution(
            chains=settings.trials or 1, device=settings.device, dtype=settings.dtype, seed=settings.seed
        )
        with tempfile.TemporaryDirectory() as scratch:
            self.admitted: Admitted = admit(
                document,
                data=data,
                # Admission asks for a free name; no model is written.
                output=Path(scratch) / "model",
                phase="all" if settings.start is None else "unlearn",
                forget=forget,
                start=settings.start,
                execution=self.execution,
                model=settings.model,
                center=settings.center,
            )
        self.any_model = self.admitted.plan.method.NAME in ANY_MODEL
        self.trials = settings.trials or self._default_trials()
        if self.trials < 2:
            raise InvalidInput(f"an audit needs at least 2 trials, and tells something from a hundred: {self.trials}.")
        # Methods that take any model learn once; their chains are copies of that one model.
        self.execution = replace(self.execution, chains=1 if self.any_model else self.trials)

    def job(self) -> Job:
        device, settings = self.admitted.device, self.settings
        source = GaussianSource(device, seed=settings.seed)
        stepper = Stepper(source, progress=settings.progress if self.admitted.module is None else None)
        world = World(device=device)
        job = run.build_job(self.admitted, self.execution, source, stepper, world, settings.announce)
        check_tails(self.admitted.plan, source, job.size)
        return job

    def start(self, job: Job) -> State:
        """What the request is carried out on."""
        start = self.admitted.start
        return job.learn() if start is None else job.start_from(start.tensors, state=bool(start.record))

    def other_start(self, job: Job, start: State) -> tuple[State, str]:
        """Another model that the reference may start from, and what it is."""
        training = self.admitted.plan.training
        if training is not None and training.learn is not None:
            return job.learn(retained=True), _RETAINED
        return {**start, "weights": -start["weights"]}, _OPPOSITE

    def _default_trials(self) -> int:
        admitted, steps = self.admitted, noisy_steps(self.admitted.plan)
        if admitted.module is None:
            n, d = admitted.dataset.x_train.shape
            classes = len(admitted.plan.data.classes or ())
            outputs = classes if classes > 2 else 1
            # A minibatch step of noisy-sgd looks at its batch only.
            steps = -(-steps // getattr(admitted.plan.method, "batches", 1))
            most = _OPERATIONS / (8.0 * steps * n * d * outputs)
        else:
            size = sum(p.numel() for p in admitted.module.parameters())
            private = admitted.plan.method.NAME == "dp-sgd"
            batch = getattr(admitted.plan.method, "batch_size", None) or admitted.training.batch_size
            most = _SECONDS / (steps * ((8e-3 if private else 1e-3) + 2e-9 * size * batch))
        trials = int(min(max(most, FEWEST_TRIALS), MOST_TRIALS))
        start = admitted.start
        if start is None or not start.record:
            return trials
        learned = documents.field(start.record, "chains", "integer")
        if learned < 2:
            raise InvalidInput(
                f"{self.settings.start} was learned with {learned} chain; learn with --trials {trials} to audit what"
                " starts from it, or leave out --start."
            )
        return min(trials, int(learned))


def _started(plan: dict[str, Any], folder: Path, settings: Settings) -> Settings:
    """A plan without training starts from the model that the run unlearned."""
    training = plan.get("training") or {}
    if plan["method"] not in ANY_MODEL or settings.start is not None or training.get("learn") is not None:
        return settings
    return replace(settings, start=folder / "private" / "before.safetensors")


def _tiled(state: State, trials: int) -> State:
    return {
        name: tensor[:1].repeat(trials, 1) if name == "weights" else tensor
        for name, tensor in state.items()
        if name != "released"
    }


def _difference(job: Job, start: State, other: State) -> Array:
    one, two = ({k: v for k, v in state.items() if k != "released"} for state in (start, other))
    found: Array = _numbers(job, one)[0] - _numbers(job, two)[0]
    return found


def _numbers(job: Job, state: State) -> Array:
    return np.ascontiguousarray(job.chains(state).numpy(), dtype=np.float64)


def _claim(plan: dict[str, Any], certificate: dict[str, Any] | None = None) -> dict[str, Any]:
    """epsilon, delta, mu (None where the bound is not Gaussian) and level, as claimed."""
    if certificate is not None:
        names = {"epsilon": "number", "delta": "number", "mu": "number", "level": "text"}
        return {
            name: documents.field(certificate, f"claim.{name}", kind, optional=name == "mu")  # type: ignore[arg-type]
            for name, kind in names.items()
        }
    return {
        "epsilon": documents.field(plan, "target.epsilon", "number"),
        "delta": documents.field(plan, "target.delta", "number"),
        "mu": documents.field(plan, "verification.mu", "number", optional=True),
        "level": documents.field(plan, "certificate_level", "text"),
    }


def _certificate(folder: Path) -> dict[str, Any]:
    path = folder / "certificate.json"
    if (folder / "baseline.json").is_file():
        raise DataError(f"{folder} holds a baseline, which claims nothing that an audit could refute.")
    if not path.is_file():
        raise DataError(f"{folder} has no certificate.json: audit takes a plan, or the folder of a run that unlearned.")
    check_folder(folder)
    certificate = read_document(path)
    if certificate.get("schema") != CERTIFICATE_SCHEMA:
        raise DataError(f"{path} is not a certificate of this program.")
    if certificate.get("digest") != documents.digest(certificate):
        raise DataError(f"certificate digest is wrong: {path} was changed after it was written.")
    # Whoever changes a claim can write the digest that goes with it; the numbers must follow from the plan.
    for check in verify_document(certificate).checks:
        if not check.passed:
            raise DataError(f"{path} does not verify: check {check.name}: {check.detail}")
    return certificate


def _kept(folder: Path) -> dict[str, Array] | None:
    """The models of all chains, where the run kept them."""
    path = folder / CHAINS
    if not path.exists():
        return None
    try:
        check_regular(path)
        tensors: dict[str, Array] = load_file(path)
    except (OSError, *DAMAGED) as error:
        raise DataError(f"cannot read {path}: {error}.") from None
    if "after" not in tensors:
        raise DataError(f"{path} has no tensor after.")
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or tensor.dtype != np.float64 or tensor.shape[1] != tensors["after"].shape[1]:
            raise DataError(f"{path}: {name} must be float64 (models, numbers), got {tensor.dtype} {tensor.shape}.")
        if not bool(np.isfinite(tensor).all()):
            raise DataError(f"{path}: {name} holds numbers that are not finite.")
    return tensors


def _check_released(folder: Path, certificate: dict[str, Any], after: Array) -> None:
    """Raise VerificationFailed unless chain 0 is the released model."""
    path = folder / "model.safetensors"
    if file_sha256(path) != documents.field(certificate, "model_sha256", "text"):
        raise VerificationFailed(f"{path} is not the model that {folder}/certificate.json names.")
    try:
        tensors = list(load_file(path).values())
    except (OSError, *DAMAGED) as error:
        raise DataError(f"cannot read {path}: {error}.") from None
    rounding = max(float(np.finfo(tensor.dtype).eps) for tensor in tensors)
    noise = documents.field(certificate, "executed.noise_std", "number")
    allowed = max(rounding, _GRID) * (float(np.abs(after[0]).max()) + noise)
    # Tensors of a network lie in the file in another order, and with frozen ones among them.
    numbers, row = np.sort(np.concatenate([tensor.astype(np.float64).ravel() for tensor in tensors])), np.sort(after[0])
    if len(numbers) == len(row):
        apart = np.abs(numbers - row)
    else:
        place = np.searchsorted(numbers, row).clip(1, len(numbers) - 1)
        apart = np.minimum(np.abs(numbers[place - 1] - row), np.abs(numbers[place] - row))
    if len(numbers) < len(row) or bool((apart > allowed).any()):
        raise VerificationFailed(
            f"the first model in {folder}/{CHAINS} is not the released one: it was changed after the run."
        )


def _reference_kept(plan: dict[str, Any], record: dict[str, Any], kept: dict[str, Array]) -> bool:
    """Whether "retrained" is the reference of the certificate: the same pipeline from the plan's initial point."""
    mode = record.get("retrain", "fresh")
    same = mode == "fresh" or (mode == "zeros" and plan["parameters"].get("init") == "zeros")
    return same and len(kept.get("retrained", ())) >= 2
