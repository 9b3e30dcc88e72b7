"""The training block of plans: what a run needs beside the accounted numbers."""

from __future__ import annotations

from typing import Any

import pytest

from rdp_calc import DataSpec, NoisyFinetune, OutputPerturbation, Target, noise, plan_from_result, verify_document
from rdp_calc.documents import digest
from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.methods.blockwise_finetune import BlockwiseFinetune
from rdp_calc.methods.dp_sgd import DpSgd
from rdp_calc.methods.langevin import Langevin
from rdp_calc.methods.model_clip import ModelClip
from rdp_calc.plan import plan_from_json
from rdp_calc.training import USED, Recipe, Training

TARGET = Target(epsilon=1.0, delta=1e-5)
RECIPE = Recipe(epochs=2.5, step_size=0.1, schedule="one-cycle", batch_size=32, momentum=0.9, weight_decay=1e-4)
NETWORK = {"model": "cnn-small", "input_shape": (1, 8, 8), "trainable": ("head.*", "fc"), "learn": RECIPE}
FULL: dict[str, Training] = {
    "noisy-finetune": Training(**NETWORK, finetune=RECIPE, batch_size=7, momentum=0.5),
    "blockwise-finetune": Training(**NETWORK, batch_size=7, blocks=(("a.*",), ("b", "c"))),
    "model-clip": Training(**NETWORK, batch_size=7),
    "output-perturbation": Training(**NETWORK, finetune=RECIPE),
    "dp-sgd": Training(model="mlp:8-4", clip_norm=1.0, step_size=0.5),
    "langevin": Training(model="logistic"),
    "gradient-norm": Training(model="softmax", solver="lbfgs"),
}


@pytest.mark.parametrize("name", FULL)
def test_every_field_survives_the_document(name: str) -> None:
    block = FULL[name].to_json(name)
    assert set(block) == set(USED[name])
    assert Training.from_json({"training": block}, name) == FULL[name]
    FULL[name].check_method(name)


@pytest.mark.parametrize("name", ["noisy-finetune", "output-perturbation"])
def test_a_plan_with_a_training_block_verifies_and_every_change_is_found(name: str) -> None:
    method: Any = (
        NoisyFinetune(init_clip=1.0, grad_clip=1.0, step_size=0.1, unlearn_steps=5)
        if name == "noisy-finetune"
        else OutputPerturbation(init_clip=1.0)
    )
    document = plan_from_result(method, noise(method, TARGET), TARGET, data=DataSpec(), training=FULL[name]).to_json()
    assert verify_document(document).holds
    assert plan_from_json(document).training == FULL[name]
    assert "must never have seen" in document["guarantee"]
    assert "head.*, fc" in document["guarantee"]
    block = document["training"]
    for forged in (
        {**block, "trainable": None},
        {**block, "model": "module:factory"},
        {key: value for key, value in block.items() if key != "learn"},
        {**block, "blocks": "equal"},
        {**block, "learn": {**block["learn"], "epochs": -1}},
        {**block, "input_shape": [1, 0]},
    ):
        changed = {**document, "training": forged}
        changed["digest"] = digest(changed)
        assert not verify_document(changed).holds, forged


def test_a_field_of_another_method_is_refused() -> None:
    method = OutputPerturbation(init_clip=1.0)
    found = noise(method, TARGET)
    with pytest.raises(InvalidInput, match=r"output-perturbation takes no training\.clip_norm"):
        plan_from_result(method, found, TARGET, data=DataSpec(), training=Training(clip_norm=1.0))


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("langevin", {}, None),
        ("langevin", {"model": "logistic"}, Training(model="logistic")),
        ("noisy-finetune", {}, Training()),
        ("model-clip", {"batch_size": 9, "input_shape": "3x4x5"}, Training(batch_size=9, input_shape=(3, 4, 5))),
        ("blockwise-finetune", {"block_by": "equal"}, Training(blocks="equal")),
        ("blockwise-finetune", {"block_by": "a.*;b,c"}, Training(blocks=(("a.*",), ("b", "c")))),
        ("dp-sgd", {"clip_norm": 2.0, "step_size": 0.1, "batch_size": 5}, Training(clip_norm=2.0, step_size=0.1)),
        ("gradient-norm", {"solver": "lbfgs"}, Training(solver="lbfgs")),
        ("newton", {}, None),
        ("jackknife", {"model": "logistic"}, Training(model="logistic")),
        ("hessian-free", {"store": "float16", "batch_size": 5}, Training(store="float16")),
    ],
)
def test_from_the_command_line(name: str, values: dict[str, Any], expected: Training | None) -> None:
    assert Training.from_options(name, values) == expected


def test_integers_read_back_the_same() -> None:
    method = OutputPerturbation(init_clip=1.0)
    training = Training(learn=Recipe(epochs=4, step_size=1, momentum=0, weight_decay=0))
    document = plan_from_result(method, noise(method, TARGET), TARGET, data=DataSpec(), training=training).to_json()
    assert verify_document(document).holds


def test_a_recipe_from_its_text() -> None:
    text = "epochs=2.5,step-size=0.1,schedule=one-cycle,batch-size=32,momentum=0.9,weight_decay=1e-4"
    assert Recipe.read("--learn", text) == RECIPE
    assert Recipe.read("--learn", None) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs=1", "--learn needs step-size"),
        ("epochs=1,step-size=0.1,epochs=2", "once"),
        ("epochs=1,step-size=0.1,rate=2", "got 'rate=2'"),
        ("5", "NAME=VALUE"),
        ("epochs=nan,step-size=1", "must be a number"),
        ("epochs=inf,step-size=1", "epochs must be a finite number > 0"),
        ("epochs=1,step-size=0", "step_size must be"),
        ("epochs=1,step-size=1,schedule=linear", "schedule must be one of"),
        ("epochs=1,step-size=1,batch-size=0", "batch_size must be an integer"),
        ("epochs=1,step-size=1,batch-size=1.5", "must be an integer"),
        ("epochs=1,step-size=1,momentum=1", r"momentum must be in \[0, 1\)"),
        ("epochs=1,step-size=1,weight-decay=-1", "weight_decay must be"),
    ],
)
def test_bad_recipes(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Recipe.read("--learn", text)


@pytest.mark.parametrize(
    "model", ["resnet", "mlp", "mlp:", "mlp:0", "mlp:8-", "mlp:-8", "mlp:8-x", "os:system", "a.pt", "mlp:99999999", ""]
)
def test_models_a_plan_may_not_name(model: str) -> None:
    with pytest.raises(InvalidInput, match="model must be"):
        Training(model=model)


@pytest.mark.parametrize("model", ["logistic", "softmax", "mlp:256-128", "mlp:1", "cnn-small", "external"])
def test_models_a_plan_may_name(model: str) -> None:
    assert Training(model=model).model == model


@pytest.mark.parametrize(
    "values",
    [
        {"input_shape": ()},
        {"input_shape": (0, 3)},
        {"trainable": ()},
        {"trainable": ("",)},
        {"trainable": ("head.*", "fc.weight and more")},
        {"trainable": ("head\n",)},
        {"trainable": ("x" * 501,)},
        {"blocks": (("head.*",), ("fc bias",))},
        {"blocks": "rows"},
        {"blocks": ((),)},
        {"batch_size": 0},
        {"momentum": 1.0},
        {"momentum": float("nan")},
        {"clip_norm": 0.0},
        {"step_size": float("inf")},
        {"solver": "sgd"},
    ],
)
def test_bad_fields(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        Training(**values)


@pytest.mark.parametrize("block", [[], "x", {"model": "softmax"}, 3])
def test_ill_formed_blocks(block: Any) -> None:
    with pytest.raises(DataError, match="training"):
        Training.from_json({"training": block}, "dp-sgd")


# Fields of methods that only a run needs


def test_a_clamp_is_recorded_and_never_beyond_the_clip() -> None:
    method = NoisyFinetune.from_options(init_clamp=0.1, dimension=100, grad_clip=1.0, step_size=0.1)
    assert (method.init_clamp, method.dimension) == (0.1, 100)
    assert 1.0 <= method.init_clip < 1.0000000001
    document = plan_from_result(method, noise(method, TARGET), TARGET, data=DataSpec()).to_json()
    assert verify_document(document).holds
    stored: Any = plan_from_json(document).method
    assert (stored.init_clamp, stored.dimension, stored.init_clip) == (0.1, 100, method.init_clip)
    for name, value in (("init_clamp", 0.11), ("dimension", 101), ("init_clamp", None)):
        changed = {**document, "parameters": {**document["parameters"], name: value}}
        changed["digest"] = digest(changed)
        assert not verify_document(changed).holds, name


@pytest.mark.parametrize(("loss", "exact"), [("logistic", 0.25), ("huber", 0.25)])
def test_a_residual_clip_lowers_lipschitz_and_nothing_else(loss: str, exact: float) -> None:
    given = {"dataset_size": 100, "adjacency": "remove", "loss": loss, "l2": 0.1, "unlearn_steps": 2}
    given |= {"huber_threshold": 1.0} if loss == "huber" else {}
    plain, clipped = Langevin.from_options(**given), Langevin.from_options(**given, residual_clip=exact)
    assert clipped.constants.lipschitz == exact
    assert clipped.constants.smoothness == plain.constants.smoothness
    assert clipped.constants.strong_convexity == plain.constants.strong_convexity
    # The noise is proportional to the Lipschitz constant.
    assert noise(clipped, TARGET).sigma == pytest.approx(exact * noise(plain, TARGET).sigma, rel=1e-12)
    loose = Langevin.from_options(**given, residual_clip=5.0)
    assert loose.constants.lipschitz == plain.constants.lipschitz
    document = plan_from_result(clipped, noise(clipped, TARGET), TARGET, data=DataSpec()).to_json()
    assert verify_document(document).holds
    assert any(entry["name"] == "residual_clip" for entry in document["assumptions"])
    changed = {**document, "problem": {**document["problem"], "residual_clip": 0.5}}
    changed["digest"] = digest(changed)
    assert not verify_document(changed).holds


def test_a_softmax_residual_may_not_be_clipped() -> None:
    with pytest.raises(InvalidInput, match="residual_clip is for loss logistic or huber"):
        Langevin.from_options(
            dataset_size=9, adjacency="remove", loss="softmax", l2=0.1, unlearn_steps=1, residual_clip=1.0
        )


def test_typed_constants_take_no_residual_clip() -> None:
    with pytest.raises(InvalidInput, match="--residual-clip needs --loss"):
        Langevin.from_options(
            dataset_size=9,
            adjacency="remove",
            lipschitz=1.0,
            strong_convexity=0.1,
            smoothness=1.0,
            unlearn_steps=1,
            residual_clip=1.0,
        )


def test_methods_of_the_table_exist() -> None:
    found = {kind.NAME for kind in (NoisyFinetune, BlockwiseFinetune, ModelClip, OutputPerturbation, DpSgd, Langevin)}
    assert found <= set(USED)


@pytest.mark.parametrize("model", ["softmax", "mlp:5", "cnn-small"])
def test_the_model_of_a_method_with_a_loss_is_that_loss(model: str) -> None:
    method = Langevin.from_options(dataset_size=9, adjacency="remove", loss="logistic", l2=0.1, unlearn_steps=1)
    found = noise(method, TARGET)
    with pytest.raises(InvalidInput, match="the model is the loss"):
        plan_from_result(method, found, TARGET, data=DataSpec(), training=Training(model=model))
    plan_from_result(method, found, TARGET, data=DataSpec(), training=Training(model="logistic"))


def test_a_recipe_ends() -> None:
    with pytest.raises(InvalidInput, match="epochs must be at most"):
        Recipe(epochs=1e308, step_size=0.1)
