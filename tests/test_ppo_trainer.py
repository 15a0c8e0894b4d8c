"""PPOTrainer: the rollout covers the whole step, the value head is trained and saved, precedence of rewards."""

import copy
import json
from types import SimpleNamespace

import datasets
import pytest
import torch
import trl
from conftest import assistant, paired_rows, perturbed, unpaired_rows, user, weights
from peft import LoraConfig
from policy_runs import PPO, build, logged, scored
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from halos_trl import BradleyTerryConfig, BradleyTerryTrainer, PPOConfig, PPOTrainer
from halos_trl._trl.zero import OwnLimit, give_own_groups
from halos_trl.advantages import gae
from halos_trl.trainers.reward import load_reward_model
from halos_trl.trainers.rollout import last_token_rewards, roll_out
from halos_trl.value_head import VALUE_HEAD_FILE, ValueHead, load_value_head

NAMES = (
    "loss", "policy_loss", "critic_loss", "kl", "entropy", "clip_fraction", "seqratio", "values", "returns", "scores",
    "num_tokens", "grad_norm", "v_head_grad_norm",
)  # fmt: skip


@pytest.fixture
def fit(model, tokenizer, make_config):
    def run(data, *, train=True, ref="near", **overrides):
        names = ("peft_config", "callbacks", "eval_dataset", "reward_model", "reward_processing_class", "optimizers")
        extra = {name: overrides.pop(name) for name in names if name in overrides}
        config = make_config(PPOConfig, **(PPO | overrides))
        trainer = build(PPOTrainer, config, model, tokenizer, data, ref=ref, **extra)
        if train:
            trainer.train()
        return trainer

    return run


def head_weights(trainer):
    return weights(trainer.value_head)


def equal_lists(mine, theirs):
    """Logged rows, where a metric that one line lacks (None) is lacking in the other too."""
    for a, b in zip(mine, theirs, strict=True):
        assert [x is None for x in a] == [x is None for x in b]
        assert [x for x in a if x is not None] == pytest.approx([x for x in b if x is not None], rel=1e-5, abs=2e-6)


# -- the rollout ---------------------------------------------------------------------------------------------------


def test_reward_stands_on_the_last_completion_token():
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    expected = torch.tensor([[0, 0, 2.0, 0], [0, 0, 0, -1.0], [0, 0, 0, 0]])
    assert torch.equal(last_token_rewards(torch.tensor([2.0, -1.0, 5.0]), mask), expected)


@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 2, 2], [1] * 6])
def test_rollout_of_parts_is_gae_of_the_whole(sizes):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 7, generator=generator)
    mask = torch.rand(6, 7, generator=generator) < 0.6
    mask[0] = False
    scores = torch.randn(6, generator=generator)
    whole = gae(values, last_token_rewards(scores, mask), mask.float(), gamma=0.9, lam=0.8)
    parts = roll_out(
        [torch.zeros(n, 7) for n in sizes],
        values.split(sizes),
        scores.split(sizes),
        mask.split(sizes),
        gamma=0.9,
        lam=0.8,
        reduce_sum=lambda x: x,
    )
    for name in ("advantages", "returns", "discounted_future_rewards"):
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-5, atol=1e-6)


def test_rollout_of_two_processes_is_whitened_together():
    """The sums of the other process enter through `reduce_sum`: here two equal processes, so nothing changes."""
    values, mask, scores = torch.randn(4, 5), torch.ones(4, 5, dtype=torch.bool), torch.randn(4)
    settings = {"gamma": 1.0, "lam": 1.0}
    alone = roll_out([values], [values], [scores], [mask], **settings, reduce_sum=lambda x: x)
    double = roll_out([values], [values], [scores], [mask], **settings, reduce_sum=lambda x: 2 * x)
    torch.testing.assert_close(double[0].advantages, alone[0].advantages)
    assert alone[0].advantages.mean().abs() < 1e-6
    assert alone[0].advantages.var(unbiased=False) == pytest.approx(1.0, abs=1e-5)


# -- one optimizer step, written out -------------------------------------------------------------------------------


def discounted(x_T, discount):
    """y[t] = sum over s >= t of discount^(s - t) * x[s]."""
    t = torch.arange(len(x_T))
    return (discount ** (t - t[:, None]).abs()).triu() @ x_T


def train_in_plain_torch(policy, reference, head, rows, tokenizer, settings):
    """PPO on all rows as one batch, a row at a time. Moves `policy` and `head`; returns the last gradients' norms."""

    def tokens_of(model, row):
        """Log-prob and value of each completion token, both from the position before it."""
        ids = torch.tensor(tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False))
        start = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False))
        outputs = model(input_ids=ids[None], output_hidden_states=True)
        logps = outputs.logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
        values = head.summary(outputs.hidden_states[-1][0, :-1].detach()).squeeze(-1)
        return logps[start - 1 :], values[start - 1 :]

    gamma, lam, cliprange = settings["gamma"], settings["lam"], settings["cliprange"]
    old, advantages, targets = [], [], []
    with torch.no_grad():
        for row in rows:
            old.append(tokens_of(reference, row)[0])
            values = tokens_of(policy, row)[1]
            rewards = torch.zeros_like(values)
            rewards[-1] = row["score"]
            deltas = rewards + gamma * torch.cat([values[1:], torch.zeros(1)]) - values
            advantages.append(discounted(deltas, gamma * lam))
            targets.append(discounted(rewards, gamma))
    everywhere = torch.cat(advantages)
    advantages = [(x - everywhere.mean()) / everywhere.std(correction=0) for x in advantages]

    for _ in range(settings["ppo_epochs"]):
        loss = 0.0
        for row, old_T, advantage, target in zip(rows, old, advantages, targets, strict=True):
            logps, values = tokens_of(policy, row)
            ratio = (logps - old_T).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - cliprange, 1 + cliprange) * advantage)
            critic = (values - target) ** 2 / 2
            kl = logps - old_T
            loss += (-surrogate + settings["critic_coef"] * critic + settings["kl_coef"] * kl).sum()
        (loss / len(everywhere)).backward()
        norms = [
            torch.nn.utils.clip_grad_norm_(policy.parameters(), settings["max_grad_norm"]),
            torch.nn.utils.clip_grad_norm_(head.parameters(), settings["v_head_max_grad_norm"]),
        ]
        for parameter in [*policy.parameters(), *head.parameters()]:
            parameter.data -= settings["learning_rate"] * parameter.grad
            parameter.grad = None
    return norms


@pytest.mark.parametrize("ppo_epochs", [1, 2])
def test_steps_equal_ppo_written_out(fit, model, tokenizer, ppo_epochs):
    rows = scored(4)
    settings = PPO | {
        "gamma": 0.9, "lam": 0.7, "ppo_epochs": ppo_epochs, "max_grad_norm": 0.2, "v_head_max_grad_norm": 0.05,
        "learning_rate": 0.1,
    }  # fmt: skip
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": ppo_epochs}
    trainer = fit(rows, train=False, weight_decay=0.0, **split, **settings)
    policy, head = copy.deepcopy(model), copy.deepcopy(trainer.value_head)
    start = weights(policy), weights(head)
    norms = train_in_plain_torch(policy, perturbed(model), head, rows, tokenizer, settings)
    trainer.train()

    trained = torch.cat([p.flatten() for name, p in trainer.model.named_parameters() if "v_head" not in name])
    torch.testing.assert_close(trained, weights(policy), rtol=0, atol=1e-6)
    torch.testing.assert_close(head_weights(trainer), weights(head), rtol=0, atol=1e-6)
    for parameters, before in zip((trained, head_weights(trainer)), start, strict=True):
        assert (parameters - before).abs().max() > 1e-4, "both must move by far more than the tolerance"
    assert norms[0] > settings["max_grad_norm"] and norms[1] > settings["v_head_max_grad_norm"], "both limits must act"
    assert all(clipped > 0 for (clipped,) in logged(trainer, "clip_fraction")), "the clip must have a say"


# -- one optimizer step is one batch -------------------------------------------------------------------------------


@pytest.mark.parametrize("ppo_epochs", [1, 2])
def test_loss_and_weights_do_not_depend_on_the_split(fit, ppo_epochs):
    data = scored(10)
    whole = fit(data, max_steps=4, ppo_epochs=ppo_epochs)
    for size in (1, 2, 4):
        steps = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        split = fit(data, max_steps=4, ppo_epochs=ppo_epochs, **steps)
        torch.testing.assert_close(weights(split.model), weights(whole.model), rtol=0, atol=1e-6)
        equal_lists(logged(split, *NAMES), logged(whole, *NAMES))
    assert all(clipped > 0 for (clipped,) in logged(whole, "clip_fraction")), "the clip must have a say"


def test_epochs_over_a_batch_share_its_rollout(fit):
    data = scored(10)
    seen = []

    class Spy(PPOTrainer):
        def loss(self, record):
            seen.append(record)
            return super().loss(record)

    trainer = fit(data, train=False, ppo_epochs=3, max_steps=6, learning_rate=1e-2)
    trainer.__class__ = Spy
    trainer.train()
    assert len(seen) == 6
    for first, again in ((0, 1), (0, 2), (3, 4), (3, 5)):
        for name in ("old_policy", "advantages", "discounted_future_rewards", "mask"):
            assert torch.equal(getattr(seen[first], name), getattr(seen[again], name)), name
        assert not torch.equal(seen[first].policy, seen[again].policy)
        assert not torch.equal(seen[first].values, seen[again].values)
    assert seen[0].mask.shape != seen[3].mask.shape or not torch.equal(seen[0].advantages, seen[3].advantages)
    assert trainer.state.epoch == pytest.approx(2 / 5)


def test_an_epoch_has_ppo_epochs_times_the_steps(fit):
    trainer = fit(scored(10), ppo_epochs=2, num_train_epochs=1, max_steps=-1)
    assert trainer.state.global_step == 2 * 5
    assert trainer.state.epoch == 1


# -- the value head ------------------------------------------------------------------------------------------------


def test_head_has_the_shape_of_halos_and_never_reaches_the_policy():
    head = ValueHead(8, seed=3)
    shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items() if name.endswith("weight")}
    assert shapes == {"summary.0.weight": (8, 8), "summary.3.weight": (8, 8), "summary.6.weight": (1, 8)}
    hidden = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    values = head(hidden)
    assert values.shape == (2, 3)
    assert values.dtype == torch.float32
    values.sum().backward()
    assert hidden.grad is None
    assert torch.equal(weights(head), weights(ValueHead(8, seed=3)))
    assert not torch.equal(weights(head), weights(ValueHead(8, seed=4)))


def test_critic_trains_the_head_and_only_the_head(fit):
    data = scored(10)
    start = fit(data, train=False)
    without = fit(data, critic_coef=0.0, weight_decay=0.0)
    with_critic = fit(data, critic_coef=0.5, weight_decay=0.0)
    # One step moves the policy alike; later its advantages come from different heads.
    first = [fit(data, critic_coef=c, max_steps=1).model.model.layers[0].mlp.up_proj.weight for c in (0.0, 0.5)]
    assert torch.equal(*first)
    assert torch.equal(head_weights(without), head_weights(start))
    assert not torch.equal(head_weights(with_critic), head_weights(start))


def test_head_has_its_own_gradient_limit(fit):
    from transformers import TrainerCallback

    class Norms(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            head = {id(p) for p in self.trainer.value_head.parameters()}
            parts = [[p.grad for p in model.parameters() if (id(p) in head) == own] for own in (True, False)]
            self.seen = [torch.nn.utils.get_total_norm(grads).item() for grads in parts]

    norms = Norms()
    trainer = fit(
        scored(10), train=False, callbacks=[norms], max_steps=1, critic_coef=50.0, max_grad_norm=0.05,
        v_head_max_grad_norm=0.2,
    )  # fmt: skip
    norms.trainer = trainer
    trainer.train()
    assert norms.seen == pytest.approx([0.2, 0.05], rel=1e-3)
    ((logged_norm,),) = logged(trainer, "v_head_grad_norm")
    assert logged_norm > 0.2


@pytest.mark.parametrize(("overflow", "norms"), [(True, []), (True, [3.0]), (False, [3.0, -1.0]), (False, [3.0, 4.0])])
def test_norm_of_a_step_that_deepspeed_skips_is_infinite(overflow, norms):
    """It marks a norm that is not finite by -1, and computes none under fp16 where it finds an overflow before."""
    groups = [[torch.nn.Parameter(torch.ones(1))] for _ in norms] or [[torch.nn.Parameter(torch.ones(1))]]
    zero = SimpleNamespace(
        bit16_groups=groups, overflow=overflow, unscale_and_clip_grads=None,
        get_grad_norm_direct=lambda gradients, parameters: torch.tensor(gradients),
    )  # fmt: skip
    limit = OwnLimit(zero, [p for group in groups for p in group], 0.1)
    for norm, group in zip(norms, groups, strict=False):
        zero.get_grad_norm_direct(norm, group)
    assert limit.norm == (5.0 if norms == [3.0, 4.0] else torch.inf)


def test_critic_learns_a_constant_reward(fit):
    data = scored(4).remove_columns("score").add_column("score", [0.7] * 14)
    trainer = fit(
        data,
        gamma=1.0,
        critic_coef=1.0,
        v_head_max_grad_norm=100.0,
        max_steps=60,
        optim="adamw_torch",
        learning_rate=3e-3,
        logging_steps=60,
    )
    trainer.evaluate(data)
    assert trainer.state.log_history[-1]["eval_values"] == pytest.approx(0.7, abs=0.1)


# -- saving --------------------------------------------------------------------------------------------------------


def test_saved_policy_is_plain_and_the_head_lies_beside_it(fit, tmp_path):
    trainer = fit(scored(10))
    trainer.save_model(tmp_path / "saved")
    trainer.model.save_pretrained(tmp_path / "by hand")
    policy = [p for name, p in trainer.model.named_parameters() if "v_head" not in name]
    for folder in ("saved", "by hand"):
        assert not any("v_head" in name for name in load_file(tmp_path / folder / "model.safetensors"))
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["unexpected_keys"] and not info["missing_keys"]
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), policy, strict=True))
    head = ValueHead(32)
    load_value_head(head, str(tmp_path / "saved"))
    assert torch.equal(weights(head), head_weights(trainer))


def test_values_are_those_of_a_model_that_computes_every_position(fit, monkeypatch):
    trainer = fit(scored(4), train=False, packed="off")
    batch = trainer.on_device(next(iter(trainer.get_train_dataloader())))
    expected = trainer.policy_tokens(trainer.model, batch)
    monkeypatch.setattr("halos_trl.forward.score.reads_wanted", lambda model: False)
    found = trainer.policy_tokens(trainer.model, batch)
    for name in ("logps_BT", "values_BT"):
        mine, theirs = (getattr(table, name).where(expected.mask_BT, 0.0) for table in (found, expected))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_head_goes_on_from_a_saved_policy(fit, tokenizer, make_config, tmp_path):
    trainer = fit(scored(10))
    trainer.save_model(tmp_path / "saved")
    again = PPOTrainer(
        str(tmp_path / "saved"), args=make_config(PPOConfig), train_dataset=scored(4), processing_class=tokenizer
    )
    assert torch.equal(head_weights(again), head_weights(trainer))


def test_lora_trains_head_and_adapter_and_saves_both(fit, tmp_path):
    start = fit(scored(10), ref=None, peft_config=LoraConfig(r=4, target_modules="all-linear"), train=False)
    trainer = fit(scored(10), ref=None, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    assert not torch.equal(head_weights(trainer), head_weights(start))
    kl = logged(trainer, "kl")
    assert kl[0] == [0.0]
    assert kl[2] != [0.0]
    trainer.save_model(tmp_path / "saved")
    assert not any("v_head" in name for name in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    assert set(load_file(tmp_path / "saved" / VALUE_HEAD_FILE)) == set(trainer.value_head.state_dict())


@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_damaged_head_is_refused(tmp_path, damage):
    head = ValueHead(8)
    if damage == "truncated":
        (tmp_path / VALUE_HEAD_FILE).write_bytes(b"\x40\0\0\0\0\0\0\0{")
    elif damage == "other":
        from halos_trl.value_head import save_value_head

        save_value_head(ValueHead(9).state_dict(), str(tmp_path))
    with pytest.raises(ValueError, match=f"{VALUE_HEAD_FILE} (is missing|cannot be read|contains the value head of)"):
        load_value_head(head, str(tmp_path))


# -- evaluation ----------------------------------------------------------------------------------------------------


def test_evaluation_covers_all_batches_and_training_goes_on(fit):
    data, held_out = scored(10), scored(4, seed=1)
    plain = fit(data, max_steps=4, ppo_epochs=2)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": held_out, "per_device_eval_batch_size": 5}
    evaluated = fit(data, max_steps=4, ppo_epochs=2, **settings)
    assert torch.equal(weights(evaluated.model), weights(plain.model)), "evaluation must not disturb the rollout"
    entry = [e for e in evaluated.state.log_history if "eval_loss" in e][-1]
    assert entry["eval_scores"] == pytest.approx(sum(held_out["score"]) / 14)
    evaluated.model.train()
    evaluated.roll_out([next(iter(evaluated.get_train_dataloader()))])
    assert evaluated.model.training


def test_dropout_is_off_in_the_rollout_and_on_in_the_update(fit, model):
    seen = []
    model.config.attention_dropout = 0.5
    trainer = fit(scored(10), train=False, disable_dropout=False, max_steps=1, packed="off")
    trainer.model.model.layers[0].self_attn.register_forward_hook(lambda m, *_: seen.append(m.training))
    trainer.train()
    assert seen == [False, True]


# -- where rewards come from ---------------------------------------------------------------------------------------


def reward_model(tokenizer, num_labels=1, positions=64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=positions, pad_token_id=tokenizer.pad_token_id, num_labels=num_labels,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


@pytest.mark.parametrize("num_labels", [1, 2])
def test_reward_model_scores_each_row_as_if_alone(fit, tokenizer, num_labels):
    reward = reward_model(tokenizer, num_labels)
    rows = unpaired_rows(8)
    trainer = fit(rows, reward_model=reward, reward_processing_class=tokenizer, reward_batch_size=3, max_steps=1)
    for row, score in zip(rows, trainer.train_dataset["score"], strict=True):
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        alone = reward(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, -1].item()
        assert score == pytest.approx(alone, abs=1e-6)


@pytest.fixture
def other_tokenizer():
    """Different from the policy's: other ids, a BOS token that it adds by itself, a template with tools."""
    special = ["</s>", "<s>", "<pad>"]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True) + special
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", pieces.index("<s>"))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{{ tone }}{% for tool in tools or [] %}({{ tool.name }}){% endfor %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ eos_token }}"
    )
    return tokenizer


@pytest.fixture
def scores_of(fit, other_tokenizer):
    """The scores that PPO's rows get from the other tokenizer's reward model, and those of texts by themselves."""
    reward = reward_model(other_tokenizer, positions=128)

    def alone(text, limit=None):
        ids = other_tokenizer(text, add_special_tokens=False)["input_ids"][:limit]
        return reward(torch.tensor([ids])).logits.item()

    def run(rows, texts, limit=None):
        data = datasets.Dataset.from_list(rows)
        settings = {"reward_model": reward, "reward_processing_class": other_tokenizer, "reward_batch_size": 3}
        scores = list(fit(data, train=False, **settings).train_dataset["score"])
        expected = [alone(text, limit) for text in texts]
        assert len({round(score, 4) for score in expected}) == len(rows), "rows that score alike would prove nothing"
        return scores, pytest.approx(expected, abs=1e-6)

    run.reward = reward
    return run


def turns(*texts):
    """Rows of a conversation, of completions of several lengths."""
    return [{"prompt": user("Sort cab"), "completion": assistant(text)} for text in texts]


def test_reward_model_reads_its_own_template(scores_of, other_tokenizer, tokenizer):
    assert other_tokenizer.pad_token_id != tokenizer.pad_token_id
    answers = ("abc", "a", "cabbage", "ba", "abcabcabcabc")
    scores, expected = scores_of(turns(*answers), [f"<s>[user]Sort cab[assistant]{a}</s>" for a in answers])
    assert scores == expected


def test_reward_model_reads_plain_text_as_trls_reward_trainer_does(scores_of, other_tokenizer, make_config):
    texts = [("Sort cab", " abc"), ("Sort b", " b</s>"), ("Sort the letters", " no")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
    scores, expected = scores_of(rows, ["<s>Sort cab abc</s>", "<s>Sort b b</s>", "<s>Sort the letters no</s>"])
    assert scores == expected
    pairs = datasets.Dataset.from_list([{"prompt": p, "chosen": c, "rejected": "x"} for p, c in texts])
    trls = trl.RewardTrainer(
        scores_of.reward, make_config(trl.RewardConfig), train_dataset=pairs, processing_class=other_tokenizer
    )
    column = next(name for name in ("chosen_ids", "chosen_input_ids") if name in trls.train_dataset.column_names)
    alone = [scores_of.reward(torch.tensor([ids])).logits.item() for ids in trls.train_dataset[column]]
    assert scores == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_template_arguments_reach_the_reward_model(scores_of, as_json):
    rows = turns("abc", "abc", "abc")
    for row, names in zip(rows, (["sort"], ["sort", "count"], []), strict=True):
        tools = [{"name": name} for name in names]
        row |= {"tools": json.dumps(tools) if as_json else tools, "chat_template_kwargs": {"tone": "kindly"}}
    start, end = "<s>kindly", "[user]Sort cab[assistant]abc</s>"
    scores, expected = scores_of(rows, [start + tools + end for tools in ("(sort)", "(sort)(count)", "")])
    assert scores == expected


@pytest.mark.parametrize("whose", ["tokenizer", "model"])
def test_rows_too_long_for_the_reward_model_lose_their_end(scores_of, other_tokenizer, said, whose):
    if whose == "tokenizer":
        other_tokenizer.model_max_length = 30
    else:
        scores_of.reward.config.max_position_embeddings = 30
    answers = ("abc", "abcde" * 3, "edcba" * 3)
    # Before the answer there are 26 tokens, so the first row just fits with its end token.
    scores, expected = scores_of(turns(*answers), [f"<s>[user]Sort cab[assistant]{a}</s>" for a in answers], limit=30)
    assert scores == expected
    assert "2 of 3 rows are longer than the 30 tokens" in said()


def test_score_comes_before_reward_model_before_label(fit, tokenizer, said):
    reward = {"reward_model": reward_model(tokenizer), "reward_processing_class": tokenizer}
    data = scored(4)
    assert list(fit(data, train=False, **reward).train_dataset["score"]) == list(data["score"])
    assert "has a score column, so the reward model is not used" in said()
    assert set(fit(unpaired_rows(8), train=False).train_dataset["score"]) == {1.0, -1.0}
    assert len(set(fit(unpaired_rows(8), train=False, **reward).train_dataset["score"])) == 8


def test_learned_reward_model_drives_ppo(fit, tokenizer, make_config, tmp_path):
    """Bradley-Terry on pairs whose chosen answers are right; saved; then PPO on labelled rows without using labels."""
    trained = BradleyTerryTrainer(
        reward_model(tokenizer),
        make_config(
            BradleyTerryConfig, max_steps=40, optim="adamw_torch", learning_rate=1e-2, per_device_train_batch_size=16
        ),
        train_dataset=paired_rows(64),
        processing_class=tokenizer,
    )
    trained.train()
    trained.save_model(tmp_path / "reward")
    reward = load_reward_model(str(tmp_path / "reward"))
    data = paired_rows(16, seed=1)
    trainer = fit(
        data,
        reward_model=reward,
        reward_processing_class=AutoTokenizer.from_pretrained(tmp_path / "reward"),
        max_steps=40,
        optim="adamw_torch",
        learning_rate=3e-3,
        kl_coef=0.0,
        cliprange=0.5,
    )
    scores = torch.tensor(trainer.train_dataset["score"])
    desirable = torch.tensor(
        [completion[0]["content"][-1] != "a" for completion in trainer.train_dataset["completion"]]
    )
    assert scores[desirable].mean() > scores[~desirable].mean() + 0.5
    # The policy moves towards what the reward model likes.
    batch = trainer.data_collator([row for row in trainer.train_dataset])
    with torch.no_grad():
        moved = (trainer.policy_tokens(trainer.model, batch).logps_BT - trainer.reference.log_probs(batch)).sum(-1)
    assert moved[batch["score"] > scores.mean()].mean() > moved[batch["score"] < scores.mean()].mean() + 0.1


# -- refusals ------------------------------------------------------------------------------------------------------


def test_reward_model_without_padding_token_is_refused(fit, tokenizer):
    reward = reward_model(tokenizer)
    reward.config.pad_token_id = None
    with pytest.raises(ValueError, match="has no padding token"):
        fit(unpaired_rows(8), reward_model=reward, reward_processing_class=tokenizer)
    unpadded = copy.deepcopy(tokenizer)
    unpadded.pad_token = None
    with pytest.raises(ValueError, match="has no padding token"):
        fit(unpaired_rows(8), reward_model=reward_model(tokenizer), reward_processing_class=unpadded)


def test_reward_model_that_pads_otherwise_than_its_tokenizer_is_refused(fit, tokenizer):
    reward = reward_model(tokenizer)
    reward.config.pad_token_id = tokenizer.eos_token_id
    with pytest.raises(ValueError, match="and its tokenizer have different padding tokens"):
        fit(unpaired_rows(8), reward_model=reward, reward_processing_class=tokenizer)


def test_what_is_no_reward_model_is_refused(fit, model, tokenizer):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.* returns logits of shape .*AutoModelForSequenceClass"):
        fit(unpaired_rows(8), reward_model=model, reward_processing_class=tokenizer)
    with pytest.raises(ValueError, match="`reward_model` is 'some-id'; expected a model"):
        fit(unpaired_rows(8), reward_model="some-id", reward_processing_class=tokenizer)


def test_reward_model_is_refused_without_its_tokenizer_or_with_three_labels(fit, tokenizer):
    with pytest.raises(ValueError, match="`reward_model` was passed without `reward_processing_class`"):
        fit(unpaired_rows(8), reward_model=reward_model(tokenizer))
    with pytest.raises(ValueError, match="`reward_processing_class` was passed without `reward_model`"):
        fit(unpaired_rows(8), reward_processing_class=tokenizer)
    with pytest.raises(ValueError, match="has 3 labels"):
        fit(unpaired_rows(8), reward_model=reward_model(tokenizer, 3), reward_processing_class=tokenizer)


def test_rows_without_any_reward_are_refused(fit):
    data = datasets.Dataset.from_list([{"prompt": "a", "completion": " b"}])
    with pytest.raises(ValueError, match="neither `score`"):
        fit(data)


def test_optimizer_that_cannot_know_the_head_is_refused(fit, model, tokenizer, make_config):
    optimizers = (torch.optim.SGD(model.parameters(), lr=0.1), None)
    with pytest.raises(ValueError, match=r"`optimizers\[0\]` contains none of the trained parameters"):
        fit(scored(4), optimizers=optimizers)  # it trains a copy of the model
    arguments = (model, None, make_config(PPOConfig), None, scored(4), None, tokenizer, None, None, optimizers)
    with pytest.raises(ValueError, match="`optimizers` contains an optimizer that was created before the value head"):
        PPOTrainer(*arguments)


def test_column_advantage_of_raw_rows_is_not_read(fit, said):
    trainer = fit(scored(2).add_column("advantage", ["ab"] * 8), train=False)
    assert "columns ['advantage'], which are ignored" in said()
    assert "advantage" not in trainer.train_dataset.column_names


def test_parameters_move_into_optimizer_groups_of_their_own():
    policy, head = (torch.nn.Linear(2, 2) for _ in range(2))
    groups = [{"params": [policy.weight, head.weight], "weight_decay": 0.1}, {"params": [head.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.5, weight_decay=0.0)
    give_own_groups(optimizer, head.parameters())
    found = [(group["params"], group["weight_decay"], group["lr"]) for group in optimizer.param_groups]
    assert found == [([policy.weight], 0.1, 0.5), ([head.bias], 0.0, 0.5), ([head.weight], 0.1, 0.5)]
