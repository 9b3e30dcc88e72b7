"""Carries out a plan: learn, unlearn, or both. The plan is the only source of parameters.

Nothing is written until everything is done; a run that is refused, fails or is interrupted leaves no trace but its
checkpoint, where one was asked for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rdp_calc.errors import InvalidInput
from rdp_calc.methods.hessian_free import HessianFree
from rdp_calc.training import GLM_METHODS, SECOND_ORDER
from unlearn_runtime import hessian_free_job, newton_job
from unlearn_runtime.admission import Admitted, admit
from unlearn_runtime.bindings import (
    data_fingerprint,
    file_fingerprint,
    forget_fingerprint,
    module_fingerprint,
    state_fingerprint,
)
from unlearn_runtime.checkpoint import Checkpoint, remove_finished
from unlearn_runtime.distributed import World
from unlearn_runtime.execution import Execution, check_tails
from unlearn_runtime.glm_job import GlmJob
from unlearn_runtime.job import Job, State
from unlearn_runtime.journal import Journal
from unlearn_runtime.keys import SigningKey
from unlearn_runtime.network_job import NetworkJob
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.release import Release
from unlearn_runtime.stepper import Progress, Stepper

RUN_SCHEMA = "rdp-calc/run/1"

#: How torch says that memory ran out.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


def run_plan(
    document: dict[str, Any],
    *,
    data: str,
    output: Path,
    phase: str = "all",
    forget: str | None = None,
    start: Path | None = None,
    execution: Execution | None = None,
    model: str | None = None,
    center: Path | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
    key: SigningKey | None = None,
    continuing: bool = False,
    removed: Sequence[int] | None = None,
    begin: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Carry out a plan document and write the folder ``output``; returns a summary (schema rdp-calc/run/1).

    ``model`` names the code of a model the plan calls external, ``center`` the public weights that a plan takes norms
    around. Started by torchrun, every process calls this with the same arguments; the first one writes. ``announce`` is
    told beforehand of what takes much room or time. ``key`` signs the certificate before the folder appears; processes
    other than the first do not need it. ``continuing``: one release of a history whose requests come over time. The
    start may be of another plan, where this one describes all that was carried out and has one request more
    (``unlearn_runtime.continuing``), and the state is kept for the next release. ``removed``: records that its earlier
    releases removed, which a state must know of and which any other model leaves out all the same. ``begin`` is called
    once all is checked, before anything is computed; what it raises ends the run.

    Raises DataError (plan digest, data, ids, learning record), GuardFailed (what the runtime cannot enforce),
    InvalidInput (arguments that do not go together); one error lists all that is wrong. Nothing is left behind.
    """
    execution = execution or Execution()
    if key is not None and phase == "learn":
        raise InvalidInput("a key signs the certificate of a release; --phase learn writes none.")
    if execution.checkpoint is not None:
        remove_finished(execution.checkpoint, output)
    admitted = admit(
        document,
        data=data,
        output=output,
        phase=phase,
        forget=forget,
        start=start,
        execution=execution,
        model=model,
        center=center,
        continuing=continuing,
        removed=removed,
    )
    with ExitStack() as opened, torch.no_grad(), memory_named(execution):
        world = World.join(admitted.device)
        opened.callback(world.leave)
        if world.size > 1 and admitted.plan.method.NAME in (*GLM_METHODS, *SECOND_ORDER):
            raise InvalidInput(f"{admitted.plan.method.NAME} runs in one process; start it without torchrun.")
        source = GaussianSource(
            world.device,
            seed=execution.seed,
            secure=execution.secure_noise,
            entropy=world.entropy if execution.seed is None else None,
        )
        if world.entropy is not None:
            # Files local to a machine may be out of date: every process must run on the same inputs.
            mine = _binding(admitted, execution, world.entropy, phase=phase, model=model, source=source, world=world)
            world.check_same(json.dumps(mine, sort_keys=True).encode())
        stepper = _stepper(admitted, execution, source, world, opened, phase=phase, progress=progress, model=model)
        job = build_job(admitted, execution, source, stepper, world, announce or _silent)
        earlier = 0.0 if admitted.start is None else admitted.start.missing_mass
        check_tails(admitted.plan, source, job.size, earlier=earlier)
        if phase == "learn" and world.first:
            job.check_room(output.absolute().parent)
        release = Release(
            admitted=admitted,
            job=job,
            execution=execution,
            source=source,
            data=data,
            output=output,
            key=key,
            checkpoint=stepper.checkpoint,
        )
        if begin is not None and world.first:
            begin()
        return _carry_out(phase, release, stepper, world)


def _carry_out(phase: str, release: Release, stepper: Stepper, world: World) -> dict[str, Any]:
    job, start, retrain = release.job, release.admitted.start, release.execution.retrain
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], State]) -> State:
        begun = time.perf_counter()
        state = work()
        seconds[name] = time.perf_counter() - begun
        return state

    after = retrained = None
    before = timed("learn", job.learn) if start is None else job.start_from(start.tensors, state=bool(start.record))
    if phase != "learn":
        after = timed("unlearn", lambda: job.unlearn(before))
    if after is not None and retrain is not None:
        retrained = timed("retrain", lambda: job.retrain(before, retrain))
    states = {"before": before, "after": after, "retrained": retrained}
    metrics: dict[str, Any] = {name: None if state is None else job.metrics(state) for name, state in states.items()}
    metrics |= {"steps_per_second": stepper.steps_per_second, "seconds": seconds}
    level, earlier = None, [] if start is None else start.releases
    if world.first and after is None:
        release.learned(before, metrics)
    elif world.first and after is not None:
        level = release.unlearned(before, after, retrained, metrics)["claim"]["level"]
    return {**_summary(phase, release, world, metrics, level), "earlier_releases": len(earlier)}


def _silent(text: str) -> None:
    pass


def build_job(
    admitted: Admitted,
    execution: Execution,
    source: GaussianSource,
    stepper: Stepper,
    world: World,
    announce: Callable[[str], None],
) -> Job:
    """The job of an admitted run."""
    shared: dict[str, Any] = {"execution": execution, "source": source, "stepper": stepper}
    if admitted.plan.method.NAME in SECOND_ORDER:
        make = hessian_free_job.make if isinstance(admitted.plan.method, HessianFree) else newton_job.make
        return make(
            admitted.plan,
            admitted.dataset,
            ids=admitted.ids,
            gone=admitted.gone,
            blank=admitted.blank,
            module=admitted.module,
            training=admitted.training,
            device=world.device,
            announce=announce,
            start_folder=None if admitted.start is None else admitted.start.folder,
            **shared,
        )
    if admitted.module is None:
        return GlmJob(
            admitted.plan,
            admitted.dataset,
            ids=admitted.ids,
            gone=admitted.gone,
            request=admitted.request,
            earlier_rounding=0.0 if admitted.start is None else admitted.start.rounding_error,
            device=world.device,
            **shared,
        )
    # What earlier runs forgot stays out of every batch.
    ids = admitted.ids if admitted.ids is None else np.union1d(admitted.ids, admitted.gone)
    return NetworkJob(
        admitted.plan,
        admitted.dataset,
        ids=ids,
        gone=np.union1d(admitted.gone, admitted.blank),
        module=admitted.module,
        training=admitted.training,
        device=admitted.device,
        center=admitted.center,
        world=world,
        **shared,
    )


def _stepper(
    admitted: Admitted,
    execution: Execution,
    source: GaussianSource,
    world: World,
    opened: ExitStack,
    *,
    phase: str,
    progress: Progress | None,
    model: str | None,
) -> Stepper:
    """The loops' driver with log and checkpoint. A checkpoint meets only the run that wrote it."""
    journal = checkpoint = None
    if execution.log is not None and world.first:
        journal = opened.enter_context(Journal(execution.log, execution.tensorboard))
        journal.write("run started", plan=admitted.document["digest"], phase=phase)
    if execution.checkpoint is not None:
        checkpoint = Checkpoint(
            execution.checkpoint,
            lambda key: _binding(admitted, execution, key, phase=phase, model=model, source=source, world=world),
            execution.checkpoint_seconds,
        )
        # No process may save before all have read.
        world.barrier()
        if world.first:
            opened.push(lambda kind, *_: checkpoint.remove() if kind is None else None)
    return Stepper(
        source,
        progress=progress if world.first else None,
        journal=journal,
        checkpoint=checkpoint,
        saves=world.first,
    )


def _binding(
    admitted: Admitted,
    execution: Execution,
    key: bytes,
    *,
    phase: str,
    model: str | None,
    source: GaussianSource,
    world: World,
) -> dict[str, Any]:
    """Everything that decides the numbers of a run; what comes from data is keyed."""
    reference = None if model is None else Path(model)
    return {
        "plan": admitted.document["digest"],
        "phase": phase,
        "data": data_fingerprint(key, admitted.dataset),
        "forget set": None if admitted.ids is None else forget_fingerprint(key, admitted.ids),
        "start": None if admitted.start is None else state_fingerprint(key, admitted.start.tensors),
        "center": None if admitted.center is None else state_fingerprint(key, admitted.center),
        "request": admitted.request,
        "removed before": None if not len(admitted.gone) else forget_fingerprint(key, admitted.gone),
        "model": model,
        "module": None if admitted.module is None else module_fingerprint(key, admitted.module, model),
        "model file": None if reference is None or not reference.is_file() else file_fingerprint(key, reference),
        "trials": execution.chains,
        "device": admitted.device.type,
        "dtype": execution.dtype,
        "retrain": execution.retrain,
        "published clip": execution.published_clip,
        "seed": execution.seed,
        "random source": source.description,
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _summary(phase: str, release: Release, world: World, metrics: dict[str, Any], level: str | None) -> dict[str, Any]:
    admitted = release.admitted
    return {
        "schema": RUN_SCHEMA,
        "phase": phase,
        "process": world.rank,
        "output": str(release.output),
        "method": admitted.plan.method.NAME,
        "plan_digest": admitted.document["digest"],
        "certificate_level": level,
        "matrix_dtype": release.job.audit()["matrix_dtype"],
        "device": admitted.device.type,
        "metrics": metrics,
    }


@contextmanager
def memory_named(execution: Execution) -> Iterator[None]:
    """Turn torch's way of saying that memory ran out into the option that asked for it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error).lower() for text in _NO_MEMORY):
            raise
        advice = "use fewer" if execution.chains > 1 else "use smaller batches or a machine with more"
        raise InvalidInput(f"trials {execution.chains} need more memory than there is; {advice}.") from None
