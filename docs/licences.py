"""Prints docs/licences.md: every distribution that rdp-calc pulls in, and its licence, from the installed metadata.

Exit code 1 where a licence is unknown or does not go with Apache-2.0.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "rdp-calc"
EXTRAS = ("", "runtime", "plots", "parquet", "dev")

PERMISSIVE = frozenset(
    {
        *("0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0"),
        *("CC0-1.0", "ISC", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Zlib"),
    }
)

#: Licences with conditions, and the distributions whose use of them was looked at.
JUDGED = {
    "LGPL-3.0-or-later": {"python-flint"},
    "MPL-2.0": {"hypothesis", "pathspec"},
}

#: What torch's builds for one accelerator pull in, most of it proprietary: not listed, see the page.
ACCELERATOR = ("nvidia-", "cuda-", "triton")

#: What distributions say that have no licence expression: their field, or else their classifier.
SPELLINGS = {
    "Apache 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "ISC License": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "PSF": "PSF-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "new BSD": "BSD-3-Clause",
}

#: Libraries inside binary wheels that metadata does not always name.
BUNDLED = {
    "libflint": "FLINT, LGPL-3.0-or-later",
    "libgmp": "GMP, LGPL-3.0-or-later",
    "libmpfr": "MPFR, LGPL-3.0-or-later",
    "libgfortran": "libgfortran, GPL-3.0-or-later WITH GCC-exception-3.1",
    "libgomp": "libgomp, GPL-3.0-or-later WITH GCC-exception-3.1",
    "libquadmath": "libquadmath, LGPL-2.1-or-later",
}

PAGE = """# Licences

rdp-calc is Apache-2.0. It ships none of what is listed here: pip installs each from its own wheel, under its own
licence. `make licences` writes this page from the metadata of what is installed (the versions of `constraints.txt`,
Linux on x86-64). A test fails when a distribution is missing here, when a licence is unknown, and when one is not among
those accepted below.

- **Permissive**: accepted wherever they appear.
- **LGPL**: the wheels of python-flint contain FLINT, GMP and MPFR under LGPL-3.0-or-later, as shared libraries that are
  loaded at run time and can be replaced. rdp-calc calls python-flint, which is MIT, and contains none of their code.
  Whoever passes on an image or an installer with these wheels passes on LGPL libraries, and owes their licence texts
  and, on request, their sources. python-flint 0.9 has the texts in its wheel; older ones say MIT alone.
- **libquadmath** (LGPL-2.1-or-later), **libgfortran** and **libgomp** (GPL-3.0 with the GCC runtime library exception,
  which allows this use under any licence) lie in the wheels of numpy, scipy, scikit-learn and torch.
- **MPL-2.0** for tools of the development environment only (hypothesis, pathspec): an installed rdp-calc imports
  nothing of theirs.
- **Not listed**: on Linux the registry's default build of torch also pulls in packages whose names begin with
  `nvidia-`, which are proprietary (NVIDIA's licence agreements), `cuda-` (Apache-2.0, or no word of a licence) and
  triton (MIT). A CPU build has none of them. Which torch is installed is the user's choice.
- GPL, AGPL and anything unknown: refused.

A licence is the distribution's licence expression, or else its licence field or classifier; BSD without a number is
written BSD-3-Clause.

| distribution | version | licence | bundled libraries under copyleft | pulled in by |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """One distribution of the closure. ``extras``: those that pull it in, "" for the base."""

    name: str
    version: str
    licence: str | None
    bundled: tuple[str, ...]
    extras: tuple[str, ...]

    @property
    def problem(self) -> str | None:
        """Why it cannot be used, or None."""
        if self.name.startswith(ACCELERATOR):
            return None
        if self.licence is None:
            return f"{self.name} {self.version}: no licence in its metadata that is known here"
        if not accepted(self.licence, self.name):
            return f"{self.name} {self.version}: licence {self.licence} is not accepted"
        return None


def rows() -> list[Row]:
    """The closure of what rdp-calc requires in this environment, by name. PackageNotFoundError: an extra is missing."""
    found: dict[str, set[str]] = {}
    for extra in EXTRAS:
        for name in _closure(extra):
            found.setdefault(name, set()).add(extra)
    return [_row(distribution(name), found[name]) for name in sorted(found)]


def accepted(licence: str, name: str) -> bool:
    """Whether a licence expression goes with Apache-2.0: one of its alternatives, with all of its parts."""
    parts = [part.strip(" ()") for part in re.split(r"\bAND\b", licence)]
    return all(any(_simple(choice.strip(" ()"), name) for choice in re.split(r"\bOR\b", part)) for part in parts)


def licence_of(found: Distribution) -> str | None:
    """The licence expression of a distribution, or what its older fields come to; None where they say nothing known."""
    expression = found.metadata["License-Expression"]
    if expression:
        return str(expression)
    field = (found.metadata["License"] or "").strip()
    if field in SPELLINGS or _known(field):
        return SPELLINGS.get(field, field)
    classifiers = [c.rsplit(" :: ", 1)[-1] for c in found.metadata.get_all("Classifier", []) if c.startswith("License")]
    names = [SPELLINGS.get(c) for c in classifiers]
    return " AND ".join(sorted({n for n in names if n})) if names and all(names) else None


def page(table: list[Row]) -> str:
    return PAGE + "".join(
        f"| {r.name} | {r.version.partition('+')[0]} | {r.licence or 'unknown'} | {'; '.join(r.bundled)} |"
        f" {', '.join(extra or 'base' for extra in r.extras)} |\n"
        for r in table
        if not r.name.startswith(ACCELERATOR)
    )


def _simple(identifier: str, name: str) -> bool:
    judged = JUDGED.get(identifier, set())
    return identifier in PERMISSIVE or name in judged


def _known(text: str) -> bool:
    return bool(text) and all(
        part.strip(" ()") in PERMISSIVE | set(JUDGED) for part in re.split(r"\b(?:AND|OR)\b", text)
    )


def _row(found: Distribution, extras: set[str]) -> Row:
    name = canonicalize_name(found.metadata["Name"])
    bundled = {
        BUNDLED[stem]
        for path in found.files or []
        if ".so" in path.name and (stem := re.split(r"[-.]", path.name)[0]) in BUNDLED
    }
    # What comes with the base comes with every extra.
    order = ("",) if "" in extras else tuple(extra for extra in EXTRAS if extra in extras)
    return Row(name, found.version, licence_of(found), tuple(sorted(bundled)), order)


def _closure(extra: str) -> Iterator[str]:
    """Names of the distributions that one extra pulls in, with the extras each is asked for followed too."""
    seen = {(PROJECT, extra)}
    waiting = list(seen)
    while waiting:
        name, wanted = waiting.pop()
        if name != PROJECT:
            yield name
        for text in distribution(name).requires or []:
            need = Requirement(text)
            # Of the project itself only the part that was asked for: the base has a turn of its own.
            conditional = need.marker is not None and "extra" in str(need.marker)
            if name == PROJECT and conditional != bool(extra):
                continue
            if need.marker is None or need.marker.evaluate({"extra": wanted}):
                for entry in {(canonicalize_name(need.name), e) for e in ("", *need.extras)} - seen:
                    seen.add(entry)
                    waiting.append(entry)


def main() -> int:
    table = rows()
    print(page(table), end="")
    problems = [row.problem for row in table if row.problem]
    print(*problems, sep="\n", file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
