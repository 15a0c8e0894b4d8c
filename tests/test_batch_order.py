"""`batch_order="halos"`: the trainers' batches equal HALOs' recorded ones, and so does a KTO step."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import gather_object
from conftest import cpu_config, paired_rows, perturbed, unpaired_rows, weights
from launch import launch
from test_halos_batching import FOLDER, RECORDED, feedback
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification

from halos_trl import (
    BradleyTerryConfig,
    BradleyTerryTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    PPOConfig,
    PPOTrainer,
    SimPOConfig,
    load_feedback,
    toy,
)
from halos_trl.data.halos import (
    HalosGroupBatches,
    HalosPairedBatches,
    HalosTokenizer,
    HalosUnpairedBatches,
    flat_rows,
    load_prompts,
)

SAMPLERS = {"paired": HalosPairedBatches, "unpaired": HalosUnpairedBatches, "group": HalosGroupBatches}


@pytest.fixture(scope="module")
def halos_tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER / "tokenizer")


def flat_list(run):
    """The rows of a run in file order, each as a batch names it, with its prompt."""
    for prompt in load_prompts(feedback(run["data"])):
        if run["loader"] == "paired":
            yield from ({"prompt": prompt.key, "chosen": i, "rejected": j} for i, j in prompt.pairs)
            continue
        judged = [(i, s) for pair in prompt.pairs for i, s in zip(pair, ("chosen", "rejected"), strict=True)]
        judged = judged or [(i, "chosen" if good else "rejected") for i, good in enumerate(prompt.desirable)]
        for i, status in judged:
            yield {"prompt": prompt.key, "completion": i, "status": status, "score": prompt.scores[i]}


PLAIN = [
    run
    for run in RECORDED["batching"]
    if run["n_epochs"] and not run["n_examples"] and not run["num_skip"] and not run["max_prompt_count"]
    and run["frac_unique_desirable"] is None and not run["data"].startswith("noscore")
]  # fmt: skip


@pytest.mark.parametrize("run", PLAIN, ids=lambda run: "-".join(str(v) for v in list(run.values())[:6]))
def test_samplers_give_the_recorded_batches(run):
    rows, processes = list(flat_list(run)), run["num_processes"]
    expected, made = run["processes"], []
    for process in range(processes):
        sampler = SAMPLERS[run["loader"]](
            [row["prompt"] for row in rows],
            microbatch_size=run["microbatch_size"],
            microbatches=run["global_batch_size"] // (run["microbatch_size"] * processes),
            num_processes=processes,
            process_index=process,
            seed=run["seed"],
        )
        epochs = []
        for epoch in range(run["n_epochs"]):
            sampler.set_epoch(epoch)
            epochs.append([[rows[i] for i in batch] for batch in sampler])
            assert len(epochs[-1]) == len(sampler)
        made.append(epochs)
    firsts = run.get("microbatches_in_first_epoch") or [len(batches) for batches in expected]
    fewest = min(firsts)  # HALOs leaves processes with different numbers of them, which would wait for ever
    for process, batches in enumerate(expected):
        bare = [[{k: v for k, v in row.items() if k != "kl_completion"} for row in batch] for batch in batches]
        epochs = [bare[: firsts[process]], bare[firsts[process] :]][: run["n_epochs"]]
        assert made[process] == [batches[:fewest] for batches in epochs]
    used = sum(len(batch) for epochs in made for batch in epochs[0])
    assert sampler.left_out == len(rows) - used


def test_a_step_of_ppo_is_repeated_as_a_whole():
    made = list(HalosUnpairedBatches(range(14), microbatch_size=2, microbatches=3, repeats=2))
    assert len(made) == 12  # two steps of three, twice; the seventh micro-batch is left out
    assert made[:3] == made[3:6] != made[6:9] == made[9:12]


# -- a training run ------------------------------------------------------------------------------------------------


def rows_for(purpose, name="binary_feedback"):
    return load_feedback(feedback(name), purpose, "train")


def recorded_run(**wanted):
    return next(run for run in RECORDED["batching"] if wanted.items() <= run.items())


def sequence(tokenizer, prompt, completion):
    """Token ids, and the number of those of the prompt; nothing is cut."""
    ids = tokenizer.apply_chat_template(prompt + completion, return_dict=False)
    return ids, len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))


def log_prob(model, ids, start):
    logps = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    return sum(logps[i - 1, ids[i]] for i in range(start, len(ids)))


def halos_kto_losses(policy, reference, tokenizer, prompts, batches, beta=0.1, weights=(1.0, 1.0)):
    """HALOs' loss of the recorded micro-batch of each process, the mean of 1 - sigmoid(+-beta (log-ratio - KL)); and
    their KL.
    """

    def log_ratio(key, other, i):
        ids, start = sequence(tokenizer, prompts[key].prompt, prompts[other].generations[i])
        with torch.no_grad():
            stays = log_prob(reference, ids, start)
        return log_prob(policy, ids, start) - stays

    with torch.no_grad():
        mismatched = [log_ratio(row["prompt"], *row["kl_completion"]) for batch in batches for row in batch]
        kl = (sum(mismatched) / max(sum(float(x != 0) for x in mismatched), 1)).clamp(min=0)
    means = []
    for batch in batches:
        losses = []
        for row in batch:
            sign, weight = (1, weights[0]) if row["status"] == "chosen" else (-1, weights[1])
            ratio = log_ratio(row["prompt"], row["prompt"], row["completion"])
            losses.append(weight * (1 - torch.sigmoid(sign * beta * (ratio - kl))))
        means.append(sum(losses) / len(losses))
    return means, kl


def float64_model(tokenizer, seed=0):
    """A tiny GPT-2, whose layers compute in float64 throughout; Llama's norms and positions do not."""
    torch.manual_seed(seed)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256, "vocab_size": len(tokenizer)}
    config = GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, pad_token_id=tokenizer.pad_token_id)
    return GPT2LMHeadModel(config).double()


def give_float64_head(model):
    """In place of TRL's fused head, which rounds log-probs to float32."""

    def forward(*args, fused_lm_head=False, labels=None, shift_labels=None, **kwargs):
        logits = type(model).forward(model, *args, **kwargs).logits
        if shift_labels is None:
            logits, shift_labels = logits[:, :-1], labels[:, 1:]
        wanted = shift_labels != -100
        logps = logits.log_softmax(-1).gather(-1, shift_labels.clamp(min=0)[..., None])[..., 0].where(wanted, 0.0)
        return Answer(log_probs=logps)

    model.forward = forward


class Answer(dict):
    """A model output, in which DDP looks for tensors as in any dict."""

    __getattr__ = dict.get


class RecordingKTOTrainer(KTOTrainer):
    """Keeps the loss and the KL term of each training micro-batch."""

    seen = ()

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.seen += ((loss.item(), self.kl.item()),)
        return loss


STEPS = [[0], [1], [2], [3], [4], [5], [6], [7], [8]], [[0, 1], [2, 3], [4, 5], [6], [7, 8]]
"""The micro-batches of each optimizer step, alone and two together; an epoch has 7."""


@pytest.mark.parametrize(("packed", "steps"), zip(["off", "on"], STEPS, strict=True), ids=["padded", "accumulated"])
def test_kto_steps_are_those_of_halos(packed, steps, halos_tokenizer, make_config):
    """Losses, KL terms and weights in float64 over two epochs of a recorded run, compared with HALOs' formula."""
    run = recorded_run(loader="unpaired", data="binary_feedback", num_processes=1, microbatch_size=4)
    start = float64_model(halos_tokenizer)
    reference = perturbed(start, 0.1)
    config = make_config(
        KTOConfig, batch_order="halos", per_device_train_batch_size=4, max_steps=len(steps), seed=run["seed"],
        packed=packed, learning_rate=1.0, max_grad_norm=0, max_length=None, desirable_weight=1.2,
        undesirable_weight=0.7, gradient_accumulation_steps=len(steps[0]),
    )  # fmt: skip
    trainer = RecordingKTOTrainer(
        copy.deepcopy(start), copy.deepcopy(reference), config,
        train_dataset=rows_for("unpaired"), processing_class=copy.deepcopy(halos_tokenizer),
    )  # fmt: skip
    for model in (trainer.model, trainer.ref_model):
        give_float64_head(model)
    trainer.train()

    policy = copy.deepcopy(start)
    prompts = {prompt.key: prompt for prompt in load_prompts(feedback("binary_feedback"))}
    for step in steps:
        policy.zero_grad()
        for i in step:
            [loss], kl = halos_kto_losses(
                policy, reference, halos_tokenizer, prompts, [run["processes"][0][i]], weights=(1.2, 0.7)
            )
            assert trainer.seen[i] == pytest.approx((loss.item(), kl.item()), rel=1e-11)
            (loss / len(step)).backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter -= parameter.grad
    assert len(trainer.seen) == 9
    assert len({kl for _, kl in trainer.seen}) > 5  # where all were clamped to 0, they would say nothing
    for ours, theirs in zip(trainer.model.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_kto_steps_of_two_processes_are_those_of_halos(halos_tokenizer, tmp_path):
    """Partners come from the micro-batch of a process, and the KL term is the mean over both of them."""
    saved = launch(__file__, tmp_path, "ddp")
    run = recorded_run(loader="unpaired", data="binary_feedback", num_processes=2, microbatch_size=2, n_epochs=2)
    policy, reference = float64_model(halos_tokenizer), perturbed(float64_model(halos_tokenizer), 0.1)
    prompts = {prompt.key: prompt for prompt in load_prompts(feedback("binary_feedback"))}
    for step in range(TWO_PROCESS_STEPS):
        losses, kl = halos_kto_losses(
            policy, reference, halos_tokenizer, prompts, [batches[step] for batches in run["processes"]]
        )
        for process, loss in enumerate(losses):
            assert saved[process][step] == pytest.approx((loss.item(), kl.item()), rel=1e-11)
        policy.zero_grad()
        (sum(losses) / 2).backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter -= parameter.grad


TWO_PROCESS_STEPS = 9  # of which 7 in the first epoch


def train_one_of_two(folder):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tokenizer")
    start = float64_model(tokenizer)
    config = cpu_config(
        KTOConfig, folder / "out", batch_order="halos", per_device_train_batch_size=2, max_steps=TWO_PROCESS_STEPS,
        learning_rate=1.0, max_grad_norm=0, max_length=None, seed=0, ddp_backend="gloo",
    )  # fmt: skip
    trainer = RecordingKTOTrainer(
        start, perturbed(start, 0.1), config, train_dataset=rows_for("unpaired"), processing_class=tokenizer
    )
    for model in (trainer.model, trainer.ref_model):
        give_float64_head(model)
    trainer.train()
    seen = gather_object([trainer.seen])
    if trainer.accelerator.is_main_process:
        torch.save(seen, folder / "results.pt")


class Collected:
    """A collator that keeps the rows it gets."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append(rows)
        return {"label": torch.zeros(len(rows))}


def said_by(row, *columns):
    return [row[column][0]["content"] for column in columns]


TRAINERS = {
    "paired": (DPOTrainer, DPOConfig, "paired", "pairwise_feedback", "paired"),
    "reward": (BradleyTerryTrainer, BradleyTerryConfig, "paired", "pairwise_feedback", "paired"),
    "unpaired": (KTOTrainer, KTOConfig, "unpaired", "binary_feedback", "unpaired"),
    "sides-of-pairs": (KTOTrainer, KTOConfig, "unpaired", "pairwise_feedback", "unpaired"),
    "pairs-for-kto": (KTOTrainer, KTOConfig, "unpaired", "pairwise_feedback", "paired"),
    "group": (GRPOTrainer, GRPOConfig, "group", "binary_feedback", "group"),
    "pairs-for-grpo": (GRPOTrainer, GRPOConfig, "group", "pairwise_feedback", "paired"),
    "ppo": (PPOTrainer, PPOConfig, "unpaired", "binary_feedback", "unpaired"),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_read_the_recorded_batches(name, halos_tokenizer, make_config):
    """Rows of `load_feedback` become the batches that HALOs made of the file, in both epochs where there are two."""
    trainer_class, config_class, loader, data, for_ = TRAINERS[name]
    run = recorded_run(loader=loader, data=data, num_processes=1, microbatch_size=3)
    config = make_config(
        config_class, batch_order="halos", per_device_train_batch_size=3, seed=run["seed"], remove_unused_columns=False
    )
    model = toy.tiny_model(halos_tokenizer)
    if trainer_class is BradleyTerryTrainer:
        model = LlamaForSequenceClassification(type(model.config)(**model.config.to_dict() | {"num_labels": 1}))
    trainer = trainer_class(
        model,
        args=config,
        train_dataset=rows_for(for_, data),
        processing_class=halos_tokenizer,
    )
    trainer.data_collator = collected = Collected()
    dataloader = trainer.get_train_dataloader()
    for epoch in range(run["n_epochs"]):
        dataloader.set_epoch(epoch)
        assert len(list(dataloader)) == len(dataloader)
    generations = {p["key"]: p["generations"] for p in RECORDED["loaded"][data]["train"]}
    prompts = {p.key: said_by({"prompt": p.prompt}, "prompt")[0] for p in load_prompts(feedback(data))}
    sides = ("chosen", "rejected") if loader == "paired" else ("completion",)
    assert [[said_by(row, "prompt", *sides) for row in batch] for batch in collected.batches] == [
        [[prompts[row["prompt"]], *(generations[row["prompt"]][row[side]] for side in sides)] for row in batch]
        for batch in run["processes"][0]
    ]
    if trainer_class is KTOTrainer:
        assert [[row["label"] for row in batch] for batch in collected.batches] == [
            [row["status"] == "chosen" for row in batch] for batch in run["processes"][0]
        ]
    if for_ in ("group", "unpaired"):  # with the scores of the file
        assert [[row["score"] for row in batch] for batch in collected.batches] == [
            [row["score"] for row in batch] for batch in run["processes"][0]
        ]


CAPPED = [
    run for run in RECORDED["batching"] if run["frac_unique_desirable"] is not None and not run["max_prompt_count"]
]


@pytest.mark.parametrize("run", CAPPED, ids=lambda run: run["note"][:20])
def test_capped_rows_give_the_recorded_batches(run):
    caps = {name: run[name] for name in ("frac_unique_desirable", "frac_unique_undesirable")}
    rows = flat_rows(feedback(run["data"]), run["loader"], **caps)
    sampler = HalosUnpairedBatches(
        [row["content"] for (row, *_) in rows["prompt"]], microbatch_size=run["microbatch_size"], seed=run["seed"]
    )
    loaded = {prompt.key: prompt for prompt in load_prompts(feedback(run["data"]))}
    assert [[rows[i] for i in batch] for batch in sampler] == [
        [
            {
                "prompt": loaded[row["prompt"]].prompt,
                "completion": loaded[row["prompt"]].generations[row["completion"]],
                "label": row["status"] == "chosen",
                "score": row["score"],
            }
            for row in batch
        ]
        for batch in run["processes"][0]
    ]


def test_pairs_of_the_flat_list_are_those_of_the_file():
    rows, read = flat_rows(feedback("pairwise_feedback"), "paired"), rows_for("paired", "pairwise_feedback")
    assert list(rows) == [{name: row[name] for name in rows.column_names} for row in read]


# -- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_in_the_same_order(model, tokenizer, make_config, tmp_path):
    """From the middle of the second epoch; an epoch has three steps."""

    def trainer(**settings):
        config = make_config(KTOConfig, batch_order="halos", per_device_train_batch_size=4, **settings)
        rows = unpaired_rows(14)
        return KTOTrainer(
            copy.deepcopy(model), args=config, train_dataset=rows, processing_class=copy.deepcopy(tokenizer)
        )

    whole = trainer(max_steps=6, save_strategy="steps", save_steps=4)
    whole.train()
    resumed = trainer(max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    with pytest.raises(ValueError, match="`max_prompt_length=None` has become 40"):
        trainer(max_steps=6, max_prompt_length=40).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))


@pytest.mark.parametrize("orders", [("halos", "trl"), ("trl", "halos")])
def test_a_reward_model_does_not_resume_in_another_order(model, tokenizer, make_config, tmp_path, orders):
    config = LlamaForSequenceClassification.config_class(**model.config.to_dict() | {"num_labels": 1})
    policy = LlamaForSequenceClassification(config)

    def trainer(order, **settings):
        config = make_config(BradleyTerryConfig, batch_order=order, max_steps=2, **settings)
        return BradleyTerryTrainer(
            copy.deepcopy(policy), args=config, train_dataset=paired_rows(8), processing_class=copy.deepcopy(tokenizer)
        )

    trainer(orders[0], save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match=f"`batch_order='{orders[0]}'` has become '{orders[1]}'"):
        trainer(orders[1]).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


# -- truncation ----------------------------------------------------------------------------------------------------


def test_kl_sequences_are_cut_with_their_own_prompt(halos_tokenizer, make_config):
    """The counted length of prompt i leaves less or more room for completion i+1 than for completion i."""
    budgets = {"max_prompt_length": 24, "max_length": 50}
    config = make_config(KTOConfig, batch_order="halos", per_device_train_batch_size=4, **budgets)
    trainer = KTOTrainer(
        toy.tiny_model(halos_tokenizer),
        args=config,
        train_dataset=rows_for("unpaired"),
        processing_class=halos_tokenizer,
    )
    rows = [trainer.train_dataset[i] for i in range(4, 8)]
    batch = trainer.data_collator(rows)
    render, cut = HalosTokenizer(halos_tokenizer, **budgets), 0
    for i, row in enumerate(rows):
        for completion, prefix in ((row["completion"], ""), (rows[(i + 1) % 4]["completion"], "KL_")):
            made = render(row["prompt"], completion)
            cut += made.completion_was_cut
            attended = batch[f"{prefix}attention_mask"][i].bool()
            assert batch[f"{prefix}input_ids"][i][attended].tolist() == made.combined_input_ids
            trained = batch[f"{prefix}completion_mask"][i][attended].tolist()
            assert trained == [int(label != -100) for label in made.labels]
    assert cut == 2


def test_what_was_cut_is_counted(halos_tokenizer, make_config, said):
    config = make_config(DPOConfig, batch_order="halos", max_prompt_length=24, max_length=50)
    DPOTrainer(
        toy.tiny_model(halos_tokenizer), args=config, train_dataset=rows_for("paired", "pairwise_feedback"),
        processing_class=halos_tokenizer,
    )  # fmt: skip
    assert (
        "of 21 rows of the train dataset (the first is row 0) have a completion that is truncated as in HALOs"
        in said()
    )
    assert "have a prompt that exceeds `max_prompt_length`" in said()


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (KTOConfig, {"batch_order": "HALOs"}, "`batch_order='HALOs'` cannot work: it is not one of the choices"),
        (DPOConfig, {"batch_order": "trl", "max_prompt_length": 64}, "`max_prompt_length=64` cannot work: rows keep"),
        (KTOConfig, {"max_prompt_length": 0}, "`max_prompt_length=0` cannot work: it counts tokens"),
        (KTOConfig, {"max_prompt_length": 64, "max_length": 64}, "`max_length=64` includes the completion"),
        (KTOConfig, {"train_sampling_strategy": "sequential"}, "`train_sampling_strategy='sequential'` cannot work"),
        (GRPOConfig, {"train_sampling_strategy": "sequential"}, "`train_sampling_strategy='sequential'` cannot work"),
        (DPOConfig, {"dataloader_drop_last": True}, "`dataloader_drop_last=True` cannot work"),
        (DPOConfig, {"auto_find_batch_size": True}, "`auto_find_batch_size=True` cannot work"),
        (SimPOConfig, {"assistant_only_loss": True}, "`assistant_only_loss=True` cannot work"),
        (KTOConfig, {"precompute_ref_log_probs": True}, "`precompute_ref_log_probs=True` cannot work"),
        (PPOConfig, {"accelerator_config": {"split_batches": True}}, "`accelerator_config.split_batches=True` cannot"),
    ],
)  # fmt: skip
def test_settings_without_a_meaning_in_halos_order_are_refused(config_class, settings, message, make_config):
    with pytest.raises(ValueError, match=message):
        make_config(config_class, **{"batch_order": "halos"} | settings)


def stream(rows):
    return rows.to_iterable_dataset()


def as_text(rows):
    return rows.map(lambda row: {"prompt": row["prompt"][0]["content"], "completion": "ba"})


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (stream, {}, "The train dataset is a IterableDataset"),
        (as_text, {}, "Row 0 of the train dataset has text as `prompt`"),
        (None, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, "on one process leaves no other"),
        (None, {"per_device_train_batch_size": 16}, "has 12 rows, but `batch_order='halos'` drops examples that do"),
        (None, {"max_length": 2, "max_prompt_length": 1}, "Row 0 of the train dataset has no room for its completion"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_ordered_are_refused(change, settings, message, tokenizer, model, make_config):
    rows = unpaired_rows(12)
    config = make_config(KTOConfig, **{"batch_order": "halos", "per_device_train_batch_size": 4} | settings)
    with pytest.raises(ValueError, match=message):
        KTOTrainer(
            model, args=config, train_dataset=change(rows) if change else rows, processing_class=tokenizer
        ).train()


def test_evaluation_and_a_row_that_is_left_out(tokenizer, model, make_config, said):
    config = make_config(KTOConfig, batch_order="halos", per_device_train_batch_size=4, per_device_eval_batch_size=4)
    rows = unpaired_rows(14)
    trainer = KTOTrainer(
        model, args=config, train_dataset=rows, eval_dataset=unpaired_rows(6, seed=1), processing_class=tokenizer
    )
    trainer.train()
    assert "leaves 2 of 14 rows out of every epoch" in said()
    assert trainer.evaluate()["eval_loss"] > 0


if __name__ == "__main__":
    train_one_of_two(Path(sys.argv[1]))
