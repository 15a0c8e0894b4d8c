"""A method of your own: a subclass with one function, trained like any other.

    python examples/custom_method.py                           # embedded task: no network

This one is a simplified KTO. Its reference point is not an estimate over mismatched prompts and completions, but the
mean log-ratio of the rows with the other label in the micro-batch.
"""

import torch
from trl import get_peft_config, get_quantization_config

from halos_trl import KTOConfig, UnpairedPreferenceTrainer, cli
from halos_trl.humanline import log_ratios
from halos_trl.records import LossOutput, UnpairedLogps


class DummyKTOTrainer(UnpairedPreferenceTrainer):
    """Compares log-ratios of desirable rows with the mean of the undesirable rows, and vice versa."""

    takes_humanline = True  # `log_ratios` clamps

    def loss(self, record: UnpairedLogps) -> LossOutput:
        beta, desirable_B = self.args.beta, record.desirable
        ratios_BT, _ = log_ratios(record.policy, record.reference, record.mask, self.args.humanline_clamp)
        ratios_B = ratios_BT.sum(-1)
        desirable_kl, undesirable_kl = (mean_or_zero(ratios_B.detach()[s]) for s in (desirable_B, ~desirable_B))
        losses_B = torch.where(  # 1 - sigmoid(x) is sigmoid(-x)
            desirable_B,
            torch.sigmoid(beta * (undesirable_kl - ratios_B)),
            torch.sigmoid(beta * (ratios_B - desirable_kl)),
        )
        rewards_B = beta * ratios_B.detach()
        return LossOutput(losses_B, rewards_B[desirable_B], rewards_B[~desirable_B], {})


def mean_or_zero(ratios: torch.Tensor) -> torch.Tensor:
    """The mean, at least 0; 0 for a micro-batch without rows of this label."""
    return (ratios.sum() / max(len(ratios), 1)).clamp(min=0)


TOY = {"learning_rate": 3e-4, "per_device_train_batch_size": 64, "num_train_epochs": 4}


def main() -> None:
    script_args, training_args, model_args, data = cli.parse(KTOConfig, "unpaired", TOY)
    trainer = DummyKTOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=data[script_args.dataset_train_split],
        eval_dataset=cli.eval_split(script_args, training_args, data),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    cli.run(trainer, script_args)


if __name__ == "__main__":
    main()
