"""What a run needs beside the accounted numbers: the model, batches, blocks, and training phases without noise.

None of it enters the bound, but all of it is fixed in the plan, because a choice made at run time could look at the
forgotten records. A model that is code (a factory, a TorchScript file) is never named here: the plan says "external",
and whoever runs it names the code.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from rdp_calc.documents import field
from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.finetune import check_not_negative, check_positive
from rdp_calc.options import Option, read_float, read_integer

EXTERNAL = "external"

GLM_MODELS = ("logistic", "softmax", "huber")

SCHEDULES = ("constant", "cosine", "one-cycle")

SOLVERS = ("newton-cg", "lbfgs")

BLOCKS = ("layers", "equal")

#: Precisions in which per-record vectors are stored.
STORES = ("float32", "float16", "float64")

MAX_SIZE = 10**9
MAX_EPOCHS = 10**6

#: A parameter name pattern: what names of parameters are made of, and wildcards. No blanks, so that it cannot be a
#: sentence where it is quoted; a name with other characters is matched by "?".
_PATTERN = re.compile(r"[A-Za-z0-9_.*?\[\]!-]{1,500}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stochastic gradient descent without noise: epochs over shuffled records in batches, the first value of the step
    size, its schedule, momentum in [0, 1) and decoupled weight decay.
    """

    epochs: float
    step_size: float
    schedule: str = "constant"
    batch_size: int = 128
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_positive("epochs", self.epochs)
        if self.epochs > MAX_EPOCHS:
            raise InvalidInput(f"epochs must be at most {MAX_EPOCHS}, got {self.epochs!r}.")
        check_positive("step_size", self.step_size)
        check_not_negative("weight_decay", self.weight_decay)
        if self.schedule not in SCHEDULES:
            raise InvalidInput(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}.")
        _check_size("batch_size", self.batch_size)
        if not 0 <= self.momentum < 1:
            raise InvalidInput(f"momentum must be in [0, 1), got {self.momentum!r}.")
        _as_floats(self, "epochs", "step_size", "momentum", "weight_decay")

    @classmethod
    def read(cls, flag: str, text: str | None) -> Recipe | None:
        """A recipe from its text, as epochs=5,step-size=0.05,schedule=cosine,batch-size=128."""
        if text is None:
            return None
        values: dict[str, Any] = {}
        known = {f.name: f for f in fields(cls)}
        for part in text.split(","):
            name, equals, value = part.partition("=")
            key = name.strip().replace("-", "_")
            if not equals or key not in known or key in values:
                allowed = ", ".join(name.replace("_", "-") for name in known)
                raise InvalidInput(f"{flag} takes NAME=VALUE pairs, each of {allowed} once, got {part.strip()!r}.")
            label = f"{key.replace('_', '-')} of {flag}"
            if key == "schedule":
                values[key] = value.strip()
            else:
                values[key] = read_integer(label, value) if key == "batch_size" else read_float(label, value)
        for name in ("epochs", "step_size"):
            if name not in values:
                raise InvalidInput(f"{flag} needs {name.replace('_', '-')}, as {flag} epochs=5,step-size=0.05.")
        return cls(**values)

    @classmethod
    def from_json(cls, document: dict[str, Any], path: str) -> Recipe | None:
        if field(document, path, "object", optional=True) is None:
            return None
        return cls(
            epochs=field(document, f"{path}.epochs", "number"),
            step_size=field(document, f"{path}.step_size", "number"),
            schedule=field(document, f"{path}.schedule", "text"),
            batch_size=field(document, f"{path}.batch_size", "integer"),
            momentum=field(document, f"{path}.momentum", "number"),
            weight_decay=field(document, f"{path}.weight_decay", "number"),
        )


@dataclass(frozen=True, kw_only=True)
class Training:
    """The fields a method does not use keep their defaults.

    model: logistic, softmax, mlp:256-128, cnn-small, or external. input_shape: what a row is reshaped to. trainable:
    patterns of the parameters that are trained and released under the guarantee, None for all. batch_size: minibatch of
    the noisy phase. momentum: of optimizer momentum. blocks: how numbers are split into blocks, by layers, in equal
    parts, or one list of name patterns a block. learn, finetune: phases without noise, before and after. clip_norm: of
    DP-SGD, and for hessian-free the norm of a batch's gradient at which a run stops. step_size: of DP-SGD. solver: of
    gradient-norm, newton and jackknife. store: precision of the vectors that hessian-free keeps.
    """

    model: str = EXTERNAL
    input_shape: tuple[int, ...] | None = None
    trainable: tuple[str, ...] | None = None
    batch_size: int = 128
    momentum: float = 0.9
    blocks: str | tuple[tuple[str, ...], ...] = "layers"
    learn: Recipe | None = None
    finetune: Recipe | None = None
    clip_norm: float | None = None
    step_size: float | None = None
    solver: str = "newton-cg"
    store: str = "float32"

    def __post_init__(self) -> None:
        check_model(self.model)
        if self.input_shape is not None and not (
            1 <= len(self.input_shape) <= 8 and all(1 <= size <= MAX_SIZE for size in self.input_shape)
        ):
            raise InvalidInput(f"input_shape must hold 1 to 8 integers >= 1, got {self.input_shape!r}.")
        groups = [] if self.trainable is None else [self.trainable]
        if isinstance(self.blocks, tuple):
            groups += self.blocks
        elif self.blocks not in BLOCKS:
            raise InvalidInput(f"blocks must be layers, equal, or one list of names a block, got {self.blocks!r}.")
        for group in groups:
            if not group:
                raise InvalidInput("a list of patterns of parameter names must not be empty.")
            for pattern in group:
                if not _PATTERN.fullmatch(pattern):
                    raise InvalidInput(
                        "a pattern of parameter names must be 1 to 500 of the characters A-Z a-z 0-9 _ . * ? [ ] ! -,"
                        f" got {pattern[:60]!r}."
                    )
        _check_size("batch_size", self.batch_size)
        if not 0 <= self.momentum < 1:
            raise InvalidInput(f"momentum must be in [0, 1), got {self.momentum!r}.")
        for name in ("clip_norm", "step_size"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.solver not in SOLVERS:
            raise InvalidInput(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}.")
        if self.store not in STORES:
            raise InvalidInput(f"store must be one of {', '.join(STORES)}, got {self.store!r}.")
        _as_floats(self, "momentum", "clip_norm", "step_size")

    def check_method(self, name: str) -> None:
        """Raise InvalidInput for a field that method ``name`` does not use."""
        used = USED.get(name, ())
        defaults = Training()
        for entry in fields(self):
            if entry.name not in used and getattr(self, entry.name) != getattr(defaults, entry.name):
                raise InvalidInput(f"{name} takes no training.{entry.name}.")

    def check_loss(self, name: str, loss: str | None) -> None:
        """Raise InvalidInput where the model of a method that has a loss is not the model of that loss."""
        if name not in (*GLM_METHODS, *SECOND_ORDER) or self.model == EXTERNAL:
            return
        if loss not in (None, self.model) or (name in GLM_METHODS and self.model not in GLM_MODELS):
            raise InvalidInput(f"{name} with loss {loss} cannot have model {self.model!r}: the model is the loss.")

    def to_json(self, name: str) -> dict[str, Any]:
        """The fields that method ``name`` uses."""
        values = asdict(self)
        return {key: _listed(values[key]) for key in USED.get(name, ())}

    @classmethod
    def from_json(cls, document: dict[str, Any], name: str) -> Training | None:
        """The training block of a plan document; None where it has none. Raises DataError or InvalidInput."""
        block = field(document, "training", "object", optional=True)
        if block is None:
            return None
        odd = sorted(set(block) ^ set(USED.get(name, ())))
        if odd:
            raise DataError(f"field training of a {name} plan lacks, or may not have, {', '.join(odd)}.")
        kinds = {
            "model": "text",
            "batch_size": "integer",
            "momentum": "number",
            "clip_norm": "number",
            "step_size": "number",
            "solver": "text",
            "store": "text",
        }
        values: dict[str, Any] = {}
        for key in block:
            if key in ("learn", "finetune"):
                values[key] = Recipe.from_json(document, f"training.{key}")
            elif key == "input_shape":
                values[key] = _numbers(document, "training.input_shape")
            elif key == "trainable":
                values[key] = _texts(block[key], "training.trainable")
            elif key == "blocks":
                values[key] = _blocks(block[key])
            else:
                optional = key in ("clip_norm", "step_size")
                values[key] = field(document, f"training.{key}", kinds[key], optional=optional)  # type: ignore[arg-type]
        return cls(**values)

    @classmethod
    def from_options(cls, name: str, values: dict[str, Any]) -> Training | None:
        """From the command line's values; None where the method uses none of it, or nothing was said for a GLM method
        that has its model from the loss.
        """
        used = USED.get(name, ())
        flags = {option.name for option in training_options(name)}
        given = {key: value for key, value in values.items() if key in flags and value is not None}
        if not used or (not given and name in (*GLM_METHODS, *SECOND_ORDER)):
            return None
        found: dict[str, Any] = {}
        for key, value in given.items():
            match key:
                case "learn" | "finetune":
                    found[key] = Recipe.read(f"--{key}", value)
                case "input_shape":
                    found[key] = tuple(read_integer("--input-shape", part) for part in str(value).split("x"))
                case "trainable":
                    found[key] = _split(value)
                case "block_by":
                    found["blocks"] = value if value in BLOCKS else tuple(_split(part) for part in value.split(";"))
                case _:
                    found[key] = value
        return cls(**found)


_NETWORK = ("model", "input_shape", "trainable", "learn", "finetune")

#: Methods whose objective the accounting knows: the model is the loss.
GLM_METHODS = ("langevin", "noisy-sgd", "descent-to-delete", "gradient-norm")

#: Methods that run the model of a known loss, or any network where their constants were typed.
SECOND_ORDER = ("hessian-free", "newton", "jackknife")

#: Methods whose guarantee holds whatever model they start from.
ANY_MODEL = ("noisy-finetune", "blockwise-finetune", "model-clip", "output-perturbation")

#: What each method's training block holds.
USED: dict[str, tuple[str, ...]] = {
    "noisy-finetune": (*_NETWORK, "batch_size", "momentum"),
    "blockwise-finetune": (*_NETWORK, "batch_size", "blocks"),
    "model-clip": (*_NETWORK, "batch_size"),
    "output-perturbation": _NETWORK,
    "dp-sgd": ("model", "input_shape", "trainable", "clip_norm", "step_size"),
    "langevin": ("model",),
    "noisy-sgd": ("model",),
    "descent-to-delete": ("model",),
    "gradient-norm": ("model", "solver"),
    "hessian-free": ("model", "input_shape", "trainable", "store", "clip_norm"),
    "newton": ("model", "input_shape", "trainable", "learn", "solver"),
    "jackknife": ("model", "input_shape", "trainable", "learn", "solver"),
}

_ALL_OPTIONS = {
    "model": Option(name="model", kind="text", help="logistic, softmax, mlp:256-128, cnn-small, or external."),
    "input_shape": Option(name="input_shape", kind="text", help="What a row is reshaped to, as 1x28x28."),
    "trainable": Option(
        name="trainable", kind="text", help="Patterns of the parameters to train, as head.*,fc.bias; others are frozen."
    ),
    "batch_size": Option(name="batch_size", kind="int", help="Records in a minibatch.", default="128"),
    "momentum": Option(name="momentum", kind="float", help="Momentum of --optimizer momentum.", default="0.9"),
    "blocks": Option(
        name="block_by", kind="text", help="layers, equal, or name patterns as conv.*;fc.*.", default="layers"
    ),
    "learn": Option(name="learn", kind="text", help="Training without noise, as epochs=5,step-size=0.05."),
    "finetune": Option(name="finetune", kind="text", help="Fine-tuning without noise afterwards, as --learn."),
    "clip_norm": Option(name="clip_norm", kind="float", help="Norm each record's gradient is clipped to."),
    "step_size": Option(name="step_size", kind="float", help="Step size (learning rate)."),
    "solver": Option(name="solver", kind="choice", choices=SOLVERS, default="newton-cg", help="Optimiser."),
    "store": Option(
        name="store", kind="choice", choices=STORES, default="float32", help="Precision of the stored vectors."
    ),
}

#: The same name, another meaning.
_OF_METHOD = {
    ("hessian-free", "clip_norm"): Option(
        name="clip_norm",
        kind="float",
        help="Norm of a batch's gradient at which a run stops: nothing may be clipped.",
    )
}


def training_options(name: str) -> tuple[Option, ...]:
    """The options from which ``Training.from_options`` reads the fields of method ``name``."""
    return tuple(_OF_METHOD.get((name, key), _ALL_OPTIONS[key]) for key in USED.get(name, ()))


def runs_network(name: str, loss: str | None, training: Training | None) -> bool:
    """Whether method ``name`` runs a torch network instead of the model of a loss that the accounting knows."""
    if name in GLM_METHODS:
        return False
    if name in SECOND_ORDER:
        return loss is None and (training is None or training.model not in GLM_MODELS)
    return True


def check_model(spec: str) -> None:
    """Raise InvalidInput unless ``spec`` names a built-in model or is "external"."""
    if spec in (*GLM_MODELS, "cnn-small", EXTERNAL):
        return
    kind, colon, widths = spec.partition(":")
    if kind == "mlp" and colon:
        parts = widths.split("-")
        if len(parts) <= 20 and all(part.isdecimal() and len(part) <= 7 and int(part) >= 1 for part in parts):
            return
    raise InvalidInput(
        f"model must be logistic, softmax, mlp:WIDTH-WIDTH, cnn-small or external, got {spec[:60]!r}; a model of your"
        " own (module:factory, .pt, .pt2) is named at run time, and the plan says external."
    )


def _check_size(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
        raise InvalidInput(f"{name} must be an integer in 1..{MAX_SIZE}, got {value!r}.")


def _as_floats(block: Recipe | Training, *names: str) -> None:
    """A plan reads numbers back as doubles, and must read the same."""
    for name in names:
        if getattr(block, name) is not None:
            object.__setattr__(block, name, float(getattr(block, name)))


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _listed(value: Any) -> Any:
    return [_listed(part) for part in value] if isinstance(value, tuple) else value


def _numbers(document: dict[str, Any], path: str) -> tuple[int, ...] | None:
    stored = field(document, path, "list", optional=True)
    return None if stored is None else tuple(field({"size": size}, "size", "integer") for size in stored)


def _texts(value: Any, path: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise DataError(f"field {path} must be a list of texts.")
    return tuple(value)


def _blocks(value: Any) -> str | tuple[tuple[str, ...], ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError("field training.blocks must be a text or a list of lists of texts.")
    return tuple(_texts(part, "training.blocks") or () for part in value)
