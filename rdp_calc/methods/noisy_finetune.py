"""Noisy fine-tuning: clip the model once, then clipped and noised gradient steps on retained data.

x_0 = clip(model, C0); x <- x - gamma (clip(g, C1) + lambda x) + N(0, noise_std^2 I), g the gradient of a batch of
retained records (the batch gradient is clipped, not each record's). Any loss, any network, any model to start from: two
runs contract by c = |1 - gamma lambda|, shift by 2 gamma C1 and start 2 C0 apart. Both apply the same kernel, so steps
after the best prefix are post-processing. (Amplification by iteration: Koloskova et al. 2025, arXiv:2506.06985;
accounting: shifted composition, ``docs/theory/shifted.md``.)
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flint import arb

from rdp_calc import finetune
from rdp_calc.documents import field
from rdp_calc.errors import DataError, InvalidInput, MissingInput
from rdp_calc.fromanymodel import FromAnyModel
from rdp_calc.methods import MAX_STEPS
from rdp_calc.options import Option, check_known, read_float, require
from rdp_calc.problem import ADJACENCY_OPTION, SIZE_OPTIONS, Assumption
from rdp_calc.process import NoisyProcess, Phase
from rdp_calc.reals import at_most, ball
from rdp_calc.regular_files import open_regular
from rdp_calc.schedule import Schedule, best_prefix
from rdp_calc.schedule_values import Values, check_schedule, ratios, read_schedule, shown_schedule, stored_schedule

if TYPE_CHECKING:
    pass

OPTIMIZERS = ("sgd", "momentum", "adam")


@dataclass(frozen=True, kw_only=True)
class NoisyFinetune(FromAnyModel):
    """init_clip C0, grad_clip C1, step_size gamma (the first one), weight_decay lambda, unlearn_steps T >= 1.

    Only the first accounted_steps (None: the best prefix) count towards mu; the kernel after them is the same in both
    runs. The noise is noise_std, the first value of the noise schedule. center: SHA-256 of a file of public weights
    that every norm is taken around, and decayed towards; it changes init_clip only. init_clamp V: the model's dimension
    coordinates are clamped to +-V instead of projected; V sqrt(dimension) is then at most init_clip.
    """

    init_clip: float
    grad_clip: float
    step_size: float
    unlearn_steps: int
    weight_decay: float = 0.0
    noise_schedule: Values = "constant"
    step_schedule: Values = "constant"
    optimizer: str = "sgd"
    accounted_steps: int | None = None
    center: str | None = None
    init_clamp: float | None = None
    dimension: int | None = None

    NAME = "noisy-finetune"
    SUMMARY = "Clip the model, then clipped and noised fine-tuning on retained data; any network."
    BOUNDS = ("shifted",)
    HAS_STEPS = True
    FEWEST_STEPS = 1
    EXAMPLE = "noisy-finetune --epsilon 1 --delta 1e-5 --init-clip 1 --grad-clip 1 --step-size 0.01"
    OPTIONS = (
        *SIZE_OPTIONS,
        ADJACENCY_OPTION,
        Option(name="init_clip", kind="text", help="Norm C0 the model is projected to before the first step."),
        Option(name="init_clamp", kind="float", help="Clamp every coordinate to +-V instead: C0 = V sqrt(dimension)."),
        Option(name="dimension", kind="int", help="Number of parameters, with --init-clamp."),
        Option(name="grad_clip", kind="text", help="Norm C1 the batch gradient (or whole update) is clipped to."),
        Option(name="step_size", kind="text", help="Step size gamma, the first value of its schedule."),
        Option(name="weight_decay", kind="float", default="0", help="Decoupled weight decay lambda."),
        Option(name="unlearn_steps", kind="text", help="Steps T (default: the number that needs least noise)."),
        Option(
            name="noise_schedule",
            kind="text",
            default="constant",
            help="constant, linear:END, cosine or @FILE; END is a fraction of the first value.",
        ),
        Option(
            name="step_schedule",
            kind="text",
            default="constant",
            help="constant, linear:END, cosine or @FILE (one number a step, read relative to the first).",
        ),
        Option(
            name="optimizer",
            kind="choice",
            default="sgd",
            choices=OPTIMIZERS,
            help="sgd, or momentum or adam with the whole update clipped and fresh state.",
        ),
        Option(name="center", kind="text", help="File of public weights norms are taken around (plans keep its hash)."),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("init_clip", "grad_clip", "step_size"):
            finetune.check_positive(name, getattr(self, name))
        finetune.check_not_negative("weight_decay", self.weight_decay)
        for name in ("unlearn_steps", "accounted_steps"):
            count = getattr(self, name)
            if count is None and name == "accounted_steps":
                continue
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_STEPS:
                raise InvalidInput(f"{name} must be an integer in 1..{MAX_STEPS}, got {count!r}.")
        if self.optimizer not in OPTIMIZERS:
            raise InvalidInput(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}.")
        self._check_clamp()
        for name in ("noise_schedule", "step_schedule"):
            check_schedule(name, getattr(self, name), self.unlearn_steps)
        scheduled = self.noise_schedule != "constant" or self.step_schedule != "constant"
        if scheduled and self.step_size * self.weight_decay > 1:
            raise InvalidInput(
                "with a schedule step_size x weight_decay must be at most 1, got"
                f" {self.step_size * self.weight_decay!r}."
            )
        if self.accounted_steps is not None:
            if self.accounted_steps > self.unlearn_steps:
                raise InvalidInput(
                    f"accounted_steps must be at most unlearn_steps = {self.unlearn_steps}, got {self.accounted_steps}."
                )
            if self.optimizer != "sgd" and self.accounted_steps < self.unlearn_steps:
                raise InvalidInput(f"with optimizer {self.optimizer} every step counts: its state is private.")

    def _check_clamp(self) -> None:
        if self.init_clamp is None or self.dimension is None:
            if self.init_clamp is not None or self.dimension is not None:
                raise InvalidInput("init_clamp and dimension go together.")
            return
        finetune.check_positive("init_clamp", self.init_clamp)
        if isinstance(self.dimension, bool) or not isinstance(self.dimension, int) or not self.dimension >= 1:
            raise InvalidInput(f"dimension must be an integer >= 1, got {self.dimension!r}.")
        clamp, dimension = self.init_clamp, self.dimension
        if not at_most(lambda: ball(clamp) * arb(dimension).sqrt() - ball(self.init_clip), 0):
            raise InvalidInput(
                f"init_clip = {self.init_clip!r} is below init_clamp x sqrt(dimension), the norm after the clamp."
            )

    @classmethod
    def from_options(cls, **values: Any) -> NoisyFinetune:
        check_known(values, cls.OPTIONS, cls.NAME)
        clip, clamp = _number(values, "init_clip"), values.get("init_clamp")
        if (clip is None) == (clamp is None):
            wrong = MissingInput if clip is None else InvalidInput
            raise wrong("give --init-clip, or --init-clamp with --dimension, one of the two.")
        if clamp is not None:
            finetune.check_positive("init_clamp", clamp)
            dimension = require(values, "dimension", " with --init-clamp")
            if not dimension >= 1:
                raise InvalidInput(f"dimension must be an integer >= 1, got {dimension!r}.")
            clip = finetune.clamp_norm(clamp, dimension)
        elif values.get("dimension") is not None:
            raise InvalidInput("--dimension goes with --init-clamp only.")
        for name in ("grad_clip", "step_size"):
            require(values, name)
        fields: dict[str, Any] = {
            "init_clip": clip,
            "grad_clip": _number(values, "grad_clip"),
            "step_size": _number(values, "step_size"),
            "weight_decay": 0.0 if values.get("weight_decay") is None else values["weight_decay"],
            "noise_schedule": read_schedule("--noise-schedule", values.get("noise_schedule")),
            "step_schedule": read_schedule("--step-schedule", values.get("step_schedule")),
            "optimizer": values.get("optimizer") or "sgd",
            "center": None if values.get("center") is None else _file_digest(values["center"]),
            "init_clamp": clamp,
            "dimension": None if clamp is None else values["dimension"],
            **cls.sizes(values),
        }
        steps = _number(values, "unlearn_steps")
        if steps is not None and not (1 <= steps < math.inf and steps == int(steps)):
            raise InvalidInput(f"unlearn_steps must be an integer >= 1, got {steps!r}.")
        return cls(**fields, unlearn_steps=default_steps(fields) if steps is None else int(steps))

    def schedule(self) -> Schedule | None:
        if self.noise_schedule == self.step_schedule == "constant":
            return None
        found: Schedule = self.remember(
            "schedule",
            lambda: Schedule(
                self.step_size * ratios(self.step_schedule, self.unlearn_steps),
                ratios(self.noise_schedule, self.unlearn_steps),
                self.weight_decay,
                self.grad_clip,
                self.init_clip,
            ),
        )
        return found

    def accounted(self) -> int:
        """The steps that count towards mu."""
        if self.accounted_steps is not None:
            return self.accounted_steps
        if self.optimizer != "sgd":
            return self.unlearn_steps
        found: int = self.remember("accounted", self._accounted)
        return found

    def _accounted(self) -> int:
        schedule = self.schedule()
        if schedule is not None:
            return best_prefix(schedule)
        best = finetune.best_steps(
            init_clip=self.init_clip,
            grad_clip=self.grad_clip,
            step_size=self.step_size,
            weight_decay=self.weight_decay,
            limit=self.unlearn_steps,
        )
        return self.unlearn_steps if best is None else best

    def process(self, noise: float) -> NoisyProcess:
        if self.schedule() is not None:
            return super().process(noise)
        phase = Phase(
            contraction=finetune.contraction(self.step_size, self.weight_decay),
            shift=finetune.shift(self.step_size, self.grad_clip),
            noise_std=noise,
            steps=self.accounted(),
        )
        return NoisyProcess(phases=(phase,), initial_distance=2 * ball(self.init_clip))

    def with_unlearn_steps(self, steps: int) -> NoisyFinetune:
        if isinstance(self.noise_schedule, tuple) or isinstance(self.step_schedule, tuple):
            raise InvalidInput("the steps of a schedule from a file are those of the file.")
        return replace(self, unlearn_steps=steps, accounted_steps=None)

    @property
    def steps(self) -> int:
        return self.unlearn_steps

    def details(self, noise: float) -> dict[str, Any]:
        return {"accounted_steps": self.accounted()}

    def assumptions(self) -> list[Assumption]:
        update = "batch gradient" if self.optimizer == "sgd" else "whole update"
        listed = [
            Assumption(
                name="init_clip", value=self.init_clip, status="enforced", enforced_by="the model is projected first"
            ),
            Assumption(
                name="grad_clip",
                value=self.grad_clip,
                status="enforced",
                enforced_by=f"the {update} is projected to this norm in every step",
            ),
            Assumption(
                name="retained_data_only",
                value="every step uses retained records and fresh randomness only",
                status="enforced",
                enforced_by="forgotten rows are dropped before the first batch; optimiser state and buffers are fresh",
            ),
        ]
        if self.center is not None:
            listed.append(
                Assumption(
                    name="public_center",
                    value=self.center,
                    status="enforced",
                    enforced_by="norms are taken around the weights of this SHA-256, which must be public",
                )
            )
        return listed

    def parameters(self) -> dict[str, Any]:
        return {
            "init_clip": self.init_clip,
            "grad_clip": self.grad_clip,
            "step_size": self.step_size,
            "weight_decay": self.weight_decay,
            "unlearn_steps": self.unlearn_steps,
            "noise_schedule": shown_schedule(self.noise_schedule),
            "step_schedule": shown_schedule(self.step_schedule),
            "optimizer": self.optimizer,
            "center": self.center,
            # Only where they say something, so that older plans read the same.
            **({} if self.init_clamp is None else {"init_clamp": self.init_clamp, "dimension": self.dimension}),
        }

    @classmethod
    def from_plan(cls, document: dict[str, Any]) -> NoisyFinetune:
        return cls(
            init_clip=field(document, "parameters.init_clip", "number"),
            grad_clip=field(document, "parameters.grad_clip", "number"),
            step_size=field(document, "parameters.step_size", "number"),
            weight_decay=field(document, "parameters.weight_decay", "number"),
            unlearn_steps=field(document, "parameters.unlearn_steps", "integer"),
            noise_schedule=stored_schedule(document, "noise_schedule"),
            step_schedule=stored_schedule(document, "step_schedule"),
            optimizer=field(document, "parameters.optimizer", "text"),
            accounted_steps=field(document, "parameters.accounted_steps", "integer"),
            center=field(document, "parameters.center", "text", optional=True),
            init_clamp=field(document, "parameters.init_clamp", "number", optional=True),
            dimension=field(document, "parameters.dimension", "integer", optional=True),
            **cls.stored_sizes(document),
        )


def default_steps(fields: dict[str, Any]) -> int:
    """The noise-minimising number of steps; InvalidInput where the noise falls with every step."""
    for name in ("init_clip", "grad_clip", "step_size"):
        finetune.check_positive(name, fields[name])
    for name in ("noise_schedule", "step_schedule"):
        if isinstance(fields[name], tuple):
            return len(fields[name])
        if fields[name] != "constant":
            raise InvalidInput(f"--unlearn-steps is required with --{name.replace('_', '-')} {fields[name]}.")
    best = finetune.best_steps(
        init_clip=fields["init_clip"],
        grad_clip=fields["grad_clip"],
        step_size=fields["step_size"],
        weight_decay=fields["weight_decay"],
        limit=None,
    )
    if best is None:
        raise InvalidInput(
            "--unlearn-steps is required: with weight-decay x init-clip >= grad-clip the noise falls with every step."
        )
    if best >= MAX_STEPS:
        raise InvalidInput(
            f"--unlearn-steps is required: the number that needs least noise is beyond {MAX_STEPS:.0e} here."
        )
    return best


def _file_digest(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    try:
        with open_regular(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from None


def _number(values: dict[str, Any], name: str) -> float | None:
    value = values.get(name)
    return read_float("--" + name.replace("_", "-"), value) if isinstance(value, str) else value


METHOD = NoisyFinetune
