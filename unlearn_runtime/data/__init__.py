"""Read a data set, prepare its records for a plan, and parse the record ids to forget."""

from unlearn_runtime.data.forget import parse_ids
from unlearn_runtime.data.prepare import check_row_norms, encode_labels, preprocess, select_classes
from unlearn_runtime.data.readers import Dataset, load

__all__ = ["Dataset", "check_row_norms", "encode_labels", "load", "parse_ids", "preprocess", "select_classes"]
