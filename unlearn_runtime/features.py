"""Records turned into the outputs of a fixed network: data for the linear methods, whose guarantees are the strongest.

The network must not have seen the records that may have to be forgotten: the features of the others would remember
them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.training import check_model
from unlearn_runtime.array_files import DAMAGED_HEADER, read_header
from unlearn_runtime.data import Dataset, load, preprocess, select_classes
from unlearn_runtime.data.prepare import LARGEST_FEATURE_NORM
from unlearn_runtime.folders import move, remove_stale, reserve, working_folder
from unlearn_runtime.models import build, input_shape_for, load_module, read_weights
from unlearn_runtime.network import check_tensors, set_mode, some_names
from unlearn_runtime.stepper import Progress
from unlearn_runtime.tensor_files import save_array

FEATURES_SCHEMA = "rdp-calc/features/1"
_CACHE_SCHEMA = "rdp-calc/features-source/1"

REMINDER = (
    "The network must not have been trained on records that may have to be forgotten: unlearning does not reach into "
    "features."
)

_PROBE_ROWS = 3
_TOLERANCE = 1e-3

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How rows are prepared, as in a plan; with ``none`` rows of any length pass."""

    mode: str = "none"
    feature_norm: float | None = None
    center: float | tuple[float, ...] | None = None

    def apply(self, rows: Array) -> Array:
        """Prepared rows, float32."""
        default = LARGEST_FEATURE_NORM if self.mode == "none" else 1.0
        norm = default if self.feature_norm is None else self.feature_norm
        return preprocess(
            rows, mode=self.mode, feature_norm=norm, center=self.center, intercept=False, dtype=np.float32
        )


class Extractor:
    """A network in evaluation mode, or up to one of its layers, as a map from prepared rows to features.

    Raises InvalidInput for a layer that does not exist, GuardFailed where the features of a row depend on other rows,
    on chance, or on what was seen before.
    """

    def __init__(
        self, module: torch.nn.Module, *, layer: str | None, input_shape: tuple[int, ...], device: torch.device
    ) -> None:
        self.module = module.to(device)
        self.layer = layer
        self.input_shape = input_shape
        self.device = device
        self.dtype = next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.float32)
        self._seen: list[Any] = []
        set_mode(module, False)
        if layer is not None:
            names = dict(module.named_modules())
            if layer not in names or not layer:
                raise InvalidInput(
                    f"the model has no layer {layer!r}; it has {some_names(dict(list(names.items())[1:]))}."
                )
            try:
                names[layer].register_forward_hook(lambda _, inputs, output: self._seen.append(output))
            except RuntimeError:
                raise InvalidInput("--layer does not reach into TorchScript files; name a factory.") from None
        self._check()

    def __call__(self, rows: Array) -> Array:
        """Features (n, k) float32 of prepared rows (n, d)."""
        return self._features(torch.from_numpy(rows)).to(torch.float32).cpu().numpy()

    def _features(self, rows: torch.Tensor) -> torch.Tensor:
        self._seen.clear()
        inputs = rows.to(self.device, self.dtype).reshape(len(rows), *self.input_shape)
        try:
            with torch.no_grad():
                output: Any = self.module(inputs)
        except Exception as error:  # a module of somebody else may fail in any way
            text = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
            if "memory" in text:
                raise InvalidInput("a batch needs more memory than there is; use a smaller --batch-size.") from None
            raise GuardFailed(
                f"the model cannot be run on {'x'.join(map(str, inputs.shape))} numbers: {text}; it may need another "
                "--input-shape."
            ) from None
        if self.layer is not None:
            if len(self._seen) != 1:
                raise InvalidInput(f"layer {self.layer} runs {len(self._seen)} times a row; it must run once.")
            output = self._seen[0]
        if not isinstance(output, torch.Tensor) or output.ndim == 0 or len(output) != len(rows):
            raise GuardFailed("the layer or model must give one tensor with one entry a row; name another --layer.")
        return output.reshape(len(rows), -1)

    def _check(self) -> None:
        """Three drawn rows, together and alone: no guarantee rests on their values."""
        rows = torch.randn((_PROBE_ROWS, *self.input_shape), generator=torch.Generator().manual_seed(0))
        state = [*self.module.parameters(), *self.module.buffers()]
        before = [tensor.detach().clone() for tensor in state]
        together = self._features(rows)
        again = self._features(rows)
        alone = torch.cat([self._features(rows[i : i + 1]) for i in range(len(rows))])
        if not all(torch.equal(tensor, old) for tensor, old in zip(state, before, strict=True)):
            raise GuardFailed("the model changes while it is run, so features would depend on the rows before them.")
        for other, what in ((again, "are random"), (alone, "depend on the other rows of its batch")):
            if together.shape != other.shape or not torch.allclose(together, other, rtol=_TOLERANCE, atol=_TOLERANCE):
                raise GuardFailed(f"the features of a row {what}, in evaluation mode; use a model where they do not.")


def extract_features(
    data: str,
    model: str,
    output: Path,
    *,
    layer: str | None = None,
    start: Path | None = None,
    classes: Sequence[str] | None = None,
    label: str | None = None,
    preparation: Preparation | None = None,
    input_shape: tuple[int, ...] | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``output``, a .npz of X_train, y_train and, where there is a test set, X_test, y_test; returns a summary
    (schema rdp-calc/features/1).

    X is float32 (n, k), the flattened output of the model or of ``layer``; y are the labels as read. ``model`` is a
    built-in (which needs ``start``), or what ``load_module`` takes. No more than one batch of features is in memory.
    The file is written whole or not at all; a file already there that was made from the same data, model and options is
    kept, any other is never replaced.

    Raises InvalidInput, DataError or GuardFailed, one line each.
    """
    preparation = preparation or Preparation()
    begun = time.perf_counter()
    if batch_size < 1:
        raise InvalidInput(f"batch size must be at least 1, got {batch_size}.")
    _check_output(output)
    dataset, names = select_classes(load(data, label=label), classes)
    module, shape = _module(model, start, dataset, len(names), input_shape)
    source = _fingerprint(
        dataset, module, model, layer=layer, classes=list(names), preparation=repr(preparation), shape=list(shape)
    )
    cached = output.exists()
    if cached and _source_of(output) != source:
        raise InvalidInput(f"{output} was made from other data, another model or other options; choose a new name.")
    if not cached:
        extractor = Extractor(module, layer=layer, input_shape=shape, device=torch.device(device))
        with working_folder(output) as folder:
            _write(folder, dataset, extractor, preparation, batch_size, progress or _silent)
            _pack(folder, folder / "features.npz", source)
            (folder / "features.npz").chmod(0o600)
            move(folder / "features.npz", output)
    return {
        "schema": FEATURES_SCHEMA,
        "output": str(output),
        "cached": cached,
        "model": model,
        "layer": layer,
        "train_records": len(dataset.y_train),
        "test_records": 0 if dataset.y_test is None else len(dataset.y_test),
        "features": _width(output),
        "classes": list(names),
        "seconds": round(time.perf_counter() - begun, 3),
        "reminder": REMINDER,
    }


@contextlib.contextmanager
def _silent(name: str, steps: int) -> Iterator[Callable[[int], None]]:
    yield lambda step: None


def _check_output(output: Path) -> None:
    if output.suffix != ".npz":
        raise InvalidInput(f"output {output} must end in .npz.")
    parent = output.absolute().parent
    if not parent.is_dir():
        raise InvalidInput(f"the folder {parent} does not exist; create it first.")
    # Here too where the file is kept.
    remove_stale(output)
    if output.exists() and _source_of(output) is None:
        raise InvalidInput(f"{output} exists and is not a file of features; choose a new name.")


def _module(
    model: str, start: Path | None, dataset: Dataset, classes: int, input_shape: tuple[int, ...] | None
) -> tuple[torch.nn.Module, tuple[int, ...]]:
    features = int(dataset.x_train.shape[1])
    if "." not in model and model != "external" and (model.startswith("mlp:") or ":" not in model):
        check_model(model)
        shape = input_shape_for(model, features, input_shape) or (features,)
        if start is None:
            raise InvalidInput(f"model {model} needs --start, a .safetensors file with its trained numbers.")
        module = build(model, features, classes, shape)
    else:
        shape = input_shape_for("external", features, input_shape) or (features,)
        module = load_module(model)
    if start is not None:
        weights = read_weights(start)
        state = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
        check_tensors(weights, {name: tuple(value.shape) for name, value in state.items()})
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(weights[name])
    return module, shape


def _write(
    folder: Path, dataset: Dataset, extractor: Extractor, preparation: Preparation, batch_size: int, progress: Any
) -> None:
    parts = [("train", dataset.x_train, dataset.y_train)]
    if dataset.x_test is not None and dataset.y_test is not None:
        parts.append(("test", dataset.x_test, dataset.y_test))
    for part, rows, labels in parts:
        save_array(labels, folder / f"y_{part}.npy")
        target: Array | None = None
        starts = range(0, len(rows), batch_size)
        with progress(f"features, {part}", len(starts)) as on_step:
            for step, begin in enumerate(starts, start=1):
                found = extractor(preparation.apply(rows[begin : begin + batch_size]))
                finite = np.isfinite(found).all(axis=1)
                if not finite.all():
                    bad = begin + int(np.flatnonzero(~finite)[0])
                    raise DataError(f"the model's features of {part} row {bad} are not finite.")
                if target is None:
                    file, shape = folder / f"X_{part}.npy", (len(rows), found.shape[1])
                    target = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
                    reserve(file)
                target[begin : begin + len(found)] = found
                on_step(step)
        del target


def _pack(folder: Path, target: Path, source: str) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for path in sorted(folder.glob("*.npy")):
            archive.write(path, path.name)
        archive.comment = json.dumps({"schema": _CACHE_SCHEMA, "source": source}).encode()


def _source_of(path: Path) -> str | None:
    """What a file of features says it was made from; None for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            comment = json.loads(archive.comment)
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    found = isinstance(comment, dict) and comment.get("schema") == _CACHE_SCHEMA
    return str(comment.get("source")) if found else None


def _width(path: Path) -> int:
    try:
        with zipfile.ZipFile(path) as archive, archive.open("X_train.npy") as stream:
            shape, _, _ = read_header(stream, archive.getinfo("X_train.npy").file_size)
    except (OSError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error, *DAMAGED_HEADER):
        shape = ()
    if len(shape) != 2:
        raise DataError(f"{path} is damaged; delete it.")
    return shape[1]


def _fingerprint(dataset: Dataset, module: torch.nn.Module, model: str, **options: Any) -> str:
    """SHA-256 of everything the features depend on: records, numbers and code of the model, options. The code is that
    of the file named, not of what it imports.
    """
    state = hashlib.sha256(json.dumps([torch.__version__, str(module), options], sort_keys=True).encode())
    for array in (dataset.x_train, dataset.y_train, dataset.x_test, dataset.y_test):
        state.update(b"none" if array is None else f"{array.dtype}{array.shape}".encode())
        if array is not None:
            state.update(np.ascontiguousarray(array).view(np.uint8).data)
    for name, value in module.state_dict().items():
        state.update(name.encode())
        if isinstance(value, torch.Tensor):
            state.update(f"{value.dtype}{tuple(value.shape)}".encode())
            state.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    code = Path(model)
    if not code.is_file():
        code = Path(getattr(sys.modules.get(model.partition(":")[0]), "__file__", None) or "")
    if code.is_file():
        state.update(hashlib.sha256(code.read_bytes()).digest())
    return state.hexdigest()
