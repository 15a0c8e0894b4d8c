"""Loading feedback files, as written by HALOs and `halos-trl label`, as rows for trainers."""

from .load import CONTROL_TOKENS, feedback_splits, is_feedback_file, load_feedback

__all__ = ["CONTROL_TOKENS", "feedback_splits", "is_feedback_file", "load_feedback"]
