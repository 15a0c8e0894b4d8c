"""Tokenization of datasets: rows that do not fit are dropped; dropped and changed rows are counted."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedModel
from trl import unpair_preference_dataset
from trl.trainer.utils import global_then_local_main_first

from ..data import tokens, turns
from ..data.halos.rows import CUT_COMPLETION, CUT_PROMPT
from ..data.row_texts import split_prompt
from ..data.tokens import INVALID, NO_ROOM, NOTES, ROW_NUMBER, RowTokenizer, TokenLimits

logger = get_logger(__name__)


def groups_by_length(args: Any) -> bool:
    """Whether batches are grouped by length. The setting is called `group_by_length` before transformers 5.2."""
    return bool(getattr(args, "group_by_length", False))


_MADE_HERE = ("ref_logps", "ref_KL_logps", "ref_chosen_logps", "ref_rejected_logps")


def drop_foreign_columns(dataset: Any, name: str) -> Any:
    """Drop columns of a raw dataset whose names clash with those of tokenized rows, with a warning."""
    columns = set(next(iter(dataset), ()))
    foreign = sorted(column for column in columns if column in _MADE_HERE or column.startswith("KL_"))
    if not foreign or "prompt_ids" in columns:  # already prepared, and passed to `evaluate`
        return dataset
    logger.warning(
        f"Columns {foreign} of the {name} dataset are ignored, because the trainer computes reference log-probs and "
        "KL partners itself (`precompute_ref_log_probs=True` stores them). Rename the columns if you need them for "
        "something else."
    )
    return dataset.remove_columns(foreign)


def tokenized_rows(
    dataset: Any,
    tokenize: Callable[[bool], RowTokenizer],
    args: Any,
    report: Callable[[dict[str, int]], None] | None = None,
) -> Any:
    """Tokenize the rows of a dataset.

    `tokenize` creates the row tokenizer; its argument says whether the rows have explicit prompts. Pairs are split
    into single completions if the method needs those. `report` receives the numbers of dropped and changed rows by
    reason, except for a streamed dataset.
    """
    how = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
    # The main process prepares the rows first; the others then read its result from the cache.
    with global_then_local_main_first():
        first = next(iter(dataset))
        row_tokenizer = tokenize("prompt" in first)
        if "prompt" not in first and not row_tokenizer.whole:
            dataset = dataset.map(split_prompt, **how)
        unpaired = row_tokenizer.sides == ("completion",) and {"chosen", "rejected"} <= set(first)
        if unpaired:
            dataset = dataset.map(_numbered, with_indices=True, **how)
            dataset = unpair_preference_dataset(dataset, **how)
        if isinstance(dataset, Dataset):
            how["desc"] = f"Tokenizing {row_tokenizer.name} dataset"
        dataset = dataset.map(row_tokenizer, with_indices=True, **how)
    if not isinstance(dataset, Dataset):
        return _counted_as_read(dataset, row_tokenizer.name, _texts(row_tokenizer), numbered=unpaired)
    dataset, counts = _counted(dataset, row_tokenizer.name, _texts(row_tokenizer), numbered=unpaired)
    if report is not None:
        report(counts)
    return dataset


def _numbered(row: dict[str, Any], index: int) -> dict[str, Any]:
    return {ROW_NUMBER: index}


def _texts(tokenizer: RowTokenizer) -> dict[str, str]:
    """Text of the warning for each note, to follow the number of rows."""
    limit = f"`max_length`={tokenizer.max_length}"
    no_room = "`chosen` or `rejected` is longer than" if tokenizer.whole else "their prompt alone fills"
    return {
        NO_ROOM: f"{no_room} {limit}. Raise `max_length` or shorten the prompts.",
        tokens.CUT: f"have a completion that is truncated at {limit}, so its end, including the EOS token, is not "
        "trained on. Raise `max_length` or shorten the rows.",
        turns.REPEATED: "repeat their prompt at the start of the completion. The repetition was removed.",
        tokens.REPEATED_TEXT: "have a completion that starts with the text of the prompt, which thus occurs twice. If "
        "this is not intended, remove it from the completion.",
        turns.OTHER_TURNS: "have turns of other roles (user, tool, system) in the completion, whose tokens are "
        "trained on like the assistant's. Set `assistant_only_loss=True` to exclude them.",
        turns.CONTINUED: "have a prompt that ends with an assistant turn. The completion continues this turn.",
        tokens.DOUBLE_BOS: "start with the BOS token, which the tokenizer also adds. It was added only once.",
        CUT_PROMPT: "have a prompt that exceeds `max_prompt_length`. As in HALOs, the first turn that does not fit is "
        "truncated, and the turns after it are dropped, including the last question.",
        CUT_COMPLETION: "have a completion that is truncated as in HALOs, so that prompt and completion fit into "
        f"{limit}; the end-of-turn token is kept.",
        tokens.BOUNDARY: "have a tokenized prompt that is not a prefix of the tokenized prompt and completion, "
        "because tokens merge across the boundary or the chat template renders the prompt "
        "differently on its own. Tokens after the common prefix count as completion, so the model is "
        "prompted differently at inference. End prompts on a token boundary, or use a template that "
        "renders them consistently.",
    }


def _drops(notes: list[str]) -> bool:
    return any(note == NO_ROOM or note.startswith(INVALID) for note in notes)


def _kind(note: str) -> str:
    return INVALID if note.startswith(INVALID) else note


def _sentence(note: str, which: str, texts: dict[str, str]) -> str:
    """The warning about a note and the rows that have it."""
    if note.startswith(INVALID):
        return f"Dropped {which}: {note.removeprefix(INVALID)}"
    return f"Dropped {which}: {texts[note]}" if note == NO_ROOM else f"{which} {texts[note]}"


def _counted(dataset: Dataset, name: str, texts: dict[str, str], *, numbered: bool) -> tuple[Dataset, dict[str, int]]:
    """The rows that are kept, and the number of rows with each note, by summary."""
    all_notes = [notes.splitlines() for notes in dataset[NOTES]]
    rows = dataset[ROW_NUMBER] if numbered else range(len(dataset))
    counts = Counter(_kind(note) for notes in all_notes for note in notes)
    first: dict[str, tuple[int, str]] = {}
    for row, notes in zip(rows, all_notes, strict=True):
        for note in notes:
            first.setdefault(_kind(note), (row, note))
    unit = "completions" if numbered else "rows"
    for kind, (row, note) in first.items():
        which = f"{counts[kind]} of {len(dataset)} {unit} of the {name} dataset (the first is row {row})"
        logger.warning(_sentence(note, which, texts))
    kept = [i for i, notes in enumerate(all_notes) if not _drops(notes)]
    if not kept:
        reason = next(note for kind, (_, note) in first.items() if kind in (NO_ROOM, INVALID))
        text = texts.get(reason, reason.removeprefix(INVALID))
        raise ValueError(f"No row of the {name} dataset can be trained on: {text}")
    dataset = dataset.remove_columns([NOTES, ROW_NUMBER] if numbered else [NOTES])
    said = {_summary(kind, texts): count for kind, count in counts.items()}
    return dataset if len(kept) == len(dataset) else dataset.select(kept), said


def _summary(kind: str, texts: dict[str, str]) -> str:
    """A short form of a note."""
    if kind == INVALID:
        return "dropped: not valid"
    return f"dropped: {texts[kind]}" if kind == NO_ROOM else texts[kind]


def _counted_as_read(dataset: Any, name: str, texts: dict[str, str], *, numbered: bool) -> Any:
    counts: Counter[str] = Counter()

    def is_kept(notes: str) -> bool:
        for note in notes.splitlines():
            kind = _kind(note)
            counts[kind] += 1
            if (
                counts[kind] & (counts[kind] - 1) == 0
            ):  # warn at 1, 2, 4, ... rows, because a stream has no end at which to report the total
                which = f"{counts[kind]} rows of the streamed {name} dataset so far"
                logger.warning(_sentence(note, which, texts))
        return not _drops(notes.splitlines())

    dataset = dataset.filter(is_kept, input_columns=NOTES)
    return dataset.remove_columns([NOTES, ROW_NUMBER] if numbered else [NOTES])


# -- limits of tokenizer and model ---------------------------------------------------------------------------------


def token_limits(trainer: Any, processing_class: Any) -> TokenLimits:
    """The sizes of the policy's token embedding and, if it has one, its learned position embedding.

    Raises ValueError if the padding token has no embedding.
    """
    model = getattr(trainer, "policy_in_construction", None) or getattr(trainer, "model", None)
    if model is None:
        return TokenLimits()
    limits = _limits_of(model)
    pad = getattr(processing_class, "tokenizer", processing_class).pad_token_id
    if pad is not None and limits.vocabulary is not None and pad >= limits.vocabulary:
        raise ValueError(
            f"The padding token has id {pad}, but the model has {limits.vocabulary} token embeddings. Call "
            "`model.resize_token_embeddings(len(tokenizer))` first, or set another `pad_token`."
        )
    return limits


def _limits_of(model: PreTrainedModel) -> TokenLimits:
    embedding = model.get_input_embeddings()
    trained_on = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    positions = [
        # With a padding row, positions start at the row after it (RoBERTa).
        module.num_embeddings - module.padding_idx - 1 if module.padding_idx is not None else trained_on
        for name, module in model.named_modules()
        if name.split(".")[-1] in _POSITIONS
        # Skips tables of other parts, such as a vision tower; OPT's table has two more rows than positions.
        and trained_on is not None and trained_on <= getattr(module, "num_embeddings", 0) <= trained_on + 2
    ]  # fmt: skip
    return TokenLimits(getattr(embedding, "num_embeddings", None), min(positions, default=None))


_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
"""Names of learned position embeddings in models. Rotary and other computed positions have no hard limit."""


def check_token_ids(dataset: Any, columns: tuple[str, ...], limits: TokenLimits, name: str) -> Any:
    """Raise ValueError for rows of a tokenized dataset with ids that are invalid or outside the model's range."""
    top = limits.vocabulary or sys.maxsize

    def check(row: dict[str, Any], index: int) -> bool:
        for column in columns:
            ids = row[column]
            if not ids or not all(isinstance(token, int) and 0 <= token < top for token in ids):
                raise ValueError(
                    f"Row {index} of the {name} dataset has `{column}` {str(ids)[:200]}; expected a list of token "
                    f"ids, integers from 0 to {top - 1}. Tokenize the rows with the model's own tokenizer, or pass "
                    "them as text or messages."
                )
        return True

    if isinstance(dataset, Dataset):
        for index, row in enumerate(dataset.select_columns(list(columns))):
            check(row, index)
        return dataset
    return dataset.filter(check, with_indices=True)


def refuse_without_special_tokens(processing_class: Any, args: Any) -> None:
    """Raise ValueError for a tokenizer without padding or EOS token."""
    if processing_class is None or getattr(args, "pad_token", None) or getattr(args, "eos_token", None):
        return
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer has neither a padding token nor an EOS token, which are needed to pad batches and to end "
            "texts. Set `tokenizer.eos_token` (and `pad_token`), or `eos_token` in the config."
        )


@contextlib.contextmanager
def noting_policy(trainer: Any, model: Any) -> Iterator[None]:
    """While TRL's constructor runs, set `trainer.policy_in_construction` to the model that was passed or loaded.
    Datasets are prepared before `trainer.model` is set.
    """
    trainer.policy_in_construction = None if isinstance(model, str) else model
    module = sys.modules[trainer.trl_class.__module__]
    load = module.create_model_from_path  # type: ignore[attr-defined]

    def create_model_from_path(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        if trainer.policy_in_construction is None:
            trainer.policy_in_construction = loaded
        return loaded

    module.create_model_from_path = create_model_from_path  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.create_model_from_path = load  # type: ignore[attr-defined]
        del trainer.policy_in_construction
