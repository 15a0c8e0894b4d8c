"""A user's script for the type checkers: every wrong line is marked, and no other line is wrong."""

from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput

from halos_trl import (
    BradleyTerryConfig,
    CDPOConfig,
    CDPOTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    ModelConfig,
    PairedPreferenceTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    ScriptArguments,
    TrlParser,
    TRLPatch,
    get_peft_config,
    load_reward_model,
    patch_trl,
)
from halos_trl.humanline import Humanline
from halos_trl.records import LossOutput, PairedLogps

rows = Dataset.from_list([])


def right() -> None:
    config, model_args, script_args = TrlParser().parse_args_and_config()
    assert isinstance(model_args, ModelConfig) and isinstance(script_args, ScriptArguments)
    DPOTrainer("model", args=config, train_dataset=rows, peft_config=get_peft_config(model_args))
    trainer = DPOTrainer(model="model", args=DPOConfig(humanline=True, log_epsilon_p=-2.0), train_dataset=rows)
    output: TrainOutput = trainer.train(resume_from_checkpoint=True)
    beta: float = trainer.args.beta
    clamp: Humanline | None = trainer.args.humanline_clamp
    scores: dict[str, float] = trainer.evaluate()
    epsilon: float = CDPOTrainer("model", args=CDPOConfig(epsilon=0.1)).args.epsilon
    reward: PreTrainedModel = load_reward_model("reward")
    PPOTrainer("model", args=PPOConfig(ppo_epochs=2), reward_model=reward, eval_dataset={"one": rows})
    RewardTrainer("model", args=RewardConfig(max_length=10))
    RewardTrainer("model", args=BradleyTerryConfig())
    patch: TRLPatch = patch_trl()
    print(output, beta, clamp, scores, epsilon, patch)


def wrong() -> None:
    DPOTrainer(modell="model")  # error
    DPOTrainer("model", args=KTOConfig())  # error
    DPOTrainer("model", train_datasets=rows)  # error
    DPOTrainer(5)  # error
    CDPOTrainer("model", args=DPOConfig())  # error
    KTOTrainer("model", args=DPOConfig())  # error
    GRPOTrainer("model", args=PPOConfig())  # error
    GRPOTrainer("model", reward_funcs=[])  # error
    PPOTrainer("model", args=GRPOConfig())  # error
    PPOTrainer("model", reward_modell="reward")  # error
    RewardTrainer("model", args=DPOConfig())  # error
    RewardTrainer("model", ref_model=None)  # error
    GRPOConfig(sequence_levl=True)  # error
    KTOConfig(beta="much")  # error
    DPOConfig(humanline="false")  # error
    load_reward_model(5)  # error
    patch_trl().undoo()  # error
    wrong_type: str = DPOTrainer("model").args.log_epsilon_p  # error
    print(wrong_type, KTOTrainer("model").args.epsilon)  # error


@dataclass
class MarginConfig(DPOConfig):
    margin: float = 1.0


class MarginTrainer(PairedPreferenceTrainer[MarginConfig]):
    config_class = MarginConfig

    def loss(self, record: PairedLogps) -> LossOutput:
        margin: float = self.args.margin
        losses_B = margin - record.policy_chosen.sum(-1)
        return LossOutput(losses_B, losses_B, record.policy_rejectd, {})  # error


MarginTrainer("model", args=MarginConfig(margin=2.0))
MarginTrainer("model", args=DPOConfig())  # error


class Untyped(PairedPreferenceTrainer):
    def loss(self, record: PairedLogps) -> LossOutput:
        return LossOutput(
            record.policy_chosen, record.policy_chosen, record.policy_chosen, {"margin": self.args.margin}
        )


Untyped("model", args=MarginConfig())
