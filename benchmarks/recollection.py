"""Vectors of all records at once, beside one loop over records, in one run; then the time to forget one record.

    python benchmarks/recollection.py [--records 1000] [--epochs 15] [--batch 32] [--threads 2] [--repeats 3]
                                      [--device cpu]

Softmax regression with 785 x 10 = 7850 numbers (28 x 28 pixels and an intercept, ten classes). The loops: for every
step and record one Hessian-vector product, (a) by differentiating the batch gradient again, its graph built once a
step, as the public code of arXiv:2404.01712 does, with or without the gradients of the records of the batch, that it
takes and clips one by one, (b) in closed form, two small matrix products each way, (c) by differentiating the batch
gradient again, one record after another through all steps, so that records share no graph. They are timed on a few
steps and records, and scaled up to all. What is compared takes turns, and medians are printed, of wall-clock time and
of processor time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from unlearn_runtime.algorithms.hessian_free import compute_vectors, vectors
from unlearn_runtime.algorithms.hessian_free_network import NetworkTraining, NetworkVectors
from unlearn_runtime.algorithms.slotted_training import Schedule, Slots, Trajectory, train
from unlearn_runtime.glm_losses import Softmax
from unlearn_runtime.models.builtin import build, initialise
from unlearn_runtime.network import Network
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.recollection import Memory
from unlearn_runtime.vectors import VectorWriter

FEATURES, CLASSES, L2, STEP_SIZE = 785, 10, 0.01, 0.5

#: What of the loops is timed.
STEPS_TIMED, RECORDS_TIMED = 4, 100


def problem(n: int, epochs: int, batch: int, device: torch.device) -> tuple[Slots, Softmax, Schedule]:
    draws = np.random.default_rng(0)
    labels = draws.integers(0, CLASSES, size=n)
    rows = np.abs(draws.normal(size=(n, FEATURES)) + draws.normal(size=(CLASSES, FEATURES))[labels])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[:, -1] = 1.0
    slots = slots_of(n, batch)
    model = Softmax.from_arrays(rows[slots.order], labels[slots.order], classes=CLASSES, device=device)
    assert isinstance(model, Softmax)
    return slots, model, Schedule(steps=epochs * slots.batches, step_size=STEP_SIZE, l2=L2)


def slots_of(n: int, batch: int) -> Slots:
    batches = -(-n // batch)
    return Slots.of(np.random.default_rng(1).permutation(np.arange(n) * batches // n), batches)


def autograd_loop(model: Softmax, slots: Slots) -> tuple[float, float]:
    """Seconds a step and record of the loop by double differentiation, float32: of its Hessian-vector products alone,
    and with the clipped gradients of the records in the batch.
    """
    net = torch.nn.Linear(FEATURES - 1, CLASSES).to(model.rows.device)
    parameters = list(net.parameters())
    carried = [[torch.zeros_like(p) for p in parameters] for _ in range(RECORDS_TIMED)]
    rows = model.rows[:, :-1].float()

    def objective(part: slice) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(net(rows[part]), model.labels[part])
        for p in parameters:
            loss = loss + L2 / 2 * (p * p).sum()
        return loss

    products = gradients = 0.0
    for k in range(STEPS_TIMED):
        begun, size = time.perf_counter(), slots.bounds[k + 1] - slots.bounds[k]
        for i in range(slots.bounds[k], slots.bounds[k + 1]):
            net.zero_grad()
            objective(slice(i, i + 1)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1e6)
            for j, p in enumerate(parameters):
                carried[i % RECORDS_TIMED][j] += p.grad * (STEP_SIZE / size)
        slopes = torch.autograd.grad(objective(slice(*slots.bounds[k : k + 2])), parameters, create_graph=True)
        synchronise(model)
        middle = time.perf_counter()
        for vector in carried:
            net.zero_grad()
            found = torch.autograd.grad(slopes, parameters, vector, retain_graph=True)
            for j, product in enumerate(found):
                vector[j] = vector[j] - STEP_SIZE * product
        synchronise(model)
        gradients += middle - begun
        products += time.perf_counter() - middle
    per_product = products / (STEPS_TIMED * RECORDS_TIMED)
    return per_product, per_product + gradients / (STEPS_TIMED * len(model.rows))


def closed_form_loop(run: Trajectory) -> float:
    """Seconds a step and record of the loop in closed form, float32."""
    model, slots = run.model, run.slots
    rows = model.rows.float()
    carried = [rows.new_zeros(FEATURES, CLASSES) for _ in range(RECORDS_TIMED)]
    begun = time.perf_counter()
    for k in range(STEPS_TIMED):
        part = slice(slots.bounds[k], slots.bounds[k + 1])
        batch, p = rows[part], torch.softmax(run.products[0, part], dim=1).float()
        for vector in carried:
            moved = p * (batch @ vector)
            moved -= p * moved.sum(dim=1, keepdim=True)
            vector.mul_(1 - STEP_SIZE * L2).addmm_(batch.t(), moved, alpha=-STEP_SIZE / len(batch))
    synchronise(model)
    return (time.perf_counter() - begun) / (STEPS_TIMED * RECORDS_TIMED)


def record_loop(run: Trajectory) -> float:
    """Seconds a step and record of the loop over records outside and steps inside, float32, gradients of records left
    out: the batch gradient at the step's weights, differentiated again along the vector.
    """
    model, slots = run.model, run.slots
    rows, records = model.rows.float(), RECORDS_TIMED // 10
    weights = run.weights.float().requires_grad_()
    begun = time.perf_counter()
    for _ in range(records):
        vector = torch.zeros_like(weights)
        for k in range(STEPS_TIMED):
            part = slice(*slots.bounds[k : k + 2])
            loss = torch.nn.functional.cross_entropy(rows[part] @ weights, model.labels[part])
            loss = loss + L2 / 2 * (weights * weights).sum()
            (slope,) = torch.autograd.grad(loss, weights, create_graph=True)
            (product,) = torch.autograd.grad(slope, weights, vector)
            vector = vector - STEP_SIZE * product
    synchronise(model)
    return (time.perf_counter() - begun) / (STEPS_TIMED * records)


def ours(run: Trajectory, dtype: torch.dtype) -> float:
    """Seconds for the vectors of all records."""
    begun = time.perf_counter()
    vectors(run, np.arange(len(run.model.rows)), dtype=dtype)
    synchronise(run.model)
    return time.perf_counter() - begun


def synchronise(model: Softmax) -> None:
    if model.rows.is_cuda:
        torch.cuda.synchronize()


def forgetting(run: Trajectory, folder: Path) -> list[tuple[str, int, float, float]]:
    """dtype, bytes on disk, error of storing relative to the longest vector, median seconds to forget one record."""
    n, size = len(run.model.rows), run.model.features * run.model.outputs
    found = []
    for dtype in ("float16", "float32", "float64"):
        writer = VectorWriter(folder / f"{dtype}.npy", n, size, dtype=dtype)
        compute_vectors(run, np.arange(n), writer.write, dtype=torch.float64)
        memory, times = Memory(run.weights.t().reshape(-1).cpu().numpy(), writer.finish()), []
        for record in range(0, n, max(1, n // 100)):
            begun = time.perf_counter()
            memory.forget(record)
            _ = memory.weights
            times.append(time.perf_counter() - begun)
        error = writer.largest_error / writer.largest_norm
        found.append((dtype, writer.bytes_on_disk, error, statistics.median(times)))
    return found


def network(records: int, device: torch.device) -> tuple[int, float, float]:
    """Numbers of an mlp:64, and processor seconds a step and record: ours, gradients of records included, and the
    products alone, one record after another.
    """
    draws = np.random.default_rng(0)
    rows = torch.from_numpy(draws.normal(size=(64, FEATURES))).float().to(device)
    labels = torch.from_numpy(draws.integers(0, CLASSES, size=64)).to(device)
    net = Network(build("mlp:64", FEATURES, CLASSES), device=device)
    initialise(net.module, GaussianSource(device, seed=0))
    slots, schedule = slots_of(64, 64), Schedule(steps=STEPS_TIMED + 1, step_size=0.1, l2=L2)
    start = net.weights()
    final = start.clone()
    run = NetworkTraining(net, rows, labels, slots, schedule, final)
    for t in range(schedule.steps):
        run.step(t)
    second = NetworkVectors(NetworkTraining(net, rows, labels, slots, schedule, start), final)
    begun = time.process_time()
    second.compute(np.arange(min(64, records)), lambda ids, part: None)
    own = (time.process_time() - begun) / (schedule.steps * min(64, records))
    parameters = list(net.module.parameters())
    carried = [[torch.ones_like(p) for p in parameters] for _ in range(16)]
    begun = time.process_time()
    with torch.enable_grad():
        loss = net.losses(net.outputs(rows), labels).mean()
        slopes = torch.autograd.grad(loss, parameters, create_graph=True)
        for vector in carried:
            products = torch.autograd.grad(slopes, parameters, vector, retain_graph=True)
            for j, product in enumerate(products):
                vector[j] = vector[j] - 0.1 * (product + L2 * vector[j])
    return net.size, own, (time.process_time() - begun) / len(carried)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("records", 1000), ("epochs", 15), ("batch", 32), ("threads", 2), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    slots, model, schedule = problem(given.records, given.epochs, given.batch, device)
    run = train(model, slots, schedule)
    whole = schedule.steps * given.records
    many, one = given.threads, 1
    measured: dict[str, tuple[int, Callable[[], float]]] = {
        f"all at once, float32, {many} threads": (many, lambda: ours(run, torch.float32)),
        "all at once, float32, 1 thread": (one, lambda: ours(run, torch.float32)),
        f"all at once, float64, {many} threads": (many, lambda: ours(run, torch.float64)),
        "(a) double differentiation, products alone, 1 thread": (one, lambda: whole * autograd_loop(model, slots)[0]),
        "(a) with gradients of records, 1 thread": (one, lambda: whole * autograd_loop(model, slots)[1]),
        f"(a) with gradients of records, {many} threads": (many, lambda: whole * autograd_loop(model, slots)[1]),
        "(b) closed form, products alone, 1 thread": (one, lambda: whole * closed_form_loop(run)),
        "(c) record after record, products alone, 1 thread": (one, lambda: whole * record_loop(run)),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in measured}
    for repeat in range(given.repeats + 1):
        for name, (threads, measure) in measured.items():
            torch.set_num_threads(threads)
            with torch.enable_grad() if name[:3] in ("(a)", "(c)") else torch.no_grad():
                before, begun = time.process_time(), time.perf_counter()
                value = measure()
                spent, passed = time.process_time() - before, time.perf_counter() - begun
            if repeat:
                times[name].append((value, value * spent / passed))
    torch.set_num_threads(given.threads)
    medians = {name: tuple(map(statistics.median, zip(*values, strict=True))) for name, values in times.items()}
    fastest = next(iter(medians.values()))
    print(
        f"n = {given.records}, {FEATURES * CLASSES} numbers, {given.epochs} epochs of {slots.batches} batches,"
        f" {device.type}; loops from {STEPS_TIMED} steps and {RECORDS_TIMED} records, scaled up\n"
    )
    print("| vectors of all records | seconds | smallest | times first | processor seconds | times first |")
    print("|---|---|---|---|---|---|")
    for name, (wall, spent) in medians.items():
        least = min(value for value, _ in times[name])
        ratios = f"{wall / fastest[0]:.1f} | {spent:.2f} | {spent / fastest[1]:.1f}"
        print(f"| {name} | {wall:.2f} | {least:.2f} | {ratios} |")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        print("\n| store | bytes on disk | error / longest vector | forget one record |\n|---|---|---|---|")
        for dtype, count, error, seconds in forgetting(run, Path(folder)):
            print(f"| {dtype} | {count:,} | {error:.1e} | {seconds * 1e6:.0f} us |")
    torch.set_num_threads(1)
    rounds = [network(given.records, device) for _ in range(given.repeats + 1)][1:]
    own, loop = (statistics.median(r[i] for r in rounds) for i in (1, 2))
    print("\n| mlp:64, batch of 64, 1 thread | processor ms a step and record | times |\n|---|---|---|")
    print(f"| many records at once ({rounds[0][0]:,} numbers) | {own * 1e3:.2f} | 1 |")
    print(f"| one record after another | {loop * 1e3:.2f} | {loop / own:.1f} |")


if __name__ == "__main__":
    main()
