"""rdp-calc baseline METHOD -o DIR: unlearning that certifies nothing, to compare the certified methods with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cli.commands.plan import _DATA_OPTIONS, _data_spec, read_center
from cli.options import command
from cli.render import console, metrics_table, plain, print_json
from rdp_calc.errors import GuardFailed, InvalidInput
from rdp_calc.options import Option, read_integer, require
from rdp_calc.plan import DataSpec
from rdp_calc.training import EXTERNAL, Recipe, Training, check_model

if TYPE_CHECKING:
    from unlearn_runtime.baseline_methods import Settings
    from unlearn_runtime.baseline_start import Origin

_MODEL_OPTIONS = (
    Option(name="model", kind="text", help="logistic, softmax, mlp:64, cnn-small, MODULE:FACTORY, a .pt or .pt2 file."),
    Option(name="input_shape", kind="text", help="What a row is reshaped to, as 1x28x28."),
    Option(name="trainable", kind="text", help="Patterns of the parameters to train, as head.*; others are frozen."),
    Option(name="learn", kind="text", help="The training, as epochs=20,step-size=0.5,batch-size=64."),
    Option(name="start", kind="text", help="Model to unlearn instead: a file, or the folder of a run or baseline."),
    Option(name="forget", kind="text", help="Records to forget: 3,17,40-59 or @ids.txt."),
)
_RUN_OPTIONS = (
    Option(name="retrain", kind="flag", help="Also retrain on the retained records, to compare."),
    Option(name="trials", kind="int", help="Independent runs, for measuring; the first is kept.", default="1"),
    Option(name="device", kind="choice", choices=("cpu", "cuda", "auto"), help="Where to compute.", default="auto"),
    Option(name="dtype", kind="choice", choices=("float32", "float64"), help="Precision.", default="float32"),
    Option(name="seed", kind="int", help="The same random choices every time."),
)
_UNLEARN = Option(name="unlearn", kind="text", help="The training that unlearns, as epochs=1,step-size=0.01.")
_INSTANCE_WISE = (
    Option(name="requests", kind="text", help="Several requests one after another instead of --forget, as '3,4;7,9'."),
    Option(name="step_size", kind="float", help="Step size (learning rate).", default="0.01"),
    Option(name="momentum", kind="float", help="Momentum.", default="0.9"),
    Option(name="weight_decay", kind="float", help="Decoupled weight decay.", default="0"),
    Option(name="batch_size", kind="int", help="Forgotten records in a step.", default="32"),
    Option(name="max_steps", kind="int", help="Limit of the steps of a request.", default="1000"),
    Option(name="adversarial", kind="int", help="Adversarial examples a forgotten record; 0: none.", default="20"),
    Option(name="attack_radius", kind="float", help="How far they are from it, in prepared rows.", default="0.1"),
    Option(name="attack_steps", kind="int", help="Steps of the attack that makes them.", default="100"),
    Option(
        name="importance", kind="float", help="Pull on weights that matter little for them; 0: none.", default="0.01"
    ),
)

_LEARN = "--data builtin:digits --model mlp:64 --learn epochs=20,step-size=0.5,batch-size=64"


@dataclass(frozen=True)
class _Method:
    """A sub-command: what it does, its own options, and the end of its worked example."""

    name: str
    help: str
    options: tuple[Option, ...]
    example: str


_METHODS = (
    _Method(
        "retrain",
        "Train again without the records: exact by construction.",
        (
            Option(name="same_order", kind="flag", help="From the same initial weights, in the same batches."),
            Option(name="keep_divisor", kind="flag", help="With --same-order: divide by whole batches (zero-out)."),
        ),
        f"{_LEARN} --same-order",
    ),
    _Method(
        "sisa",
        "An ensemble on shards and slices, of which a request retrains a part: exact by construction.",
        (
            Option(name="shards", kind="int", help="Models, each on its part of the records.", default="1"),
            Option(name="slices", kind="int", help="Parts of a shard, with a checkpoint after each.", default="1"),
        ),
        f"{_LEARN} --shards 4 --slices 3",
    ),
    _Method(
        "finetune", "Train on with the retained records.", (_UNLEARN,), f"{_LEARN} --unlearn epochs=2,step-size=0.1"
    ),
    _Method(
        "neggrad",
        "Climb the loss of the forgotten records.",
        (_UNLEARN,),
        f"{_LEARN} --unlearn epochs=5,step-size=0.05",
    ),
    _Method(
        "descent-ascent",
        "Lower the retained records' loss and climb the forgotten ones'.",
        (_UNLEARN, Option(name="mixing", kind="float", help="Weight of the retained records.", default="0.9")),
        f"{_LEARN} --unlearn epochs=1,step-size=0.05",
    ),
    _Method(
        "random-relabel",
        "Train on with random wrong labels for the forgotten records.",
        (_UNLEARN, Option(name="alone", kind="flag", help="On the forgotten records only.")),
        f"{_LEARN} --unlearn epochs=2,step-size=0.1",
    ),
    _Method("misclassify", "Until every forgotten record is misclassified.", _INSTANCE_WISE, _LEARN),
    _Method(
        "relabel",
        "Until every forgotten record gets another label.",
        (Option(name="new_labels", kind="text", help="One class, one a record, or random (default)."), *_INSTANCE_WISE),
        f"{_LEARN} --new-labels random",
    ),
)

app = typer.Typer(
    help="Unlearn exactly or empirically, without any certificate.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
)


@app.callback()
def _root() -> None:
    pass


def _add(method: _Method) -> None:
    def body(values: dict[str, Any], *, output: Path, as_json: bool, quiet: bool) -> None:
        require(values, "data")
        learn = Recipe.read("--learn", values["learn"])
        training, model = _training(values, learn)
        try:
            from cli.progress import progress_bar
            from unlearn_runtime.baseline import Baseline
            from unlearn_runtime.baseline_start import read_origin
            from unlearn_runtime.execution import Execution
        except ModuleNotFoundError as error:
            raise GuardFailed(
                f"{error.name} is not installed; install the runtime: pip install 'rdp-calc[runtime]'."
            ) from None
        start = None if values["start"] is None else Path(values["start"])
        origin = read_origin(start)
        baseline = Baseline(
            method=method.name,
            data=values["data"],
            output=output,
            spec=_spec(values) if origin is None else _same_spec(values, origin),
            training=training,
            model=model,
            settings=_settings(values),
            forget=values["forget"],
            requests=values.get("requests"),
            new_labels=values.get("new_labels"),
            start=start,
            execution=Execution(
                chains=1 if values["trials"] is None else values["trials"],
                device=values["device"] or "auto",
                dtype=values["dtype"],
                seed=values["seed"],
                retrain="fresh" if values["retrain"] else None,
            ),
        )
        summary = baseline.run(progress=None if quiet else progress_bar)
        if as_json:
            print_json(summary)
        elif quiet:
            print(output)
        else:
            _show(summary)

    command(
        app,
        method.name,
        body,
        (*_DATA_OPTIONS, *_MODEL_OPTIONS, *method.options, *_RUN_OPTIONS),
        help=f"{method.help} Certifies nothing.",
        example=f"rdp-calc baseline {method.name} {method.example} --forget 3,17 -o unlearned",
        output="New or empty folder, written whole or not at all.",
    )


def _training(values: dict[str, Any], learn: Recipe | None) -> tuple[Training, str | None]:
    """The training block, and the reference of a model that is code."""
    model = values["model"]
    built_in = model is not None and (":" not in model or model.startswith("mlp:"))
    if model == EXTERNAL:
        raise InvalidInput("--model external is what plans say of a model that is code; name the code.")
    if built_in and not model.endswith((".pt", ".pth", ".pt2")):
        check_model(model)
        if model == "huber":
            raise InvalidInput("--model huber is a regression; baselines take classifiers.")
    else:
        built_in = False
    shape, trainable = values["input_shape"], values["trainable"]
    training = Training(
        model=model if built_in else EXTERNAL,
        input_shape=None if shape is None else tuple(read_integer("--input-shape", p) for p in shape.split("x")),
        trainable=None if trainable is None else tuple(part.strip() for part in trainable.split(",")),
        learn=learn,
    )
    return training, None if built_in else model


def _spec(values: dict[str, Any]) -> DataSpec:
    return _data_spec({**values, "dataset_size": None, "loss": None})


def _same_spec(values: dict[str, Any], origin: Origin) -> DataSpec:
    """The data preparation of the start, after checking that nothing else was asked for."""
    spec = origin.spec
    classes = values["classes"]
    asked = {
        "classes": None if classes is None else tuple(text.strip() for text in classes.split(",")),
        "preprocess": values["preprocess"],
        "data_center": read_center(values["data_center"]),
        "feature_norm": values["feature_norm"],
        "intercept": values["intercept"] or None,
        "label": values["label"],
    }
    for name, value in asked.items():
        theirs = getattr(spec, "center" if name == "data_center" else name)
        if value is not None and value != theirs:
            raise InvalidInput(
                f"--{name.replace('_', '-')} is not what {origin.folder} was made with ({theirs}); leave it out."
            )
    return spec


def _settings(values: dict[str, Any]) -> Settings:
    from unlearn_runtime.algorithms.instance_wise import InstanceWise
    from unlearn_runtime.baseline_methods import Settings

    def given(kind: type, names: tuple[str, ...]) -> Any:
        return kind(**{name: values[name] for name in names if values.get(name) is not None})

    wise = tuple(option.name for option in _INSTANCE_WISE if option.name != "requests")
    return Settings(
        same_order=bool(values.get("same_order")),
        keep_divisor=bool(values.get("keep_divisor")),
        shards=_or(values.get("shards"), 1),
        slices=_or(values.get("slices"), 1),
        unlearn=Recipe.read("--unlearn", values.get("unlearn")),
        mixing=_or(values.get("mixing"), 0.9),
        alone=bool(values.get("alone")),
        instance_wise=given(InstanceWise, wise),
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


_REACHED = {
    "misclassified": "every forgotten record misclassified after",
    "relabelled": "every forgotten record relabelled after",
    "limit": "stopped at the limit of",
    "retrained": "retrained in",
    "epochs": "trained for",
}


def _ending(summary: dict[str, Any]) -> str:
    """How unlearning ended, as a clause; empty where nothing was forgotten."""
    stop = summary["stop"]
    if not stop:
        return ""
    if "requests" in stop:
        return f"; {stop['steps']:,} steps for {len(stop['requests'])} requests"
    text = f"; {_REACHED[stop['reason']]} {_count(stop['steps'], 'step')}"
    if stop["reason"] == "limit":
        text += f", forget accuracy {summary['metrics']['after']['forget_accuracy']['mean']:.2f}"
    if "slices" in stop:
        epochs, whole = stop["record_epochs"], stop["record_epochs_from_scratch"]
        retrained = f"{_count(stop['slices'], 'slice')} of {_count(stop['members'], 'member')}"
        text += f": {retrained}, {epochs / whole:.0%} of training afresh"
    return text


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def _show(summary: dict[str, Any]) -> None:
    out = console()
    out.print(metrics_table(summary["metrics"]))
    text = f"{summary['output']}: {summary['method']}, {summary['kind']}, certificate level none{_ending(summary)}"
    out.print(plain(text), markup=False)
    for number, request in enumerate(summary["stop"].get("requests", ()), start=1):
        out.print(f"request {number}: {_REACHED[request['reason']]} {_count(request['steps'], 'step')}", markup=False)
    out.print(plain(summary["statement"]), markup=False, style="yellow")


for _method in _METHODS:
    _add(_method)
