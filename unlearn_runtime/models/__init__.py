"""The models a plan can name, and models of others read without running what a file might hide."""

from unlearn_runtime.models.builtin import build, initialise, input_shape_for
from unlearn_runtime.models.loading import load_module, read_weights

__all__ = ["build", "initialise", "input_shape_for", "load_module", "read_weights"]
