"""Base trainer for completions that were judged individually."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset

from .._trl import UnpairedHost, score_tokens
from ..configs import KTO_LOSS_FIELDS, KTOConfig
from ..data import kl_partners
from ..data.checks import Rows, check_unpaired_rows
from ..losses import kto_kl
from ..metrics import Sums, logps_sums, side_sums
from ..records import LossOutput, UnpairedLogps, check_output
from .base import AlignmentTrainer, ConfigT
from .loss import BatchTables, clamp_sums, loss_sums, repeats_left_out, token_sums

logger = get_logger(__name__)


class KLEstimate(NamedTuple):
    """KTO's KL estimate, with intermediate results that the loss of a micro-batch reuses."""

    kl: torch.Tensor
    """In nats, of the whole optimizer step."""
    reference_BT: torch.Tensor | None = None
    """The reference's log-probs of the micro-batch itself, if they were computed together with those of the KL
    partners.
    """
    tokens: torch.Tensor | None = None
    """The tokens these log-probs belong to, see `_tokens_of`."""


class UnpairedPreferenceTrainer(AlignmentTrainer[ConfigT], UnpairedHost):
    """Base class of methods on rows of `prompt`, `completion` and a boolean `label`.

    A new method is a subclass that defines `loss`, which receives a record of per-token log-probs `(B, T)` in nats and
    returns a `LossOutput`. The base class does everything else (loading, adapters, batching, metrics, saving). Extends
    `trl.KTOTrainer` and takes the same arguments.
    """

    config_class = KTOConfig
    loss_fields = KTO_LOSS_FIELDS
    needs_kl: ClassVar[bool] = False
    """Whether `loss` reads `self.kl`, the KL estimate of the whole optimizer step in nats."""

    def loss(self, record: UnpairedLogps) -> LossOutput:
        """The losses `(B,)` of a micro-batch, in row order, and its rewards."""
        raise NotImplementedError(f"{type(self).__name__} must define `loss(self, record) -> LossOutput`.")

    def record(self, tables: BatchTables) -> UnpairedLogps:
        self.kl = tables.prepared.kl
        desirable_B = tables.of_rows(tables.batch["label"].bool())
        return UnpairedLogps(tables.tokens.logps_BT, tables.reference_BT, tables.tokens.mask_BT, desirable_B)

    def checked(self, output: Any, record: Any) -> LossOutput:
        return check_output(output, (len(record[0]),), "Sum or average over the tokens of a row inside `loss`.")

    def own_rows(self, batch: dict[str, Any]) -> torch.Tensor | None:
        return repeats_left_out(self, batch)

    def metric_sums(self, output: LossOutput, tables: BatchTables) -> Sums:
        tokens, desirable_B = tables.tokens, tables.of_rows(tables.batch["label"].bool())
        sums = loss_sums(output) | token_sums(tokens) | logps_sums(tokens.logps_BT, desirable_B)
        if tokens.mean_logits_BT is not None:
            sums |= side_sums("logits", tokens.mean_logits_BT, tokens.mask_BT, desirable_B)
        return sums | clamp_sums(tables, desirable_B, self.args.humanline_clamp)

    def batch_size(self, batch: dict[str, Any]) -> int:
        return batch["label"].shape[0]

    # -- the KL estimate ---------------------------------------------------------------------------------------

    kl: torch.Tensor = torch.zeros(())
    """The KL estimate for `loss`: that of the batch's optimizer step, or of an evaluation batch. Set before each call
    of `loss`.
    """

    def prepare_step(self, batches: list[dict[str, Any]]) -> list[KLEstimate]:
        """The KL estimate of the step, for each micro-batch; in HALOs' order, that of each micro-batch separately."""
        if self.args.batch_order == "halos":
            return [estimate for batch in batches for estimate in self._estimates([batch])]
        return self._estimates(batches)

    def reference_logps(self, batch: dict[str, Any], prepared: KLEstimate) -> torch.Tensor | None:
        # A user's `compute_loss` may have changed the batch.
        if prepared.tokens is not None and torch.equal(prepared.tokens, _tokens_of(batch)):
            return prepared.reference_BT
        return super().reference_logps(batch, prepared)

    def estimate_kl(self, batches: list[dict[str, Any]]) -> torch.Tensor:
        """KL of policy and reference in nats, over the prompts of `batches` with each other's completions.

        `batches` are all micro-batches of one optimizer step (or one evaluation batch) on this process; all processes
        must call this at the same time. Scalar, at least 0, without gradient; 0 for methods that do not use it.
        Equation 8 of the KTO paper (arXiv:2402.01306).
        """
        return self._estimates(batches)[0].kl

    def _estimates(self, batches: list[dict[str, Any]]) -> list[KLEstimate]:
        """The estimate over all batches, for each of them."""
        device = self.accelerator.device
        if not self.estimates_kl:
            zero = torch.zeros((), device=device)
            if self.needs_kl:
                self.record_metrics({"kl": (zero, torch.ones_like(zero))})
            return [KLEstimate(zero)] * len(batches)
        model = self.model_wrapped if self.mode == "train" else self.model
        mismatched = self._kl_batches(batches)
        # A single process scores the prompts of its own rows, so with packed rows they are shared by both.
        alike = self.accelerator.num_processes == 1 and len(mismatched) == len(batches)
        parts, references = [], []
        for i, batch in enumerate(mismatched):
            part, of_own = self._kl_of(model, batch, batches[i : i + 1] if alike else [])
            parts.append(part)
            references += of_own
        sum_count = (
            torch.stack([torch.stack(part) for part in parts]).sum(0) if parts else torch.zeros(2, device=device)
        )
        kl_sum, count = self.accelerator.reduce(sum_count, reduction="sum")
        kl = kl_sum / count.clamp(min=1)
        if not torch.isfinite(kl):
            raise ValueError(
                f"The KL estimate is {kl.item()} at {self.moment}: a model returned NaN or infinite log-probs. The "
                "weights were not updated. Check the model's weights for NaN, or lower `learning_rate`."
            )
        kl = kl.clamp(min=0)
        self.record_metrics({"kl": (kl, torch.ones_like(kl))})
        if not references:
            return [KLEstimate(kl)] * len(batches)
        return [KLEstimate(kl, *known) for known in zip(references, map(_tokens_of, batches), strict=True)]

    def _kl_of(
        self, model: Any, batch: dict[str, Any], others: list[dict[str, Any]]
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], list[Any]]:
        """(sum, count) of the KL of a batch, and the reference's log-probs of the batches computed along with it."""
        with self.no_grad_forward():
            tokens = score_tokens(model, batch)
        reference_BT, *of_others = self.reference.log_probs_of([batch, *others])
        return kto_kl(tokens.logps_BT, reference_BT, tokens.mask_BT, self.args.humanline_clamp), of_others

    def _kl_batches(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The batches that this process evaluates for the estimate."""
        if self.has_fixed_partners:
            return [_fixed_partners(self.without_repeats(batch, "KL_completion_mask")) for batch in batches]
        own = [kl_partners.split_sequences(batch)[: self.real_rows(self.batch_size(batch))] for batch in batches]
        whole = kl_partners.in_batch_order(gather_object([own]))
        paired = kl_partners.mismatch(whole)
        if not paired:
            logger.warning_once(
                f"A step or evaluation batch of {len(whole)} rows has only one prompt. The KL estimate pairs each "
                "prompt with a completion of another prompt, so its KL term is 0. Shuffle the rows, or choose a "
                "number of examples per step that leaves more rows for the last step."
            )
            return []
        share = kl_partners.share_of(paired, self.accelerator.process_index, self.accelerator.num_processes)
        size = max(map(self.batch_size, batches))
        return [
            kl_partners.collate(
                share[i : i + size],
                pad_token_id=self.model.config.get_text_config().pad_token_id,
                max_length=self.args.max_length,
                device=self.accelerator.device,
            )
            for i in range(0, len(share), size)
        ]

    def fixed_partners(
        self, dataset: Dataset, name: str, max_length: int | None, column: str = "completion_ids"
    ) -> list[list[int]]:
        """A KL partner for each row of a prepared dataset, truncated as in its own row."""
        limit = sys.maxsize if max_length is None else max_length
        prompts, completions = list(dataset["prompt_ids"]), list(dataset[column])
        of_row = kl_partners.partners(list(map(tuple, prompts)))
        if of_row is None:
            logger.warning(
                f"All {len(dataset)} rows of the {name} dataset have the same prompt. KTO's KL term pairs each "
                "prompt with a completion of another prompt, so no row counts, and the term is 0."
            )
            return [[]] * len(dataset)
        return [completions[i][: limit - len(prompts[i])] for i in of_row]

    # -- refusals ----------------------------------------------------------------------------------------------

    def check_rows(self, dataset: Rows, name: str) -> Rows:
        return check_unpaired_rows(dataset, name, drop_invalid=self.drops_invalid_rows)


def _tokens_of(batch: dict[str, Any]) -> torch.Tensor:
    """Token ids and masks of a collated batch, `(names, B, S)`."""
    return torch.stack([batch[name] for name in ("input_ids", "attention_mask", "completion_mask") if name in batch])


def _fixed_partners(batch: dict[str, Any]) -> dict[str, Any]:
    """The KL sequences of a batch under the standard names (images stay those of the prompts)."""
    renamed = {k.removeprefix("KL_"): v for k, v in batch.items() if k.startswith("KL_")}
    if "ref_KL_logps" in batch:
        renamed["ref_logps"] = batch["ref_KL_logps"]
    kept = {k: v for k, v in batch.items() if not k.startswith("KL_") and k not in ("ref_KL_logps", "label")}
    return kept | renamed
