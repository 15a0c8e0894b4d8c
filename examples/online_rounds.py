"""Online rounds: sample from the policy, label the samples, train on the feedback, and repeat.

    python examples/online_rounds.py                           # embedded task: no network, KTO, a plot

    python examples/online_rounds.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/ultrafeedback-prompt \
        --reward_model reward-model --config configs/kto.yaml --output_dir qwen-rounds \
        --prompts_per_round 512 --samples_per_prompt 8

The same as `halos-trl rounds kto`; `halos-trl rounds` also supports other methods. The reward comes from a reward
model, a Python function (`--reward_function rewards.py:right`) or a judge. Every round has a folder with its samples,
feedback, policy, checkpoint and metrics. A restarted run continues with the first unfinished stage. `--help` lists the
flags.
"""

import sys

from halos_trl.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["rounds", "kto", *sys.argv[1:]]))
