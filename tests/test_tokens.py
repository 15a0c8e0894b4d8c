"""From rows to token ids: equality with TRL where intended; repeated prompts, other turns, prefills, BOS and EOS."""

import copy
import re
from types import SimpleNamespace

import datasets
import pytest
import torch
import trl
from conftest import assistant, paired_rows, unpaired_rows, user
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

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
    toy,
)
from halos_trl._trl.rows import token_limits
from halos_trl.data.tokens import NOTES, RowTokenizer, TokenLimits

SIDES = {"paired": ("chosen", "rejected"), "unpaired": ("completion",)}

TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def turns_tokenizer(tokenizer):
    tokenizer.chat_template = TURNS
    return tokenizer


def word_tokenizer(template=None, **special):
    """One token for each word; `special` says what it puts around a text by itself."""
    words = ["<pad>", "<s>", "</s>", "a", "b", "c", "d", "?"]
    vocab = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "?"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def tokenize(tokenizer, row, **settings):
    sides = SIDES["paired" if "chosen" in row else "unpaired"]
    made = RowTokenizer(tokenizer, "train", sides, **settings)(row, 0)
    return made | {NOTES: made[NOTES].splitlines()}


def by_trl(trainer_class, dataset, tokenizer):
    host = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    return trainer_class._prepare_dataset(host, dataset, tokenizer, args, "train")


# -- equal to TRL --------------------------------------------------------------------------------------------------

TEXTS = [
    {"prompt": "Sort fatbm", "chosen": " abfmt", "rejected": " mbtaf<|end|>"},
    {"prompt": "So", "chosen": "rt", "rejected": " rt"},  # tokens merge across the boundary
]
TOOL_TURNS = [
    {
        "prompt": user("go"),
        "chosen": [*assistant("a"), *user("b"), *assistant("c")],
        "rejected": [{"role": "system", "content": "x"}, *assistant("c")],
        "chat_template_kwargs": {"greeting": "hi"},
        "tools": '[{"type": "function", "function": {"name": "f"}}]',
    }
]
GREETING = "{{ greeting }}{{ tools[0].function.name if tools else '' }}" + TURNS


@pytest.mark.parametrize(
    ("rows", "template"), [(paired_rows(3).to_list(), None), (TEXTS, None), (TOOL_TURNS, GREETING)]
)
def test_token_ids_are_those_of_trl(tokenizer, rows, template):
    tokenizer.chat_template = template or tokenizer.chat_template
    data = datasets.Dataset.from_list(rows)
    pairs = by_trl(trl.DPOTrainer, data, tokenizer)
    implicit = data.map(lambda row: {side: row["prompt"] + row[side] for side in SIDES["paired"]}).remove_columns(
        "prompt"
    )
    whole = by_trl(trl.RewardTrainer, implicit, tokenizer)
    single = by_trl(trl.KTOTrainer, data, tokenizer)
    for i, row in enumerate(data):
        ours = tokenize(tokenizer, row)
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        assert [ours[name] for name in names] == [pairs[i][name] for name in names]
        ours = tokenize(tokenizer, implicit[i], whole=True, prompt_is_explicit=False)
        assert [ours[name] for name in names[1:]] == [whole[i][name] for name in names[1:]]
        for side, single_row in (("chosen", single[i]), ("rejected", single[i + len(data)])):
            rest = {key: value for key, value in row.items() if key not in SIDES["paired"]}
            one = tokenize(tokenizer, rest | {"completion": row[side]})
            names = ("prompt_ids", "completion_ids")
            assert [one[name] for name in names] == [single_row[name] for name in names]


# -- the prompt inside the completion ------------------------------------------------------------------------------


@pytest.fixture
def scorer(tokenizer):
    """A reward model."""
    config = toy.tiny_model(tokenizer).config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


@pytest.fixture
def build(model, tokenizer, make_config):
    """A trainer, not trained yet."""

    def run(trainer_class, config_class, rows, *, policy=None, processing_class=None, streaming=False, **settings):
        data = datasets.Dataset.from_list(rows)
        return trainer_class(
            model=copy.deepcopy(model) if policy is None else policy,
            args=make_config(config_class, **settings),
            train_dataset=data.to_iterable_dataset() if streaming else data,
            processing_class=processing_class or tokenizer,
        )

    return run


@pytest.mark.parametrize("streaming", [False, True])
def test_repeated_prompt_is_taken_out_and_counted(build, said, streaming):
    rows = paired_rows(3).to_list()
    plain = list(build(DPOTrainer, DPOConfig, rows).train_dataset)
    repeated = copy.deepcopy(rows)
    for side in SIDES["paired"]:
        repeated[1][side] = repeated[1]["prompt"] + repeated[1][side]
    assert "repeat" not in said()
    found = list(build(DPOTrainer, DPOConfig, repeated, streaming=streaming).train_dataset)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert [row[name] for row in found] == [row[name] for row in plain]
    count = "1 rows of the streamed train" if streaming else "1 of 3 rows of the train dataset (the first is row 1)"
    assert count in said() and "repeat their prompt" in said()


@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(KTOTrainer, KTOConfig), (BradleyTerryTrainer, BradleyTerryConfig)]
)
def test_repeated_prompt_in_other_forms_of_rows(build, scorer, said, trainer_class, config_class):
    pairs = [row | {side: row["prompt"] + row[side] for side in SIDES["paired"]} for row in paired_rows(4).to_list()]
    policy = scorer if trainer_class is BradleyTerryTrainer else None
    plain = build(trainer_class, config_class, paired_rows(4).to_list(), policy=policy).train_dataset
    found = build(trainer_class, config_class, pairs, policy=policy).train_dataset
    for name in plain.column_names:
        if name.endswith("_ids"):
            assert list(found[name]) == list(plain[name])
    assert "repeat their prompt" in said()


def test_repeated_text_is_kept_and_counted(tokenizer):
    row = {"prompt": "Sort ab", "completion": "Sort ab: ab"}
    made = tokenize(tokenizer, row)
    assert tokenizer.decode(made["completion_ids"]) == "Sort ab: ab<|end|>"
    assert made[NOTES] == ["repeated text"]
    assert tokenize(tokenizer, {"prompt": " ", "completion": " ab"})[NOTES] == []  # no prompt worth the name


def test_completion_that_only_repeats_the_prompt_is_refused(tokenizer):
    with pytest.raises(ValueError, match="Row 0 of the train dataset only repeats the prompt"):
        tokenize(tokenizer, {"prompt": user("a"), "completion": user("a")})


# -- turns of the other side ---------------------------------------------------------------------------------------

DIALOGUE = [*assistant("bc"), *user("dd"), {"role": "tool", "content": "e"}, *assistant("f"), *user("g")]


def trained_text(tokenizer, made, side="completion"):
    runs, ids = [[]], made[f"{side}_ids"]
    for token, is_trained in zip(ids, made[f"{side}_mask"], strict=True):
        if is_trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TURNS, ["bc<|end|>\n", "f<|end|>\n"]),
        (MARKED, ["bc<|end|>", "f<|end|>"]),
        (None, ["bc<|end|>", "f<|end|>"]),  # the toy's own: nothing behind the end token
    ],
)
def test_only_tokens_of_the_assistant_are_trained(tokenizer, template, expected):
    tokenizer.chat_template = template or tokenizer.chat_template
    dialogue = DIALOGUE if template else [turn for turn in DIALOGUE if turn["role"] != "tool"]
    row = {"prompt": user("a"), "completion": dialogue}
    assert trained_text(tokenizer, tokenize(tokenizer, row, assistant_only=True)) == expected
    assert tokenize(tokenizer, row, assistant_only=True)[NOTES] == []
    assert tokenize(tokenizer, row)[NOTES] == ["other turns"]


def test_turns_that_the_assistant_takes_in_a_row_have_headers_of_the_template(turns_tokenizer):
    row = {"prompt": user("a"), "completion": [*assistant("b"), *assistant("c")]}
    made = tokenize(turns_tokenizer, row, assistant_only=True)
    assert trained_text(turns_tokenizer, made) == ["b<|end|>\n", "c<|end|>\n"]


def test_a_template_whose_turns_change_later_is_refused(tokenizer):
    last = "{% if loop.last %}<think></think>{% endif %}"
    tokenizer.chat_template = TURNS.replace("<|{{ m.role }}|>", "<|{{ m.role }}|>" + last)
    with pytest.raises(ValueError, match=r"Row 0 .*renders a turn differently if others follow it"):
        tokenize(tokenizer, {"prompt": user("a"), "completion": DIALOGUE}, assistant_only=True)


def test_completion_without_the_assistant_is_refused(turns_tokenizer):
    with pytest.raises(ValueError, match="without a token of the assistant"):
        tokenize(turns_tokenizer, {"prompt": user("a"), "completion": user("b")}, assistant_only=True)


def dialogues(n=4, scored=False):
    """Completions of several turns, all of different lengths."""
    rows = []
    for i in range(n):
        turns = [*assistant("ab" * (i + 1)), *user("c" * (3 - i % 3)), *assistant("d" * (1 + i % 2))]
        rows.append({"prompt": user("Sort " + "abcd"[i % 4]), "completion": turns})
        rows[-1] |= {"score": float(i % 3)} if scored else {"label": i % 2 == 0}
    return rows


def assistant_logps(model, tokenizer, prompt, completion):
    """Summed log-prob and number of the assistant's tokens, one forward of the plain model in float64. The toy's
    template has a header token for each turn, an end token behind the assistant's, and nothing else.
    """
    header = {role: tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ("user", "assistant", "system")}
    ids, written = [], []
    for k, turn in enumerate([*prompt, *completion]):
        text = tokenizer(turn["content"], add_special_tokens=False)["input_ids"]
        own = turn["role"] == "assistant"
        turn_ids = [header[turn["role"]], *text, *([tokenizer.eos_token_id] if own else [])]
        ids += turn_ids
        written += [False, *[own and k >= len(prompt)] * (len(turn_ids) - 1)]
    logits = copy.deepcopy(model).double()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    logps = logits.gather(-1, torch.tensor(ids)[1:, None])[:, 0]
    mask = torch.tensor(written[1:])
    return logps[mask].sum().item(), int(mask.sum())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("truncation", [{}, {"max_length": 8}, {"max_length": 6, "truncation_mode": "keep_end"}])
def test_paired_batches_score_the_assistants_tokens(build, model, tokenizer, truncation, streaming):
    rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": assistant("ba")} for r in dialogues()]
    trainer = build(DPOTrainer, DPOConfig, rows, assistant_only_loss=True, streaming=streaming, **truncation)
    batch = trainer.data_collator(list(trainer.train_dataset))
    tokens = trainer.policy_tokens(trainer.model, trainer.on_device(batch))
    if not truncation:
        for i, row in enumerate(rows):
            for k, side in enumerate(SIDES["paired"]):
                expected, count = assistant_logps(model, tokenizer, row["prompt"], row[side])
                assert tokens.logps_BT[i + k * len(rows)].sum().item() == pytest.approx(expected, rel=1e-5)
                assert tokens.mask_BT[i + k * len(rows)].sum() == count
    header = tokenizer.convert_tokens_to_ids("<|user|>")
    assert not ((batch["input_ids"] == header) & batch["completion_mask"].bool()).any()
    untrained = (batch["input_ids"] == tokenizer.convert_tokens_to_ids("c")) & batch["completion_mask"].bool()
    assert not untrained.any()
    assert batch["completion_mask"].sum(-1).min() > 0


def test_without_it_the_turns_are_trained_and_counted(build, said):
    rows = dialogues() + unpaired_rows(2).to_list()
    trainer = build(KTOTrainer, KTOConfig, rows)
    assert "4 of 6 rows of the train dataset (the first is row 0) have turns of other roles" in said()
    assert "completion_mask" not in trainer.train_dataset.column_names
    # The prompt's tokens only.
    batch = trainer.data_collator(list(trainer.train_dataset))
    lengths = [len(row["completion_ids"]) for row in trainer.train_dataset]
    assert batch["completion_mask"].sum(-1).tolist() == lengths


@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(GRPOTrainer, GRPOConfig), (PPOTrainer, PPOConfig), (KTOTrainer, KTOConfig)]
)
def test_precomputed_reference_counts_the_same_tokens(build, trainer_class, config_class):
    rows = dialogues(8, scored=trainer_class is not KTOTrainer)
    runs = []
    for precompute in (False, True):
        settings = {"assistant_only_loss": True, "loss_type": "apo_zero_unpaired"} if config_class is KTOConfig else {}
        trainer = build(trainer_class, config_class, rows, precompute_ref_log_probs=precompute, **settings)
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert runs[0] == pytest.approx(runs[1], abs=1e-6)


@pytest.mark.parametrize("precompute", [False, True])
def test_kl_partners_are_scored_on_the_tokens_that_their_own_rows_train_on(build, precompute):
    settings = {"assistant_only_loss": True, "precompute_ref_log_probs": precompute}
    trainer = build(KTOTrainer, KTOConfig, dialogues(), **settings)
    data = list(trainer.train_dataset)
    trained = [[t for t, m in zip(r["completion_ids"], r["completion_mask"], strict=True) if m] for r in data]
    columns = ("prompt_ids", "completion_ids", "completion_mask", "label", "KL_completion_ids", "KL_mask")
    columns += ("ref_logps", "ref_KL_logps")
    rows = [{column: row[column] for column in columns if column in row} for row in data]
    (batch,) = trainer._kl_batches([trainer.on_device(trainer.data_collator(rows))])
    partners = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert partners == trained[1:] + trained[:1]
    for i, row in enumerate(data):  # and what stands before and between them is there
        partner = data[(i + 1) % 4]["completion_ids"]
        assert batch["input_ids"][i].tolist()[: len(row["prompt_ids"]) + len(partner)] == row["prompt_ids"] + partner


def test_ppos_score_stands_on_the_last_token_that_the_assistant_wrote(build):
    rows = dialogues(4, scored=True)
    for row in rows:
        row["completion"] = [*row["completion"], *user("b")]
    trainer = build(PPOTrainer, PPOConfig, rows, gamma=1.0, lam=1.0)
    data = list(trainer.train_dataset)
    batch = trainer.on_device(trainer.data_collator(data))
    rollout = trainer.roll_out([batch])[0]
    for i, row in enumerate(data):
        # Counted from behind in the row's own mask.
        last = max(k for k, is_trained in enumerate(row["completion_mask"]) if is_trained)
        assert row["completion_ids"][last] == trainer.processing_class.eos_token_id
        future = rollout.discounted_future_rewards[i]
        assert future.nonzero().max() == len(row["prompt_ids"]) + last - 1 if row["score"] else not future.any()
        assert not future[~batch["completion_mask"][i, 1:].bool()].any()


def test_texts_are_the_assistants_and_images_are_refused(build, tokenizer):
    made = tokenize(tokenizer, {"prompt": "a", "completion": " b"}, assistant_only=True)
    assert made["completion_mask"] == [True] * len(made["completion_ids"])
    rows = [{**row, "image": "x"} for row in unpaired_rows(2).to_list()]
    with pytest.raises(ValueError, match="has images"):
        build(KTOTrainer, KTOConfig, rows, assistant_only_loss=True)


# -- assistant prefill ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, TURNS, MARKED])
def test_prompt_that_ends_in_a_turn_of_the_assistant_is_continued(tokenizer, template):
    tokenizer.chat_template = template or tokenizer.chat_template
    prompt = [*user("a"), *assistant("the ans")]
    row = {"prompt": prompt, "completion": [*assistant("wer"), *user("b"), *assistant("c")]}
    made = tokenize(tokenizer, row, assistant_only=True)
    end = "<|end|>" if template is None else "<|end|>\n"
    newline = "" if template is None else "\n"
    assert tokenizer.decode(made["prompt_ids"]) == f"<|user|>a{newline}<|assistant|>the ans"
    assert tokenizer.decode(made["completion_ids"]) == f"wer{end}<|user|>b{newline}<|assistant|>c{end}"
    assert trained_text(tokenizer, made)[0].rstrip("\n") == "wer<|end|>"
    assert made[NOTES] == ["continued"]


def test_prefill_is_continued_by_both_sides_of_a_pair_and_by_a_reward_model(tokenizer):
    prompt = [*user("a"), *assistant("x")]
    row = {"prompt": prompt, "chosen": assistant("y"), "rejected": assistant("z")}
    made = tokenize(tokenizer, row)
    assert tokenizer.decode(made["prompt_ids"]) == "<|user|>a<|assistant|>x"
    assert [tokenizer.decode(made[f"{side}_ids"]) for side in SIDES["paired"]] == ["y<|end|>", "z<|end|>"]
    whole = tokenize(tokenizer, row, whole=True)
    assert tokenizer.decode(whole["chosen_ids"]) == "<|user|>a<|assistant|>xy<|end|>"


def test_what_is_no_prefill(tokenizer):
    called = {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}
    for prompt, completion, explicit in (
        ([*user("a"), *assistant("x")], [*user("b"), *assistant("y")], True),  # the dialogue goes on
        ([*user("a"), called], assistant("y"), True),
        ([*user("a"), *assistant("x")], assistant("y"), False),  # the common start of two conversations
    ):
        made = tokenize(tokenizer, {"prompt": prompt, "completion": completion}, prompt_is_explicit=explicit)
        assert "continued" not in made[NOTES]
        text = tokenizer.decode(made["prompt_ids"] + made["completion_ids"])
        assert text == tokenizer.apply_chat_template(prompt + completion, tokenize=False)
    made = tokenize(tokenizer, {"prompt": [*user("a"), *assistant("")], "completion": assistant("y")})
    assert tokenizer.decode(made["prompt_ids"]) == "<|user|>a<|assistant|>"


# -- special tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("begin", ["", "<s> "])
@pytest.mark.parametrize("end", ["", " </s>"])
def test_bos_and_eos_stand_once(template, begin, end):
    tokenizer = word_tokenizer(template)
    made = tokenize(tokenizer, {"prompt": f"{begin}a b", "chosen": f" c{end}", "rejected": " d"})
    bos = ["<s>"] if begin or (template or "").startswith("<s>") else []
    assert tokenizer.convert_ids_to_tokens(made["prompt_ids"]) == [*bos, "a", "b"]
    assert tokenizer.convert_ids_to_tokens(made["chosen_ids"]) == ["c", "</s>"]
    assert tokenizer.convert_ids_to_tokens(made["rejected_ids"]) == ["d", "</s>"]
    assert made[NOTES] == (["two BOS"] if begin and (template or "").startswith("<s>") else [])
    whole = tokenize(tokenizer, {"prompt": f"{begin}a b", "chosen": f" c{end}", "rejected": " d"}, whole=True)
    assert whole["chosen_ids"] == made["prompt_ids"] + made["chosen_ids"]


def test_tokenizer_without_eos_or_padding(build, tokenizer):
    with pytest.raises(ValueError, match=r"Row 0 .*is text, .*EOS token"):
        tokenize(word_tokenizer(eos_token=None), {"prompt": "a", "completion": "b"})
    bare = word_tokenizer(eos_token=None, pad_token=None)
    with pytest.raises(ValueError, match="neither a padding token nor an EOS"):
        build(KTOTrainer, KTOConfig, unpaired_rows(2).to_list(), processing_class=bare)


# -- what cannot be tokenized, or leaves nothing -------------------------------------------------------------------

TRIMS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}" + (
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["paired", "unpaired", "reward", "scored"])
def test_completion_that_the_template_trims_to_nothing_is_refused(build, scorer, tokenizer, kind, streaming):
    tokenizer.chat_template = TRIMS
    pairs, policy = paired_rows(3).to_list(), None
    pairs[1]["rejected"] = assistant(" ")
    rows, trainer_class, config_class = pairs, DPOTrainer, DPOConfig
    if kind == "reward":
        trainer_class, config_class, policy = BradleyTerryTrainer, BradleyTerryConfig, scorer
    if kind in ("unpaired", "scored"):
        rows = [{"prompt": row["prompt"], "completion": row["rejected"], "label": True} for row in pairs]
        trainer_class, config_class = (KTOTrainer, KTOConfig) if kind == "unpaired" else (GRPOTrainer, GRPOConfig)
    if kind == "scored" and streaming:
        return  # refused
    with pytest.raises(ValueError, match=r"Row 1 of the train dataset .*a completion of zero tokens"):
        list(build(trainer_class, config_class, rows, policy=policy, streaming=streaming).train_dataset)


def test_row_that_cannot_be_rendered_is_named(build, said):
    rows = unpaired_rows(4).to_list()
    rows[2]["prompt"] = [{"role": "judge", "content": "a"}]
    fault = r"[Rr]ow 2 of the train dataset cannot be rendered: the chat template fails with TemplateError.*'judge'"
    with pytest.raises(ValueError, match=fault):
        build(KTOTrainer, KTOConfig, rows)
    assert len(build(KTOTrainer, KTOConfig, rows, drop_invalid_rows=True).train_dataset) == 3
    assert re.search(r"Dropped 1 of 4 rows of the train dataset \(the first is row 2\): " + fault, said())
    with pytest.raises(ValueError, match="No row of the train dataset can be trained on: Row 0"):
        build(KTOTrainer, KTOConfig, rows[2:3] * 2, drop_invalid_rows=True)


def test_no_chat_template_at_all(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"Row 0 .*has no chat template"):
        tokenize(tokenizer, {"prompt": user("a"), "completion": assistant("b")})


def test_a_single_token_that_nothing_predicts_is_refused():
    with pytest.raises(ValueError, match=r"has a single token, .*, and an empty prompt"):
        tokenize(word_tokenizer(), {"prompt": "", "completion": "</s>"})


# -- what the model takes ------------------------------------------------------------------------------------------


def test_token_ids_and_positions_beyond_the_model_are_named(build, model, tokenizer, make_config):
    size = model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens(["<new>"] * 1)
    rows = unpaired_rows(3).to_list()
    rows[2]["completion"] = assistant("<new>")
    new = tokenizer.convert_tokens_to_ids("<new>")
    with pytest.raises(ValueError, match=rf"Row 2 .*token id {new} \('<new>'\).*has {size} token embeddings"):
        build(KTOTrainer, KTOConfig, rows)
    tokenizer.pad_token = "<new>"
    with pytest.raises(ValueError, match=f"padding token has id {new}"):
        build(KTOTrainer, KTOConfig, unpaired_rows(3).to_list())


def test_only_learned_positions_are_a_limit(build, tokenizer, tmp_path):
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=24, n_embd=16, n_layer=1, n_head=2)
    learned = GPT2LMHeadModel(config)
    rows = paired_rows(3).to_list()
    rows[1]["chosen"] = assistant("a" * 40)
    learned.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    for policy in (learned, str(tmp_path / "policy")):
        with pytest.raises(ValueError, match=r"Row 1 .*\(`chosen`\) has \d+ tokens, .* 24 positions.*max_length=24"):
            build(DPOTrainer, DPOConfig, rows, policy=policy)
    build(DPOTrainer, DPOConfig, rows, policy=learned, max_length=24)
    build(DPOTrainer, DPOConfig, rows)  # rotary
    roberta = RobertaConfig(
        vocab_size=50, max_position_embeddings=26, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, pad_token_id=1,
    )  # fmt: skip
    scorer = SimpleNamespace(model=RobertaForSequenceClassification(roberta))
    assert token_limits(scorer, word_tokenizer()) == TokenLimits(50, 24)  # counted from behind the padding row


def test_rows_of_a_reward_trainer_that_were_tokenized_before(build, scorer):
    size = scorer.get_input_embeddings().num_embeddings
    good = {"chosen_ids": [5, 6], "rejected_ids": [7]}
    assert len(build(BradleyTerryTrainer, BradleyTerryConfig, [good] * 2, policy=scorer).train_dataset) == 2
    for bad in ([], [size], [-1]):
        with pytest.raises(ValueError, match=r"Row 1 of the train dataset has `rejected_ids`"):
            build(BradleyTerryTrainer, BradleyTerryConfig, [good, {**good, "rejected_ids": bad}], policy=scorer)


# -- what is cut ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_cut_completions_are_counted(build, said, streaming):
    rows = unpaired_rows(5).to_list()
    for i in (2, 4):
        rows[i]["completion"] = assistant("a" * 30)
    list(build(KTOTrainer, KTOConfig, rows, max_length=30, streaming=streaming).train_dataset)
    count = "2 rows of the streamed" if streaming else "2 of 5 rows of the train dataset (the first is row 2) have a"
    assert count in said() and "truncated at `max_length`=30" in said()


def test_which_completions_are_cut_and_which_rows_have_no_room():
    words = word_tokenizer()

    def notes(prompt, completion, **settings):
        row = {"prompt": " ".join("a" * prompt), "completion": " b" * completion}  # and an EOS
        return tokenize(words, row, **settings)[NOTES]

    assert notes(3, 4, max_length=8) == []
    assert notes(3, 4, max_length=7) == ["cut"]
    assert notes(3, 4, max_length=4) == ["cut"]
    assert notes(3, 4, max_length=3) == ["no room"]
    # From the end, the prompt goes first.
    assert notes(3, 4, max_length=6, keep_end=True) == []
    assert notes(3, 4, max_length=4, keep_end=True) == ["cut"]
    assert notes(3, 4, max_length=1, keep_end=True) == ["no room"]  # its only token would have no context
    assert notes(3, 4, max_length=7, whole=True) == ["no room"]


# -- a column for each side ----------------------------------------------------------------------------------------


def test_rows_of_unpaired_pairs_are_named_by_the_users_number(build, said):
    rows = paired_rows(3).to_list()
    rows[2]["chosen"] = rows[2]["prompt"] + rows[2]["chosen"]
    build(KTOTrainer, KTOConfig, rows)
    assert "1 of 6 completions of the train dataset (the first is row 2) repeat their prompt" in said()


def test_one_sided_data_get_no_range_of_weights(build, said):
    build(KTOTrainer, KTOConfig, [row | {"label": True} for row in unpaired_rows(4).to_list()])
    assert "there is no undesirable example" in said() and "in [" not in said()


def test_weights_are_recommended_so_that_both_sides_count_alike(build, said):
    rows = [row | {"label": i < 2} for i, row in enumerate(unpaired_rows(8).to_list())]  # 2 desirable, 6 undesirable
    build(KTOTrainer, KTOConfig, rows)
    assert "`desirable_weight` in [3.00, 4.00] or `undesirable_weight` in [0.25, 0.33]" in said()
