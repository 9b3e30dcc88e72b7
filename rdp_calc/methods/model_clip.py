"""Model clipping: every step projects the model to a ball, so that noise makes any two runs forget their past.

noise after: x <- proj_C2(x - gamma (clip(g, C1) + lambda x)) + N(0, noise_std^2 I); noise before: the noise is added
and the result projected. Both runs apply the same Markov kernel, so delta contracts in every step
(``docs/theory/contraction.md``; Koloskova et al. 2025, arXiv:2506.06985).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from flint import arb

from rdp_calc import finetune
from rdp_calc.documents import field
from rdp_calc.errors import InvalidInput
from rdp_calc.fromanymodel import FromAnyModel
from rdp_calc.methods import MAX_STEPS
from rdp_calc.options import Option, check_known, read_float, read_integer, require
from rdp_calc.problem import ADJACENCY_OPTION, SIZE_OPTIONS, Assumption
from rdp_calc.process import NoisyProcess, Phase
from rdp_calc.reals import ball

ORDERS = ("after", "before")


@dataclass(frozen=True, kw_only=True)
class ModelClip(FromAnyModel):
    """model_clip C2, unlearn_steps K >= 1, noise_order after|before the projection.

    grad_clip C1, step_size gamma and weight_decay lambda bound one step; needed for noise before projection and for the
    hybrid bound. init_noise_std > 0 adds that noise once to the model clipped to init_clip. The noise is noise_std.
    """

    model_clip: float
    unlearn_steps: int
    noise_order: str = "after"
    init_noise_std: float = 0.0
    init_clip: float | None = None
    grad_clip: float | None = None
    step_size: float | None = None
    weight_decay: float = 0.0

    NAME = "model-clip"
    SUMMARY = "Noisy steps whose iterates are projected to a ball; any network."
    BOUNDS = ("contraction", "hybrid")
    HAS_STEPS = True
    EXAMPLE = "model-clip --epsilon 1 --delta 1e-5 --model-clip 0.5 --unlearn-steps 20"
    OPTIONS = (
        *SIZE_OPTIONS,
        ADJACENCY_OPTION,
        Option(name="model_clip", kind="float", help="Norm C2 every iterate is projected to."),
        Option(name="unlearn_steps", kind="text", help="Noisy steps K on the retained data."),
        Option(
            name="noise_order", kind="choice", default="after", choices=ORDERS, help="Noise after or before projection."
        ),
        Option(name="init_noise_std", kind="float", default="0", help="Noise added once to the clipped model."),
        Option(name="init_clip", kind="text", help="Norm C0 of the model before the initial noise."),
        Option(name="grad_clip", kind="text", help="Norm C1 the batch gradient is clipped to."),
        Option(name="step_size", kind="text", help="Step size gamma."),
        Option(name="weight_decay", kind="float", default="0", help="Decoupled weight decay lambda."),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        finetune.check_positive("model_clip", self.model_clip)
        finetune.check_not_negative("init_noise_std", self.init_noise_std)
        finetune.check_not_negative("weight_decay", self.weight_decay)
        for name in ("init_clip", "grad_clip", "step_size"):
            if getattr(self, name) is not None:
                finetune.check_positive(name, getattr(self, name))
        steps = self.unlearn_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= MAX_STEPS:
            raise InvalidInput(f"unlearn_steps must be an integer in 0..{MAX_STEPS}, got {steps!r}.")
        if self.noise_order not in ORDERS:
            raise InvalidInput(f"noise_order must be one of {', '.join(ORDERS)}, got {self.noise_order!r}.")
        if self.init_noise_std > 0 and self.init_clip is None:
            raise InvalidInput("--init-noise-std needs --init-clip, the norm of the model before that noise.")
        if self.noise_order == "before" and (self.grad_clip is None or self.step_size is None):
            raise InvalidInput("--noise-order before needs --grad-clip and --step-size.")
        if (self.grad_clip is None) != (self.step_size is None):
            raise InvalidInput("--grad-clip and --step-size go together.")

    @classmethod
    def from_options(cls, **values: Any) -> ModelClip:
        check_known(values, cls.OPTIONS, cls.NAME)
        clip, steps = require(values, "model_clip"), require(values, "unlearn_steps")
        numbers: dict[str, Any] = {
            name: read_float("--" + name.replace("_", "-"), values[name])
            if isinstance(values.get(name), str)
            else values.get(name)
            for name in ("init_clip", "grad_clip", "step_size")
        }
        return cls(
            model_clip=clip,
            unlearn_steps=read_integer("--unlearn-steps", steps) if isinstance(steps, str) else steps,
            noise_order=values.get("noise_order") or "after",
            init_noise_std=0.0 if values.get("init_noise_std") is None else values["init_noise_std"],
            weight_decay=0.0 if values.get("weight_decay") is None else values["weight_decay"],
            **cls.sizes(values),
            **numbers,
        )

    @property
    def scales(self) -> bool:
        return self.init_noise_std == 0

    @property
    def common_steps(self) -> int:
        return self.unlearn_steps

    def image_diameter(self) -> arb:
        if self.noise_order == "after":
            return 2 * ball(self.model_clip)
        c, s = self._step()
        return 2 * c * ball(self.model_clip) + s

    def prefix(self, noise: float, steps: int) -> NoisyProcess | None:
        """The first ``steps`` steps, the initial noise before them; any step may restart from the image's diameter."""
        start = []
        if self.init_noise_std > 0:
            start.append(Phase(contraction=1.0, shift=0.0, noise_std=self.init_noise_std, steps=1))
        elif steps:
            # Nothing is known of the two models, but the first step maps both into the ball.
            start.append(Phase(contraction=0.0, shift=self.image_diameter(), noise_std=noise, steps=1))
            steps -= 1
        if not start or (steps and self.grad_clip is None):
            return None
        if steps:
            c, s = self._step()
            start.append(Phase(contraction=c, shift=s, noise_std=noise, steps=steps))
        distance = 2 * ball(self.init_clip) if self.init_noise_std > 0 and self.init_clip is not None else 0.0
        return NoisyProcess(
            phases=tuple(start),
            initial_distance=distance,
            image_diameter=self.image_diameter(),
            # The step of the initial noise does not map into the ball.
            steps_before_restart=1 if self.init_noise_std > 0 else 0,
        )

    def _step(self) -> tuple[arb, arb]:
        assert self.grad_clip is not None
        assert self.step_size is not None
        return finetune.contraction(self.step_size, self.weight_decay), finetune.shift(self.step_size, self.grad_clip)

    def with_unlearn_steps(self, steps: int) -> ModelClip:
        found: ModelClip = self.sharing(replace(self, unlearn_steps=steps))
        return found

    @property
    def steps(self) -> int:
        return self.unlearn_steps

    def assumptions(self) -> list[Assumption]:
        return [
            Assumption(
                name="model_clip",
                value=self.model_clip,
                status="enforced",
                enforced_by=f"every iterate is projected to this norm, the noise {self.noise_order} it",
            ),
            Assumption(
                name="common_kernel",
                value="gradients depend on the iterate, retained records and fresh randomness only",
                status="enforced",
                enforced_by="forgotten rows are dropped before the first batch; optimiser state and buffers are reset",
            ),
        ]

    def parameters(self) -> dict[str, Any]:
        names = ("model_clip", "unlearn_steps", "noise_order", "init_noise_std", "init_clip", "grad_clip")
        return {name: getattr(self, name) for name in (*names, "step_size", "weight_decay")}

    @classmethod
    def from_plan(cls, document: dict[str, Any]) -> ModelClip:
        return cls(
            model_clip=field(document, "parameters.model_clip", "number"),
            unlearn_steps=field(document, "parameters.unlearn_steps", "integer"),
            noise_order=field(document, "parameters.noise_order", "text"),
            init_noise_std=field(document, "parameters.init_noise_std", "number"),
            init_clip=field(document, "parameters.init_clip", "number", optional=True),
            grad_clip=field(document, "parameters.grad_clip", "number", optional=True),
            step_size=field(document, "parameters.step_size", "number", optional=True),
            weight_decay=field(document, "parameters.weight_decay", "number"),
            **cls.stored_sizes(document),
        )


METHOD = ModelClip
