"""rdp-calc plan METHOD -o PLAN.json, and plan show PLAN.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer

from cli.options import BOUND_OPTION, TARGET_OPTIONS, command, per_method, read_target, split
from cli.render import print_json, show_plan
from rdp_calc import calibrate
from rdp_calc.descent import Descent
from rdp_calc.documents import digest, pretty, read_document, read_text
from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.methods import Method
from rdp_calc.methods.newton import Newton
from rdp_calc.options import Option, read_float
from rdp_calc.plan import PLAN_SCHEMA, PREPROCESS, DataSpec, plan_from_json, plan_from_result
from rdp_calc.training import GLM_METHODS, GLM_MODELS, SECOND_ORDER, Training, runs_network, training_options

_DATA_OPTIONS = (
    Option(name="data", kind="text", help="Data to plan for: size, features and classes are read from it."),
    Option(name="classes", kind="text", help="Classes to keep, in order, as 3,8."),
    Option(name="preprocess", kind="choice", choices=PREPROCESS, default="unit-norm", help="How rows are prepared."),
    Option(name="data_center", kind="text", help="Constant subtracted by center-unit-norm: a number or @FILE."),
    Option(name="feature_norm", kind="float", help="Bound B on the norm of a row (default 1)."),
    Option(name="intercept", kind="flag", help="Append a feature that is always 1."),
    Option(name="label", kind="text", help="Label column of a .csv or .parquet."),
)
_LEARNING_OPTIONS = (
    Option(name="init", kind="text", default="zeros", help="Initial point: zeros or normal:STD."),
    Option(name="execute_learn_steps", kind="int", help="Learning steps to carry out (default learn-steps, or 10000)."),
)


def _add(app: typer.Typer, method: type[Method]) -> None:
    learns = issubclass(method, Descent)
    options = (
        *TARGET_OPTIONS,
        *method.OPTIONS,
        BOUND_OPTION,
        *_DATA_OPTIONS,
        *training_options(method.NAME),
        *(_LEARNING_OPTIONS if learns else ()),
    )

    def body(values: dict[str, Any], *, output: Path, as_json: bool, quiet: bool) -> None:
        _check_output(output)
        training = _training(method.NAME, values)
        spec = _data_spec(values)
        target = read_target(values)
        problem = method.from_options(**split(values, method.OPTIONS))
        result = calibrate.noise(problem, target, bound=values["bound"] or "best")
        plan = plan_from_result(
            problem,
            result,
            target,
            data=spec,
            executed_learn_steps=values.get("execute_learn_steps"),
            init=values.get("init"),
            training=training,
        )
        document = plan.to_json()
        from unlearn_runtime.folders import write_file

        write_file(output, pretty(document))
        if isinstance(problem, Newton) and problem.residual == 0 and not (quiet or as_json):
            # It is not refused: what it claims is true, and sigma says the same.
            print("note: no run solves exactly; to run this plan, make it with --residual 1e-9.", file=sys.stderr)
        _show(document, as_json=as_json, quiet=quiet)

    example = f"rdp-calc plan {method.EXAMPLE} -o plan.json"
    command(app, method.NAME, body, options, help=method.SUMMARY, example=example, output=True)


def _training(name: str, values: dict[str, Any]) -> Training | None:
    """The training block. A model whose loss the accounting knows is that loss; it is named apart from it only where
    the constants were typed.
    """
    model = values.get("model")
    if name in GLM_METHODS and model is not None:
        if model not in GLM_MODELS:
            raise InvalidInput(f"{name} takes --model {', '.join(GLM_MODELS)}, got {model!r}.")
        if values.get("loss") not in (None, model):
            raise InvalidInput(f"--model {model} needs --loss {model}, got {values['loss']}.")
        if values.get("loss") == model:
            values = {**values, "model": None}
    if name in SECOND_ORDER and model is not None and values.get("loss") == model:
        values = {**values, "model": None}
    training = Training.from_options(name, values)
    needs_recipe = name in ("newton", "jackknife") and training is not None and training.learn is None
    if needs_recipe and runs_network(name, values.get("loss"), training):
        raise InvalidInput(f"a {name} plan of a network needs --learn, the training that comes before the solver.")
    return training


def _check_output(path: Path) -> None:
    """A plan may replace a plan and nothing else."""
    if not path.exists():
        return
    try:
        replaceable = read_document(path).get("schema") == PLAN_SCHEMA
    except DataError:
        replaceable = False
    if not replaceable:
        raise InvalidInput(f"{path} exists and is not a plan; choose a new name.")


def _data_spec(values: dict[str, Any]) -> DataSpec:
    """What the data must look like; with --data its size goes into ``values`` and its shape into the result."""
    classes = None if values["classes"] is None else tuple(text.strip() for text in values["classes"].split(","))
    if classes is not None and (len(classes) < 2 or len(set(classes)) < len(classes) or "" in classes):
        raise InvalidInput(f"--classes must name two or more different classes, got {values['classes']!r}.")
    features = None
    if values["data"] is not None:
        from unlearn_runtime.data import load, select_classes

        real = values.get("loss") == "huber" and classes is None
        dataset = load(values["data"], label=values["label"], real_labels=real)
        if not real:
            dataset, classes = select_classes(dataset, classes)
        features = int(dataset.x_train.shape[1])
        size = len(dataset.y_train)
        if values["dataset_size"] not in (None, size):
            raise InvalidInput(f"--dataset-size is {values['dataset_size']}, but {values['data']} has {size} records.")
        values["dataset_size"] = size
        needs_center = values["preprocess"] == "center-unit-norm" and values["data_center"] is None
        if needs_center and dataset.x_train.dtype.name != "uint8":
            raise InvalidInput("center-unit-norm on data other than bytes needs --data-center, a fixed constant.")
    if values.get("loss") in ("logistic", "huber") and classes is not None and len(classes) != 2:
        raise InvalidInput(f"loss {values['loss']} takes two classes, got {len(classes)}; choose two with --classes.")
    if values.get("loss") == "softmax" and classes is None:
        raise InvalidInput("loss softmax needs --classes (or --data) so that the class list is fixed in the plan.")
    return DataSpec(
        features=features,
        classes=classes,
        preprocess=values["preprocess"] or "unit-norm",
        center=read_center(values["data_center"]),
        feature_norm=1.0 if values["feature_norm"] is None else values["feature_norm"],
        intercept=bool(values["intercept"]),
        label=values["label"],
    )


def read_center(text: str | None) -> float | tuple[float, ...] | None:
    """A constant to subtract from rows: a number, or numbers in a text file @FILE; None where not given."""
    if text is None:
        return None
    if not text.startswith("@"):
        return read_float("--data-center", text)
    words = read_text(Path(text[1:])).split()
    return tuple(read_float(f"number {i + 1} of {text[1:]}", word) for i, word in enumerate(words))


def _show(document: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json(document)
    elif quiet:
        sigma = document["parameters"]["sigma"]
        print(json.dumps(document["parameters"]["noise_std"] if sigma is None else sigma))
    else:
        show_plan(document)


app = per_method("plan", _add, help="Write a certified unlearning plan, or show one.")


@app.command("show", help="Show a plan.\n\nExample: [cyan]rdp-calc plan show plan.json[/cyan]")
def show(
    file: Path = typer.Argument(..., help="A plan."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Only the noise."),
) -> None:
    document = read_document(file)
    if document.get("digest") != digest(document):
        raise DataError("plan digest is wrong: the plan was changed after it was written; make a new one.")
    try:
        plan_from_json(document)
    except InvalidInput as error:
        raise DataError(f"{file} is not a plan this version can read: {error}") from None
    _show(document, as_json=as_json, quiet=quiet)
