"""Feedback files, as HALOs and `halos-trl label` write them, as the rows that the trainers take."""

from .load import CONTROL_TOKENS, feedback_splits, is_feedback_file, load_feedback

__all__ = ["CONTROL_TOKENS", "feedback_splits", "is_feedback_file", "load_feedback"]
