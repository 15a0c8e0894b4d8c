"""KTO: Kahneman-Tversky optimization."""

from __future__ import annotations

from typing import Any

from .. import losses
from .._trl import Method
from ..configs import KTO_LOSS_FIELDS, KTOConfig
from ..records import LossOutput, UnpairedLogps
from .unpaired import UnpairedPreferenceTrainer

_PAPER = Method(
    name="KTO",
    title="KTO: Model Alignment as Prospect Theoretic Optimization",
    arxiv="2402.01306",
    citation="""\
@inproceedings{ethayarajh2024kto,
    title     = {{KTO}: Model Alignment as Prospect Theoretic Optimization},
    author    = {Ethayarajh, Kawin and Xu, Winnie and Muennighoff, Niklas and Jurafsky, Dan and Kiela, Douwe},
    booktitle = {International Conference on Machine Learning},
    year      = {2024},
    eprint    = {2402.01306},
}""",
)


class KTOTrainer(UnpairedPreferenceTrainer[KTOConfig]):
    """KTO (arXiv:2402.01306). The KL term pairs prompts with completions of the same optimizer step.

    Takes the arguments of `trl.KTOTrainer`. Data may be shuffled or streamed, `per_device_train_batch_size=1` works,
    and the loss does not depend on how a step is split over micro-batches and processes.
    """

    config_class = KTOConfig
    takes_humanline = True
    takes_precomputed = True
    takes_options = KTO_LOSS_FIELDS
    needs_kl = True
    method = _PAPER
    card_fields = ("loss_type", "beta", "desirable_weight", "undesirable_weight")

    def loss(self, record: UnpairedLogps) -> LossOutput:
        # apo_zero_unpaired is KTO without the KL term: `kl` is 0 then.
        return losses.kto(
            record,
            kl=self.kl,
            beta=self.args.beta,
            desirable_weight=self.args.desirable_weight,
            undesirable_weight=self.args.undesirable_weight,
            humanline=self.args.humanline_clamp,
        )

    def check_arguments(self, args: Any, model: Any, ref_model: Any) -> None:
        super().check_arguments(args, model, ref_model)
        if args.loss_type == "apo_zero_unpaired":
            return
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        remedy = "or use `loss_type='apo_zero_unpaired'`, which has no KL term."
        if step < 2:
            raise ValueError(
                "One optimizer step has a single example (`per_device_train_batch_size` x "
                f"`gradient_accumulation_steps` x processes = {step}), but KTO estimates its KL term by pairing each "
                "prompt with the completion of another example of the step. Increase one of them so that a step has "
                f"at least 2 examples, {remedy}"
            )
        if args.eval_strategy != "no" and args.per_device_eval_batch_size * args.world_size < 2:
            raise ValueError(
                "An evaluation batch has a single example (`per_device_eval_batch_size` x processes = 1), but KTO "
                "estimates its KL term from the other examples of the evaluation batch. Set "
                f"`per_device_eval_batch_size` to 2 or more, {remedy}"
            )
