"""The embedded task: a task with verifiable answers, a small model of limited accuracy, and feedback on its samples.

The task is to sort four to six different letters: ``"Sort fatbm"`` -> ``"abfmt"``. A causal LM of about a million
parameters is trained locally on demonstrations with two kinds of errors: a systematic one (in longer answers the last
letter is omitted more often than not) and a random one (two neighbouring letters are swapped). The model learns both:
the systematic error is its most likely answer wherever it applies, and the random one occurs in some of its samples.
Preference alignment on its own samples, judged by the verifier, has to remove them.

Everything is generated locally and cached on disk; nothing is downloaded. For the same machine, library versions and
number of threads, a seed determines the weights and the rows.

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
