"""The embedded default: a task with a verifiable answer, a small model that is mediocre at it, and feedback on it.

The task is to put four to six different letters in order: ``"Sort fatbm"`` -> ``"abfmt"``. A causal LM of about a
million parameters learns it on this machine from a careless demonstrator, who has one habit (in longer answers he
leaves out the last letter more often than not) and makes one kind of slip (two neighbours swapped). The model inherits
both: the habit is its most likely answer wherever it applies, the slip is spread thinly over its samples. Preference
alignment on its own samples, judged by the verifier, has to undo them.

Everything is made here and cached on disk; nothing is downloaded. One seed gives the same weights and the same rows on
the same machine, library versions and number of threads.

    python -m halos_trl.toy        # train the model if needed, show some samples and the held-out accuracy
"""

from .feedback import SAMPLES_PER_PROMPT, accuracy, load_feedback_data
from .model import CHAT_TEMPLATE, build_model, build_tokenizer, load_model_path, tiny_model
from .task import (
    ALPHABET,
    ASSISTANT,
    END,
    LEAVE_OUT_LAST,
    LENGTHS,
    LONG,
    PAD,
    SWAP_NEIGHBOURS,
    SYSTEM,
    USER,
    answer,
    make_prompts,
    reward,
    verify,
)

__all__ = [
    "ALPHABET",
    "ASSISTANT",
    "CHAT_TEMPLATE",
    "END",
    "LEAVE_OUT_LAST",
    "LENGTHS",
    "LONG",
    "PAD",
    "SAMPLES_PER_PROMPT",
    "SWAP_NEIGHBOURS",
    "SYSTEM",
    "USER",
    "accuracy",
    "answer",
    "build_model",
    "build_tokenizer",
    "load_feedback_data",
    "load_model_path",
    "make_prompts",
    "reward",
    "tiny_model",
    "verify",
]
