"""Online rounds: sample from the policy, label the samples, train on the feedback, again and again.

    python examples/online_rounds.py                           # embedded default: no network, KTO, a picture

    python examples/online_rounds.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/ultrafeedback-prompt \
        --reward_model reward-model --config configs/kto.yaml --output_dir qwen-rounds \
        --prompts_per_round 512 --samples_per_prompt 8

The same as `halos-trl rounds kto`; that command takes other methods too. The reward comes from a reward model, a
Python function (`--reward_function rewards.py:right`) or a judge. Every round is a folder with its samples, feedback,
policy, checkpoint and metrics; started again, a run goes on with the first stage that is not finished. `--help` lists
the flags.
"""

import sys

from halos_trl.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["rounds", "kto", *sys.argv[1:]]))
