"""Coverage-guided fuzzing of one reader with atheris, where it is installed (it is no dependency of this project):

    pip install --target /tmp/atheris atheris
    PYTHONPATH=/tmp/atheris python tests/fuzz/atheris_target.py npz CORPUS_FOLDER -runs=100000 -rss_limit_mb=4096

The good files of the target are written to the corpus folder first. Everything after the folder goes to libFuzzer.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["rdp_calc", "unlearn_runtime", "zipfile", "gzip", "csv", "json"]):
    from run import attempt
    from targets import TARGETS

    import rdp_calc.documents  # noqa: F401  for its instrumentation
    import unlearn_runtime.data  # noqa: F401


def main() -> None:
    """Run libFuzzer over the target named first, its damage mixed with that of ``mutate``."""
    name, corpus = sys.argv[1], Path(sys.argv[2])
    target = TARGETS[name]
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(target.corpus()):
        (corpus / f"good-{number}").write_bytes(content)
    folder = Path(tempfile.mkdtemp(prefix="rdp-calc-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))

    def mutated(content: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return bytes(atheris.Mutate(content, most))
        try:
            return target.mutate(rng, content)[:most]
        except Exception:
            return bytes(atheris.Mutate(content, most))

    atheris.Setup(
        [sys.argv[0], str(corpus), *sys.argv[3:]],
        lambda content: attempt(target, content, folder),
        custom_mutator=mutated,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
