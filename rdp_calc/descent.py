"""What the gradient-descent methods share: the objective, the step, requests, and what one step does to two runs."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from flint import arb

from rdp_calc import losses
from rdp_calc.documents import field
from rdp_calc.errors import DataError, InvalidInput, NotApplicable
from rdp_calc.methods import MAX_STEPS, Method
from rdp_calc.options import Option, check_known, require
from rdp_calc.problem import ADJACENCY_OPTION, SIZE_OPTIONS, Assumption, check_sizes, gradient_gap
from rdp_calc.process import Cycle, NoisyProcess, Phase
from rdp_calc.reals import Real, at_most, ball, precision, round_up
from rdp_calc.requests import Request, read_requests, show_requests
from rdp_calc.sequence import Sequence
from rdp_calc.step_size import STEP_SIZE_OPTION, read_step_size

#: That of calibrations, so that mus computed there and here round alike.
_DETAIL_BITS = 160

CONVEXITIES = ("strongly", "convex", "none")

SHAPE_OPTIONS = (
    Option(
        name="convexity",
        kind="choice",
        default="strongly",
        choices=CONVEXITIES,
        help="What is known of the objective: strongly convex, convex, or none (smooth only).",
    ),
    Option(name="radius", kind="float", help="Radius of the ball every iterate is projected onto, after the noise."),
    Option(name="requests", kind="text", help="Requests in sequence, as S1:K1,S2:K2 (in steps: S1,S2)."),
)


@dataclass(frozen=True, kw_only=True)
class Descent(Method):
    """Gradient descent with learning and unlearning; subclasses say what one turn is (a step, or an epoch).

    dataset_size n, group_size S, adjacency, the constants, step_size eta, learn_steps T (turns; inf allowed) and
    unlearn_steps K >= 0 (turns). radius: every iterate is projected onto a ball of that radius. requests: removals in
    sequence, each with its own turns; group_size is then their sum and unlearn_steps the last one's.

    Raises InvalidInput for a number out of its domain, NotApplicable where the step does not contract as the convexity
    promises.
    """

    dataset_size: int
    group_size: int
    adjacency: str
    constants: losses.Constants
    step_size: float
    learn_steps: int | float
    unlearn_steps: int | None
    convexity: str = "strongly"
    radius: float | None = None
    requests: tuple[Request, ...] = ()

    #: What a turn is called in options and plans: "steps" or "epochs".
    TURNS: ClassVar[str] = "steps"
    HAS_STEPS = True
    NEEDS_PREPARATION = True

    def __post_init__(self) -> None:
        check_sizes(dataset_size=self.dataset_size, group_size=self.group_size, adjacency=self.adjacency)
        if not 0 < self.step_size < math.inf:
            raise InvalidInput(f"step_size must be a finite number > 0, got {self.step_size!r}.")
        learn, unlearn = f"learn_{self.TURNS}", f"unlearn_{self.TURNS}"
        if not (self.learn_steps == math.inf or _is_count(self.learn_steps)):
            raise InvalidInput(f"{learn} must be an integer in 0..{MAX_STEPS} or inf, got {self.learn_steps!r}.")
        if not self.requests and not _is_count(self.unlearn_steps):
            raise InvalidInput(f"{unlearn} must be an integer in 0..{MAX_STEPS}, got {self.unlearn_steps!r}.")
        self._check_requests()
        if self.convexity not in CONVEXITIES:
            raise InvalidInput(f"convexity must be one of {', '.join(CONVEXITIES)}, got {self.convexity!r}.")
        if self.radius is not None and not 0 < self.radius < math.inf:
            raise InvalidInput(f"radius must be a finite number > 0, got {self.radius!r}.")
        self._check_contraction()

    def _check_requests(self) -> None:
        for group, turns in self.requests:
            if type(group) is int and type(turns) is int and 1 <= group <= MAX_STEPS and 0 <= turns <= MAX_STEPS:
                continue
            if not (_is_count(group) and group >= 1):
                raise InvalidInput(f"a request must remove an integer number of records >= 1, got {group!r}.")
            if turns is not None and not _is_count(turns):
                raise InvalidInput(f"unlearn_{self.TURNS} of a request must be in 0..{MAX_STEPS}, got {turns!r}.")
        if self.requests and self.unlearn_steps != self.requests[-1][1]:
            raise InvalidInput(
                f"unlearn_{self.TURNS} must be those of the last request, {self.requests[-1][1]}, got"
                f" {self.unlearn_steps!r}."
            )
        if self.requests and self.group_size != sum(group for group, _ in self.requests):
            raise InvalidInput(
                f"group_size must be the sum of the requests, {sum(group for group, _ in self.requests)}, got"
                f" {self.group_size}."
            )

    def _check_contraction(self) -> None:
        steep = ball(self.step_size) * ball(self.constants.smoothness)
        limit = f"2/smoothness = {2 / self.constants.smoothness!r}"
        if self.convexity == "strongly":
            if not self.constants.strong_convexity > 0:
                raise InvalidInput(
                    "strong_convexity must be > 0 where the objective is strongly convex, got"
                    f" {self.constants.strong_convexity!r}; or use --convexity convex or none."
                )
            if at_most(lambda: 2 - steep, 0):
                raise NotApplicable(f"step_size {self.step_size!r} does not contract: it must be below {limit}.")
        elif self.convexity == "convex" and not at_most(lambda: steep, 2):
            raise NotApplicable(f"step_size {self.step_size!r} may expand: a convex objective needs at most {limit}.")
        if self.learn_steps == math.inf and self.radius is None and not self._stays_close():
            raise InvalidInput(
                f"learn_{self.TURNS} inf needs a contraction below 1: with --convexity {self.convexity} give --radius"
                f" or a finite --learn-{self.TURNS}."
            )

    def _stays_close(self) -> bool:
        """Whether two runs of any length stay at a bounded distance."""
        if self.convexity == "none":
            return self.regulariser > 0 and ball(self.step_size) * ball(self.regulariser) < 2
        return self.convexity == "strongly"

    @property
    def regulariser(self) -> float:
        """The coefficient l2 of the regulariser, 0 where none was given."""
        return self.constants.l2 or 0.0

    @classmethod
    def read(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of this class from raw inputs."""
        check_known(values, cls.OPTIONS, cls.NAME)
        convexity = values.get("convexity") or "strongly"
        constants = losses.constants_from(values, strongly_convex=convexity == "strongly")
        learn, unlearn = f"learn_{cls.TURNS}", f"unlearn_{cls.TURNS}"
        requests = read_requests(values.get("requests"))
        if requests:
            for name in ("group_size", unlearn):
                if values.get(name) not in (None, 0):
                    raise InvalidInput(f"--requests conflicts with --{name.replace('_', '-')}: it gives both.")
            group, turns = sum(count for count, _ in requests), requests[-1][1]
        else:
            group = 1 if values.get("group_size") is None else values["group_size"]
            turns = require(values, unlearn)
        return {
            "dataset_size": require(values, "dataset_size"),
            "group_size": group,
            "adjacency": require(values, "adjacency"),
            "constants": constants,
            "step_size": read_step_size(values.get("step_size"), constants),
            "learn_steps": math.inf if values.get(learn) is None else values[learn],
            "unlearn_steps": turns,
            "convexity": convexity,
            "radius": values.get("radius"),
            "requests": requests,
        }

    def contraction(self) -> arb:
        """An enclosure of the Lipschitz constant of the noise-free step on one objective."""
        eta = ball(self.step_size)
        if self.convexity == "convex":
            return arb(1)
        if self.convexity == "none":
            return 1 + eta * ball(self.constants.smoothness)
        slow, fast = 1 - eta * ball(self.constants.strong_convexity), 1 - eta * ball(self.constants.smoothness)
        return abs(slow).max(abs(fast))

    def alternative(self) -> tuple[arb, arb] | None:
        """Where the objective need not be convex: the step as a decay plus a data gradient of norm at most M."""
        if self.convexity != "none":
            return None
        eta = ball(self.step_size)
        return abs(1 - eta * ball(self.regulariser)), 2 * eta * ball(self.constants.lipschitz)

    def shift_of(self, group: int, present: int) -> Real:
        """An enclosure of the distance a step opens while ``group`` of the ``present`` records of its mean differ."""
        if group == 0:
            return 0.0
        gap = gradient_gap(
            lipschitz=self.constants.lipschitz, group_size=group, dataset_size=present, adjacency=self.adjacency
        )
        return ball(self.step_size) * ball(gap)

    def shift(self) -> Real:
        """An enclosure of the distance one step can open with all forgotten records in one mean, in parameter units."""
        return self.shift_of(min(self.group_size, self.mean_size), self.mean_size)

    @property
    def mean_size(self) -> int:
        """Records in the mean of one step before any removal."""
        return self.dataset_size

    @property
    def drops(self) -> bool:
        """Whether a removed record leaves the mean."""
        return self.adjacency == "remove"

    @abstractmethod
    def turn(self, remaining: int, removed: int, noise_std: Real, times: int | float) -> tuple[Phase | Cycle, ...]:
        """``times`` turns while ``remaining`` forgotten records are still in the data and ``removed`` are not."""

    def phases(self, noise_std: Real) -> tuple[Phase | Cycle, ...]:
        """Learning, then one phase a request, against the run that never saw what the last request removed."""
        requests = self.asked()
        left = sum(group for group, _ in requests)
        found = list(self.turn(left, 0, noise_std, self.learning_turns))
        removed = 0
        for group, turns in requests:
            left, removed = left - group, removed + group
            found += self.turn(left, removed, noise_std, turns)
        return tuple(found)

    @property
    def learning_turns(self) -> int | float:
        """Turns before the first request."""
        return self.learn_steps

    def asked(self) -> tuple[tuple[int, int], ...]:
        """The requests with their turns; one where there is no sequence. InvalidInput where turns are missing."""
        requests: tuple[tuple[int, int], ...] = self.remember("asked", self._asked)
        return requests

    def _asked(self) -> tuple[tuple[int, int], ...]:
        found = []
        for group, turns in self.requests or ((self.group_size, self.unlearn_steps),):
            if turns is None:
                raise InvalidInput(
                    f"--requests needs {self.TURNS} with each request, as S1:K1,S2:K2; only steps solves."
                )
            found.append((group, turns))
        return tuple(found)

    def releases(self) -> tuple[Method, ...]:
        return tuple(self.first(count) for count in range(1, len(self.requests) + 1)) or (self,)

    def first(self, count: int) -> Self:
        """The problem up to the release after request number ``count``."""
        kept = self.requests[:count]
        if not kept:
            return self
        return replace(self, requests=kept, group_size=sum(group for group, _ in kept), unlearn_steps=kept[-1][1])

    def releases_to_solve(self) -> tuple[int, ...]:
        if any(turns is not None for _, turns in self.requests):
            raise InvalidInput(
                f"steps solves for the {self.TURNS} of every request: leave them out of --requests, as S1,S2."
            )
        return tuple(group for group, _ in self.requests) or (self.group_size,)

    def with_all_steps(self, steps: tuple[int, ...], count: int) -> Self:
        if not self.requests:
            return self.with_unlearn_steps(steps[-1])
        kept = tuple((group, turns) for (group, _), turns in zip(self.requests, steps, strict=False))[:count]
        return replace(self, requests=kept, group_size=sum(group for group, _ in kept), unlearn_steps=kept[-1][1])

    def gap_of_one(self) -> Callable[[int], Real]:
        """The shift that one record causes when a number of records share its mean."""
        alone = ball(self.shift_of(1, 1))
        return lambda present: alone / present

    def closed_form(self, *, steps_per_turn: int, noise_std: arb) -> Sequence | None:
        """The sequence in closed form, where its conditions hold."""
        if self.convexity == "none" or self.radius is not None:
            return None
        return Sequence(
            contraction=self.contraction(),
            noise_std=noise_std,
            steps_per_turn=steps_per_turn,
            gap=self.gap_of_one(),
            present=self.mean_size,
            drops=self.drops,
            learn_turns=self.learning_turns,
            requests=self.asked(),
        )

    def process(self, noise: float) -> NoisyProcess:
        diameter = None if self.radius is None else 2 * ball(self.radius)
        return NoisyProcess(phases=self.phases(self.noise_std(noise)), diameter=diameter)

    @property
    def common_steps(self) -> int:
        turn = self.turn(0, 0, 1.0, 1)[0]
        return (self.unlearn_steps or 0) * (turn.length if isinstance(turn, Cycle) else 1)

    def image_diameter(self) -> arb | None:
        """Iterates stay in a ball; a step moves them by a Lipschitz map, or by a decay and a bounded data gradient."""
        if self.radius is None:
            return None
        eta, diameter = ball(self.step_size), 2 * ball(self.radius)
        bounded = abs(1 - eta * ball(self.regulariser)) * diameter + 2 * eta * ball(self.constants.lipschitz)
        if self.constants.l2 is None:
            return self.contraction() * diameter
        return (self.contraction() * diameter).min(bounded)

    def prefix(self, noise: float, steps: int) -> NoisyProcess | None:
        whole = self.process(noise)
        return replace(whole, phases=whole.without_last(self.common_steps - steps))

    def with_unlearn_steps(self, steps: int) -> Self:
        """The same problem with other turns after the last request."""
        requests = self.requests
        if requests:
            requests = (*requests[:-1], (requests[-1][0], steps))
        found: Self = self.sharing(replace(self, unlearn_steps=steps, requests=requests))
        return found

    @property
    def adjacency_shown(self) -> str:
        return self.adjacency

    @property
    def steps(self) -> int | tuple[int, ...] | None:
        return tuple(turns for _, turns in self.asked()) if self.requests else self.unlearn_steps

    @property
    def cost(self) -> int:
        total, present = 0, self.dataset_size
        for group, turns in self.asked():
            present -= group if self.drops else 0
            total += turns * present
        return total

    def details(self, noise: float) -> dict[str, Any]:
        """mu of the release after each request, by shifted composition."""
        if not self.requests or noise == 0:
            return {}
        from rdp_calc.bounds.shifted import release_mus

        def computed() -> list[float]:
            with precision(_DETAIL_BITS):
                units: list[arb] = self.remember("release mus", lambda: release_mus(self))
                scale = ball(noise)
                return [round_up(mu / scale) for mu in units]

        return {"release_mus": list(self.remember(("release mus", noise), computed))}

    def assumptions(self) -> list[Assumption]:
        listed = self.constants.assumptions()
        if self.convexity != "strongly":
            listed = [entry for entry in listed if entry.name != "strong_convexity"]
        if self.convexity != "strongly" and self.constants.loss is None:
            listed.append(Assumption(name="convexity", value=self.convexity, status="estimated"))
        if self.constants.feature_norm is not None:
            listed.append(
                Assumption(
                    name="feature_norm",
                    value=self.constants.feature_norm,
                    status="enforced",
                    enforced_by="rows longer than this are scaled down, or refused with preprocess none",
                )
            )
        if self.constants.residual_clip is not None:
            listed.append(
                Assumption(
                    name="residual_clip",
                    value=self.constants.residual_clip,
                    status="enforced",
                    enforced_by="the run clips each record's residual to this number over the norm of its row",
                )
            )
        if self.radius is not None:
            listed.append(
                Assumption(
                    name="radius",
                    value=self.radius,
                    status="enforced",
                    enforced_by="every iterate is projected onto the ball after its noise",
                )
            )
        return listed

    def problem(self) -> dict[str, Any]:
        return {
            "dataset_size": self.dataset_size,
            "group_size": self.group_size,
            "adjacency": self.adjacency,
            **self.constants.to_json(),
            "step_size": self.step_size,
            f"learn_{self.TURNS}": self.learn_steps,
            f"unlearn_{self.TURNS}": self.unlearn_steps,
            "convexity": self.convexity,
            "radius": self.radius,
            "requests": show_requests(self.requests),
        }

    def to_plan(self) -> tuple[dict[str, Any], dict[str, Any]]:
        problem = {"dataset_size": self.dataset_size, "group_size": self.group_size, **self.constants.to_plan()}
        parameters: dict[str, Any] = {
            "step_size": self.step_size,
            f"learn_{self.TURNS}": self.learn_steps,
            f"unlearn_{self.TURNS}": self.unlearn_steps,
        }
        # Fields that came later appear only where they say something, so that older plans read the same.
        if self.convexity != "strongly":
            parameters["convexity"] = self.convexity
        if self.radius is not None:
            parameters["radius"] = self.radius
        if self.requests:
            parameters["requests"] = show_requests(self.requests)
        return problem, parameters

    @classmethod
    def stored(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The fields of this class from a plan."""
        try:
            requests = read_requests(field(document, "parameters.requests", "text", optional=True))
        except InvalidInput as error:
            raise DataError(f"field parameters.requests: {error}") from None
        return {
            "dataset_size": field(document, "problem.dataset_size", "integer"),
            "group_size": field(document, "problem.group_size", "integer"),
            "adjacency": field(document, "adjacency", "text"),
            "constants": losses.constants_from_plan(document),
            "step_size": field(document, "parameters.step_size", "number"),
            "learn_steps": field(document, f"parameters.learn_{cls.TURNS}", "steps"),
            "unlearn_steps": field(document, f"parameters.unlearn_{cls.TURNS}", "integer"),
            "convexity": field(document, "parameters.convexity", "text", optional=True) or "strongly",
            "radius": field(document, "parameters.radius", "number", optional=True),
            "requests": requests,
        }


FINAL_ITERATE = Assumption(
    name="only_final_iterate",
    value="no iterate before the last one is released",
    status="enforced",
    enforced_by="an unlearn run writes the last iterate only; the model of a learn run is not for release",
)
#: Rounding may add this share to the mu that is claimed.
ROUNDING_SHARE = 1e-3

REAL_ARITHMETIC = Assumption(
    name="real_arithmetic",
    value="rounding adds at most 0.1 % to mu",
    status="enforced",
    enforced_by="rounding errors of gradients are measured or bounded during the run, which stops above it",
)

COMMON_OPTIONS = (*SIZE_OPTIONS, ADJACENCY_OPTION, *losses.OPTIONS, losses.RESIDUAL_CLIP_OPTION, STEP_SIZE_OPTION)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_STEPS
