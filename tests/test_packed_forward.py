"""Packed rows give the same results as padded rows: layout, attention, every architecture, every trainer."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, NOT_PACKED, build
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from halos_trl.forward.layout import Span, shared_prompt_layout, table
from halos_trl.forward.packing import give_packing, packing_of
from halos_trl.forward.score import score_together, score_tokens

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def batch_of(rows, pad=0):
    """A padded batch of (prompt, completion) token ids."""
    width = max(len(p) + len(c) for p, c in rows)

    def padded(make, fill):
        return torch.tensor([(x := make(p, c)) + [fill] * (width - len(x)) for p, c in rows])

    return {
        "input_ids": padded(lambda p, c: p + c, pad),
        "attention_mask": padded(lambda p, c: [1] * len(p + c), 0),
        "completion_mask": padded(lambda p, c: [0] * len(p) + [1] * len(c), 0),
    }


def layout_of(rows):
    batch = batch_of(rows)
    return shared_prompt_layout(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])


def random_rows(shapes, vocabulary=512, seed=0):
    """`shapes`: for each prompt its length and the lengths of its completions."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(3, vocabulary, (n,), generator=generator).tolist()

    return [(prompt, ids(n)) for length, completions in shapes for prompt in [ids(length)] for n in completions]


# -- the layout ----------------------------------------------------------------------------------------------------


def test_layout_of_two_prompts():
    layout = layout_of([([5, 6, 7], [8, 9]), ([3], [4]), ([5, 6, 7], [10, 11, 12])])
    #                              prompt 1, 8 of [8, 9], 10 11 of [10, 11, 12], prompt 2
    assert layout.input_ids.tolist() == [[5, 6, 7, 8, 10, 11, 3]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 0]]
    assert layout.wanted.tolist() == [2, 3, 6, 2, 4, 5]
    assert layout.labels.tolist() == [8, 9, 4, 10, 11, 12]
    assert layout.spans == [Span(0, 3, 0, 0), Span(3, 4, 0, 3), Span(4, 6, 0, 3), Span(6, 7, 0, 0)]
    numbers = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert table(numbers, layout.mask_BT).tolist() == [[0, 0, 1, 2, 0], [3, 0, 0, 0, 0], [0, 0, 4, 5, 6]]


def test_tokens_behind_the_last_wanted_one_are_left_out():
    batch = batch_of([([5, 6], [7, 8, 9, 10])])
    batch["completion_mask"] = torch.tensor([[0, 0, 1, 0, 1, 0]])  # as where another side's turns are not trained on
    layout = shared_prompt_layout(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    assert layout.input_ids.tolist() == [[5, 6, 7, 8]]
    assert layout.wanted.tolist() == [1, 3] and layout.labels.tolist() == [7, 9]


def test_batch_without_a_completion_keeps_one_token():
    layout = layout_of([([5, 6, 7], []), ([3], [])])
    assert layout.input_ids.tolist() == [[5]] and len(layout.wanted) == 0
    assert table(torch.zeros(0), layout.mask_BT).tolist() == [[0, 0], [0, 0]]


def test_padding_on_the_left_gives_the_same_row():
    rows = [([5, 6, 7], [8, 9]), ([3], [4])]
    right, left = batch_of(rows), batch_of(rows)
    for name in left:
        left[name][1] = left[name][1].roll(3)
    layouts = [shared_prompt_layout(b["input_ids"], b["attention_mask"], b["completion_mask"]) for b in (right, left)]
    assert layouts[0].input_ids.equal(layouts[1].input_ids) and layouts[0].wanted.equal(layouts[1].wanted)


# -- one model -----------------------------------------------------------------------------------------------------


def fused(model):
    add_fused_lm_head(model, outputs=OUTPUTS)
    return model


def llama(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **settings,
    )  # fmt: skip
    return fused(LlamaForCausalLM(config).to(dtype))


SHAPES = {
    "pairs": [(9, [3, 14]), (30, [7, 1])],
    "a group": [(12, [5, 9, 1, 20, 2, 8])],
    "single rows": [(4, [6]), (17, [2]), (1, [11])],
    "prompts of one token": [(1, [1, 1]), (1, [2])],
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_tables_and_gradients_are_those_of_padded_rows(shapes, attention, checkpointing):
    model = llama().train()
    model.set_attn_implementation(attention)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    packed, batch = copy.deepcopy(model), batch_of(random_rows(shapes))
    give_packing([packed], "on")
    tables = [score_tokens(m, batch) for m in (model, packed)]
    assert packing_of(packed).active
    weights = torch.randn(tables[0].logps_BT.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # The model's norms, and its softmax under "eager", compute in float32 whatever its dtype is.
    for name in ("logps_BT", "entropy_BT", "mean_logits_BT", "is_top1_BT"):
        ours, theirs = (getattr(t, name).double().where(t.mask_BT, 0.0) for t in tables)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    for tokens in tables:
        (tokens.logps_BT * weights).sum().backward()
    for (name, p), q in zip(model.named_parameters(), packed.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-6 * p.grad.norm(), name


def test_batch_without_a_completion_has_a_zero_gradient():
    model = llama()
    give_packing([model], "on")
    score_tokens(model, batch_of(random_rows([(5, [3])])))
    tokens = score_tokens(model, batch_of([([5, 6, 7], []), ([3], [])]))
    tokens.logps_BT.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_batch_without_a_completion_decides_nothing():
    model = llama()
    give_packing([model], "on")
    score_tokens(model, batch_of([([5, 6, 7], []), ([3], [])]))
    assert packing_of(model).is_open and not packing_of(model).active
    score_tokens(model, batch_of(random_rows([(5, [3])])))
    assert packing_of(model).active


def test_model_that_fails_on_a_packed_row_is_given_padded_ones(said):
    model, batch = llama(), batch_of(random_rows([(9, [3, 14])]))
    with torch.no_grad():
        padded_BT = score_tokens(model, batch).logps_BT
        give_packing([model], "auto")

        def needs_a_mask(layer, args, kwargs):
            assert kwargs["attention_mask"].ndim == 4

        model.model.layers[1].register_forward_pre_hook(needs_a_mask, with_kwargs=True)
        assert score_tokens(model, batch).logps_BT.equal(padded_BT)
    assert "fails on a packed row (AttributeError" in said()


def test_one_layout_serves_every_forward_of_a_batch(monkeypatch):
    from halos_trl.forward import score

    made = []
    monkeypatch.setattr(score, "shared_prompt_layout", lambda *a: made.append(1) or shared_prompt_layout(*a))
    models, batch = [llama(), llama()], batch_of(random_rows([(5, [3, 4])]))
    give_packing(models, "on")
    for model in models:
        score_tokens(model, batch)
    assert len(made) == 1
    batch["completion_mask"] = batch["completion_mask"].clone()
    score_tokens(models[0], batch)
    assert len(made) == 2


def test_batches_that_share_prompts_share_a_forward():
    rows = random_rows([(9, [3, 14]), (30, [7, 1])])
    model, batches = llama(), [batch_of(rows[::2]), batch_of(rows[1::2])]
    give_packing([model], "on")
    alone = [score_tokens(model, batch).logps_BT for batch in batches]
    seen = []
    model.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    together = score_together(model, batches)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    # Both prompts once, and every completion without its last token.
    assert [ids.shape for ids in seen] == [(1, 9 + 2 + 13 + 30 + 6 + 0)]


@pytest.mark.parametrize(
    "name, column, value", [("input_ids", 0, 7), ("attention_mask", 0, 0), ("completion_mask", 6, 0)]
)
@pytest.mark.parametrize("in_place", [False, True])
def test_layout_is_that_of_the_batch_as_it_is(name, column, value, in_place):
    model, rows = llama(), random_rows([(5, [3, 4]), (6, [6])])
    give_packing([model], "on")
    batch, changed = batch_of(rows), batch_of(rows)
    changed[name][:, column] = value
    expected = score_tokens(model, changed).logps_BT
    assert not score_tokens(model, batch).logps_BT.equal(expected)
    if in_place:
        batch[name].copy_(changed[name])
    else:
        batch[name] = changed[name].clone()
    assert score_tokens(model, batch).logps_BT.equal(expected)


def test_each_model_is_judged_by_its_own_layers():
    models, batch = [llama(), llama()], batch_of(random_rows([(5, [3])]))  # one row is the same, packed or padded
    for layer in models[1].model.layers:
        layer.self_attn.forward = lambda hidden_states, **kwargs: (torch.zeros_like(hidden_states), None)
    give_packing(models, "auto")
    for model in models:
        score_tokens(model, batch)
    assert [packing_of(model).active for model in models] == [True, False]


def test_plain_forward_and_generation_stay_as_they_were():
    plain = llama().eval()
    packed = copy.deepcopy(plain)
    give_packing([packed], "on")
    batch = batch_of(random_rows([(9, [3, 14])]))
    score_tokens(packed, batch)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert packed(**inputs).logits.equal(plain(**inputs).logits)
        prompt = batch["input_ids"][:1, :9]
        texts = [m.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (plain, packed)]
    assert texts[0].equal(texts[1])


def test_saved_model_knows_nothing_of_it(tmp_path):
    model = llama()
    give_packing([model], "on")
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa" and packing_of(again) is None


def test_model_of_another_ones_config_is_prepared_too():
    first = llama()
    give_packing([first], "on")
    second, batch = fused(LlamaForCausalLM(first.config).double()), batch_of(random_rows([(9, [3, 14])]))
    padded_BT = score_tokens(second, batch).logps_BT
    give_packing([second, second], "on")
    torch.testing.assert_close(score_tokens(second, batch).logps_BT, padded_BT, rtol=0, atol=2e-6)


def test_dropout_does_not_decide_the_comparison():
    model = llama(attention_dropout=0.5).train()
    give_packing([model], "on")
    score_tokens(model, batch_of(random_rows([(9, [3, 14])])))
    assert packing_of(model).active and all(m.training for m in model.modules())


# -- architectures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_is_packed_exactly_or_falls_back(name, said):
    model = fused(build(name))
    batch = batch_of(random_rows([(30, [9, 21]), (12, [9, 21])], seed=1))
    with torch.no_grad():
        padded_BT = score_tokens(model, batch).logps_BT
        give_packing([model], "auto")
        packed_BT = score_tokens(model, batch).logps_BT
    torch.testing.assert_close(packed_BT, padded_BT, rtol=0, atol=1e-5)
    assert packing_of(model).active == (name not in NOT_PACKED)
    if name in NOT_PACKED:
        assert NOT_PACKED[name] in said() and type(model).__name__ in said()


def test_on_is_refused_for_a_model_that_cannot():
    with pytest.raises(ValueError, match=r"packed='on'.*FalconForCausalLM.*AttentionInterface"):
        give_packing([build("falcon")], "on")
    model = fused(build("stablelm"))
    give_packing([model], "on")
    with pytest.raises(ValueError, match=r"packed='on'.*StableLmForCausalLM.*4 of its 4 layers"):
        score_tokens(model, batch_of(random_rows([(9, [3, 14])])))


def test_wrong_attention_is_noticed(monkeypatch, said):
    from halos_trl.forward import attention

    right = attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", lambda *a, **k: right(*a, **k).roll(1, dims=1))
    model, batch = llama(torch.float32), batch_of(random_rows([(9, [3, 14])]))
    with torch.no_grad():
        padded_BT = score_tokens(model, batch).logps_BT
        give_packing([model], "auto")
        assert score_tokens(model, batch).logps_BT.equal(padded_BT)
    assert "differ by" in said()
