"""Feed damaged files to one reader: python tests/fuzz/run.py --target npz --count 100000 --seed 1

A case passes when the reader returns, or raises a RdpCalcError whose text is one printable line. Cases run in a child
process with little memory; a child that dies or does not come back is a failure too, and the next one goes on behind
the case. Reports cases, seconds, distinct error texts, slowest case and peak memory; exits with 1 on any failure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

for _folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]):
    sys.path.insert(0, str(_folder))

from targets import TARGETS, Target  # noqa: E402

from rdp_calc.errors import RdpCalcError  # noqa: E402

#: No case may take so many seconds of computing; a child that is silent for four times as long is ended.
SECONDS = 10.0
_LONGEST_TEXT = 10_000

#: The exit code of a child in which the harness failed, and how many failures of a target are enough to stop.
OWN_FAULT, MOST_ENDED = 70, 2000


class Problem(Exception):
    """A refusal that a reader of the terminal should not get to see."""


def check_text(text: str) -> None:
    """Raise Problem unless the text is one printable line of bounded length."""
    if not text.isprintable() or not text.strip():
        raise Problem(f"the text is no printable line: {text[:300]!r}")
    if len(text) > _LONGEST_TEXT:
        raise Problem(f"the text has {len(text)} characters: {text[:300]!r}")


def attempt(target: Target, content: bytes, folder: Path) -> str | None:
    """The text of the refusal, None where the file was read. Raises whatever else comes out."""
    try:
        target.read(content, folder)
    except RdpCalcError as error:
        check_text(str(error))
        return str(error)
    return None


def kind_of(text: str, folder: Path) -> str:
    """The text without what differs from case to case."""
    text = text.replace(str(folder), "")
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "'...'", text)
    return re.sub(r"-?[0-9][0-9.e+]*", "0", text)[:160]


def place_of(error: BaseException) -> str:
    """Where an unexpected error came from: its kind and the last lines of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if any(part in f.filename for part in ("/rdp_calc/", "/unlearn_runtime/", "/cli/"))]
    last = (ours or list(frames))[-1:]
    return f"{type(error).__name__} at " + ", ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in last)


def child(name: str, seed: int, start: int, count: int, folder: Path, shared: mmap.mmap, out: int, memory: int) -> None:
    """Run the cases from ``start`` on; what happened goes to ``out`` as one JSON line at the end, failures at once."""
    target = TARGETS[name]
    # The first good file loads all that the reader imports.
    with contextlib.suppress(RdpCalcError):
        target.read(target.corpus()[0], folder)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("error")
    texts: Counter[str] = Counter()
    slowest, base = (0.0, -1), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    largest = (base, -1)
    read = 0
    for number in range(start, count):
        shared[:8] = struct.pack("<Q", number)
        content = target.case(name, seed, number)
        before = time.process_time()
        try:
            text = attempt(target, content, folder)
            read += text is None
            if text is not None:
                texts[kind_of(text, folder)] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            line = {"number": number, "place": place_of(error), "text": str(error)[:300]}
            os.write(out, (json.dumps({"failure": line}) + "\n").encode())
        seconds = time.process_time() - before
        if seconds > slowest[0]:
            slowest = (seconds, number)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if peak > largest[0] + 1024:
            largest = (peak, number)
    report = {"texts": texts, "slowest": slowest, "base": base, "largest": largest, "read": read}
    os.write(out, (json.dumps(report) + "\n").encode())


def run(name: str, *, count: int, seed: int, start: int = 0, memory: int = 4 * 2**30) -> dict[str, Any]:
    """The report of ``count`` cases of one target."""
    begun = time.perf_counter()
    scratch = "/dev/shm" if os.path.isdir("/dev/shm") else None
    folder = Path(tempfile.mkdtemp(prefix="rdp-calc-fuzz-", dir=scratch))
    texts: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    slowest, largest, base, read = (0.0, -1), (0, -1), 0, 0
    TARGETS[name].corpus()
    try:
        shared, number = mmap.mmap(-1, 8), start
        while number < count:
            shared[:8] = struct.pack("<Q", number)
            lines, status, silent = _watched(name, seed, number, count, folder, shared, memory)
            reports = [json.loads(line) for line in lines]
            failures += [report["failure"] for report in reports if "failure" in report]
            for report in reports:
                if "texts" in report:
                    texts.update(report["texts"])
                    slowest = max(slowest, tuple(report["slowest"]))
                    largest, base, read = max(largest, tuple(report["largest"])), report["base"], read + report["read"]
            last = struct.unpack("<Q", shared[:8])[0]
            if status == 0:
                break
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == OWN_FAULT:
                raise RuntimeError(f"the harness itself failed in case {last} of {name}, see above")
            if len(failures) >= MOST_ENDED:
                break
            what = "hangs" if silent else f"ends the process: {_ending(status)}"
            failures.append({"number": last, "place": what, "text": ""})
            number = last + 1

    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if slowest[0] > SECONDS:
        failures.append({"number": slowest[1], "place": f"takes {slowest[0]:.1f} s", "text": ""})
    return {
        "target": name,
        "cases": count - start,
        "seed": seed,
        "seconds": round(time.perf_counter() - begun, 1),
        "read": read,
        "refused": sum(texts.values()),
        "texts": dict(texts.most_common()),
        "slowest": {"seconds": round(slowest[0], 3), "number": slowest[1]},
        "memory": {"base_mib": base >> 10, "peak_mib": largest[0] >> 10, "number": largest[1]},
        "failures": failures,
    }


def _watched(
    name: str, seed: int, start: int, count: int, folder: Path, shared: mmap.mmap, memory: int
) -> tuple[list[str], int, bool]:
    """Lines, wait status, and whether the child was ended because it was silent."""
    source, sink = os.pipe()
    identifier = os.fork()
    if identifier == 0:
        code = OWN_FAULT
        try:
            os.close(source)
            child(name, seed, start, count, folder, shared, sink, memory)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(sink)
    content, silent = b"", False
    last, since = shared[:8], time.monotonic()
    os.set_blocking(source, False)
    while True:
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(source, 2**16):
                content += piece
        done, status = os.waitpid(identifier, os.WNOHANG)
        if done:
            break
        if shared[:8] != last:
            last, since = shared[:8], time.monotonic()
        elif time.monotonic() - since > 4 * SECONDS:
            os.kill(identifier, signal.SIGKILL)
            silent = True
        time.sleep(0.05)
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(source, 2**16):
            content += piece
    os.close(source)
    return content.decode().splitlines(), status, silent


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit code {os.WEXITSTATUS(status)}"


def summary(report: dict[str, Any]) -> str:
    memory, slowest = report["memory"], report["slowest"]
    rate = report["cases"] / max(report["seconds"], 1e-9)
    return (
        f"{report['target']}: {report['cases']} cases in {report['seconds']} s ({rate:.0f}/s), {report['read']} read,"
        f" {report['refused']} refused with {len(report['texts'])} kinds of text, slowest {slowest['seconds']} s"
        f" (case {slowest['number']}), peak {memory['peak_mib']} MiB over {memory['base_mib']} at rest,"
        f" {len(report['failures'])} failures"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=[*TARGETS, "all"], required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0, help="the first case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--memory-gib", type=float, default=4.0, help="address space of the child")
    parser.add_argument("--texts", action="store_true", help="show the kinds of error texts")
    parser.add_argument("--write", type=Path, help="write the bytes of case --start to this file and stop")
    parser.add_argument("--json", type=Path, help="append the report to this file, one JSON object a line")
    given = parser.parse_args(arguments)
    names = list(TARGETS) if "all" in given.target else given.target
    if given.write is not None:
        given.write.write_bytes(TARGETS[names[0]].case(names[0], given.seed, given.start))
        return 0
    failed = False
    for name in names:
        report = run(name, count=given.count, seed=given.seed, start=given.start, memory=int(given.memory_gib * 2**30))
        print(summary(report), flush=True)
        if given.texts:
            for text, number in report["texts"].items():
                print(f"  {number:7d}  {text}")
        seen: Counter[str] = Counter()
        for failure in report["failures"]:
            seen[failure["place"]] += 1
            if seen[failure["place"]] == 1:
                print(f"  FAILED case {failure['number']}: {failure['place']}: {failure['text']}")
        for place, number in seen.items():
            if number > 1:
                print(f"  {number} times {place}")
        failed |= bool(report["failures"])
        if given.json is not None:
            with given.json.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(report) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
