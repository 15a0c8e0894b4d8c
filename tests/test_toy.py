"""The embedded task: prompts and answers, feedback that agrees with the verifier, and reproducibility by seed."""

import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos_trl import toy
from halos_trl.toy.cache import cached
from halos_trl.toy.model import Recipe, demonstrations
from halos_trl.toy.task import careless_answer, split_of

SHORT = Recipe(steps=4, batch_size=16, warmup_steps=2)


@pytest.fixture(scope="module")
def tokenizer():
    return toy.build_tokenizer()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def careless_samples(monkeypatch):
    """Samples of the demonstrator, some of them wrong, without a trained model."""

    def sample(model, tokenizer, prompts, seed, temperature):
        rng = random.Random(seed)
        return [careless_answer(prompt, rng) for prompt in prompts]

    monkeypatch.setattr(toy.feedback, "sample", sample)


# The task


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("abfmt", True),
        ("  abfmt\n", True),
        ("abfmt<|end|>", True),
        ("abfmt<|end|><|pad|><|pad|>", True),
        ("abfm", False),  # the habit
        ("bafmt", False),  # the slip
        ("abfmtt", False),
        ("ab fmt", False),
        ("ABFMT", False),
        ("", False),
    ],
)
def test_verify(completion, right):
    assert toy.answer("Sort fatbm") == "abfmt"
    assert toy.verify("Sort fatbm", completion) is right
    assert toy.reward([{"role": "user", "content": "Sort fatbm"}], completion) == float(right)


@pytest.mark.parametrize("prompt", ["", "fatbm", "Reverse fatbm", "Sort f4tbm"])
def test_a_foreign_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="Sort fatbm"):
        toy.answer(prompt)


def test_no_answer_occurs_in_two_splits():
    answers = {
        split: {toy.answer(prompt) for seed in (0, 1) for prompt in toy.make_prompts(3000, seed, split)}
        for split in ("sft", "feedback", "test")
    }
    assert not answers["sft"] & answers["feedback"]
    assert not answers["sft"] & answers["test"]
    assert not answers["feedback"] & answers["test"]


def test_prompts_differ_repeat_with_the_seed_and_continue():
    prompts = toy.make_prompts(2000, 0, "test")
    assert len(set(prompts)) == 2000
    assert toy.make_prompts(500, 0, "test") == prompts[:500]
    assert toy.make_prompts(500, 1, "test") != prompts[:500]
    with pytest.raises(ValueError, match="split must be one of"):
        toy.make_prompts(1, 0, "train")


def test_the_demonstrator_is_as_careless_as_documented():
    rng = random.Random(0)
    prompts = toy.make_prompts(6000, 0, "sft")
    right = sum(toy.verify(prompt, careless_answer(prompt, rng)) for prompt in prompts) / len(prompts)
    in_order = 1 - toy.SWAP_NEIGHBOURS
    expected = (in_order + 2 * in_order * (1 - toy.LEAVE_OUT_LAST)) / 3  # four, five or six letters, equally often
    assert right == pytest.approx(expected, abs=0.02)  # three standard errors


# Tokenizer and models


@pytest.mark.parametrize(
    "text",
    [
        "Sort fatbm",
        "",
        " ",
        "\n\t  x ",
        "naïve café",
        "日本語",
        "🙂👩‍👩‍👧 a",
        "\x00\x7f\ufeff",
        "don't  stop .",
        "e\u0301",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < len(tokenizer) for i in ids)


def test_a_task_text_is_short(tokenizer):
    assert len(tokenizer("Sort fatbm")["input_ids"]) == 7  # the instruction, a blank, five letters


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be careful."}]])
@pytest.mark.parametrize("completion", ["abfmt", " abfmt", "Sort", "", "é"])
def test_the_prompt_is_a_prefix(tokenizer, system, completion):
    prompt = [*system, {"role": "user", "content": "Sort fatbm"}]
    answered = [*prompt, {"role": "assistant", "content": completion}]
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer.apply_chat_template(answered, return_dict=True)["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids
    assert tokenizer.decode(ids[len(prompt_ids) :]) == completion + tokenizer.eos_token


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="got tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_labels_are_the_completion_tokens(tokenizer):
    batch = demonstrations(["Sort fatbm", "Sort dcba"], ["abfm", "abcd"], tokenizer)
    kept = [tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert kept == ["abfm<|end|>", "abcd<|end|>"]


def test_sizes_and_seeds_of_the_models(tokenizer):
    state = torch.get_rng_state()
    model, tiny = toy.build_model(tokenizer), toy.tiny_model(tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert 0.8e6 < model.num_parameters() < 1.2e6
    assert tiny.num_parameters() < 50_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}

    def embedding(seed):
        return toy.tiny_model(tokenizer, seed).get_input_embeddings().weight

    assert torch.equal(embedding(3), embedding(3))
    assert not torch.equal(embedding(3), embedding(4))


# Training, cache and accuracy


def test_the_cached_directory_loads_with_the_auto_classes(cache, tokenizer):
    path = toy.load_model_path(0, cache, progress=False, _recipe=SHORT)
    model, loaded = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": "Sort fatbm"}, {"role": "assistant", "content": "é 🙂"}]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert (loaded.pad_token, loaded.eos_token, loaded.bos_token) == ("<|pad|>", "<|end|>", None)
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (loaded.pad_token_id, loaded.eos_token_id)
        assert config.bos_token_id is None
    assert model.dtype == torch.float32


def test_training_is_deterministic_and_cached(cache, tmp_path, monkeypatch):
    first = toy.load_model_path(0, cache, progress=False, _recipe=SHORT)
    again = toy.load_model_path(0, tmp_path, progress=False, _recipe=SHORT)
    other = toy.load_model_path(1, cache, progress=False, _recipe=SHORT)

    def weights(path):
        with open(f"{path}/model.safetensors", "rb") as file:
            return file.read()

    assert first != again
    assert weights(first) == weights(again)
    assert weights(first) != weights(other)
    monkeypatch.delattr(toy.model, "train_supervised")  # from here on the cache has to answer
    assert toy.load_model_path(0, cache, progress=False, _recipe=SHORT) == first


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\x40\0\0\0\0\0\0\0{"),
        ("config.json", b"null"),
        ("tokenizer.json", b'{"version": '),
        ("chat_template.jinja", None),
    ],
)
def test_a_damaged_model_is_made_again(cache, tmp_path, caplog, monkeypatch, file, damage):
    folder = tmp_path / "copy"
    shutil.copytree(Path(toy.load_model_path(0, cache, progress=False, _recipe=SHORT)).parent, folder)
    monkeypatch.setattr(toy.model, "train_supervised", lambda *args: None)
    path = Path(toy.load_model_path(0, folder, progress=False, _recipe=SHORT))
    (path / file).unlink() if damage is None else (path / file).write_bytes(damage)
    again = toy.load_model_path(0, folder, progress=False, _recipe=SHORT)
    assert again == str(path)
    AutoModelForCausalLM.from_pretrained(path)
    assert AutoTokenizer.from_pretrained(path).chat_template
    assert f"damaged ({file}" in caplog.text and f"{path} is created again" in caplog.text


def test_damaged_rows_are_made_again(tmp_path, caplog):
    build = lambda directory: (directory / "rows.json").write_text('{"train": [], "test": []}')  # noqa: E731
    path = cached("x", tmp_path, build, ("rows.json",), seed=0)
    for damage in ("", "[]", '{"train": '):
        (path / "rows.json").write_text(damage)
        assert cached("x", tmp_path, build, ("rows.json",), seed=0) == path
        assert (path / "rows.json").read_text() == '{"train": [], "test": []}'
    assert caplog.text.count("is created again") == 3


def test_the_cache_directory_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HALOS_TRL_CACHE", str(tmp_path / "there"))
    path = cached("x", None, lambda directory: (directory / "file").touch(), seed=0)
    assert path.parent == tmp_path / "there"
    assert [file.name for file in path.iterdir()] == ["file"]


def test_of_two_at_once_one_builds(tmp_path):
    builds, paths = [], []

    def build(directory):
        builds.append(directory)
        time.sleep(0.2)

    threads = [threading.Thread(target=lambda: paths.append(cached("x", tmp_path, build))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len(set(paths)) == 1


def test_an_interrupted_build_leaves_nothing_to_read(tmp_path):
    def interrupted(directory):
        (directory / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("x", tmp_path, interrupted)
    path = cached("x", tmp_path, lambda directory: (directory / "whole").touch())
    assert [file.name for file in path.iterdir()] == ["whole"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_accuracy_leaves_mode_and_random_state_alone(tokenizer, temperature):
    model = toy.tiny_model(tokenizer).train()
    state = torch.get_rng_state()
    first = toy.accuracy(model, tokenizer, n=20, temperature=temperature)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert toy.accuracy(model, tokenizer, n=20, temperature=temperature) == first


def test_samples_do_not_depend_on_padding(tokenizer):
    model = toy.tiny_model(tokenizer)
    prompts = ["Sort fatbmc", "Sort dcba"]
    together = toy.feedback.sample(model, tokenizer, prompts, 0, 0.0)
    assert together == [toy.feedback.sample(model, tokenizer, [prompt], 0, 0.0)[0] for prompt in prompts]


def test_accuracy_counts_right_answers(tokenizer, careless_samples, monkeypatch):
    assert 0.3 < toy.accuracy(None, tokenizer, n=300) < 0.6
    monkeypatch.setattr(toy.feedback, "sample", lambda model, tokenizer, prompts, *_: list(map(toy.answer, prompts)))
    assert toy.accuracy(None, tokenizer, n=30) == 1.0


def test_accuracy_works_with_an_adapter(tokenizer):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(toy.tiny_model(tokenizer), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert 0.0 <= toy.accuracy(model, tokenizer, n=8) <= 1.0


# Feedback


def content(messages, role):
    (message,) = messages
    assert message["role"] == role
    return message["content"]


def test_labels_agree_with_the_verifier(cache, careless_samples):
    data = toy.load_feedback_data("unpaired", 0, 64, cache, progress=False, _recipe=SHORT)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 64, "test": 8}
    assert data["train"].column_names == ["prompt", "completion", "label"]
    for row in data["train"]:
        assert row["label"] is toy.verify(content(row["prompt"], "user"), content(row["completion"], "assistant"))
    assert set(data["train"]["label"]) == {True, False}


def test_of_a_pair_one_is_right_and_one_wrong(cache, careless_samples):
    data = toy.load_feedback_data("paired", 0, 64, cache, progress=False, _recipe=SHORT)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 64, "test": 8}
    assert data["train"].column_names == ["prompt", "chosen", "rejected"]
    for row in data["train"]:
        prompt = content(row["prompt"], "user")
        assert toy.verify(prompt, content(row["chosen"], "assistant"))
        assert not toy.verify(prompt, content(row["rejected"], "assistant"))


def test_groups_are_complete_and_scored(cache, careless_samples):
    data = toy.load_feedback_data("scored", 0, 60, cache, progress=False, _recipe=SHORT)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 64, "test": 8}
    train = data["train"]
    assert set(train.column_names) == {"prompt", "completion", "score", "prompt_id"}
    assert train["prompt_id"] == [i for i in range(8) for _ in range(8)]
    prompt_of = {}
    for row in train:
        prompt = content(row["prompt"], "user")
        assert prompt_of.setdefault(row["prompt_id"], prompt) == prompt
        assert row["score"] == float(toy.verify(prompt, content(row["completion"], "assistant")))
    assert len(set(prompt_of.values())) == 8


@pytest.mark.parametrize("kind", ["unpaired", "paired", "scored"])
def test_test_prompts_are_held_out(cache, careless_samples, kind):
    data = toy.load_feedback_data(kind, 0, 64, cache, progress=False, _recipe=SHORT)
    for split, source in (("train", "feedback"), ("test", "test")):
        assert {split_of(content(prompt, "user")) for prompt in data[split]["prompt"]} == {source}


@pytest.mark.parametrize("kind", ["unpaired", "paired", "scored"])
def test_prompts_with_an_empty_sample_are_left_out(tmp_path, monkeypatch, kind):
    per_prompt = toy.SAMPLES_PER_PROMPT[kind]

    def sample(model, tokenizer, prompts, seed, temperature):
        samples = [toy.answer(prompt) if i % 2 else "wrong" for i, prompt in enumerate(prompts)]
        samples[0] = ""
        return samples

    monkeypatch.setattr(toy.feedback, "sample", sample)
    data = toy.load_feedback_data(kind, 0, 16, tmp_path, progress=False, _recipe=SHORT)["train"]
    first, second = toy.make_prompts(2, 0, "feedback")
    assert content(data[0]["prompt"], "user") == second
    assert first not in {content(prompt, "user") for prompt in data["prompt"]}
    assert len(data) == 16
    if kind == "scored":
        assert data["prompt_id"] == [i for i in (1, 2) for _ in range(per_prompt)]


def test_feedback_of_a_model_repeats(cache, tmp_path):
    first = toy.load_feedback_data("unpaired", 5, 16, cache, progress=False, _recipe=SHORT)
    again = toy.load_feedback_data("unpaired", 5, 16, tmp_path, progress=False, _recipe=SHORT)
    assert first["train"].to_list() == again["train"].to_list()
    assert (
        first["train"].to_list() == toy.load_feedback_data("unpaired", 5, 16, cache, _recipe=SHORT)["train"].to_list()
    )


def test_impossible_requests_are_refused(cache, monkeypatch):
    with pytest.raises(ValueError, match="kind must be one of"):
        toy.load_feedback_data("ranked", cache_dir=cache)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        toy.load_feedback_data("unpaired", n=0, cache_dir=cache)
    monkeypatch.setattr(toy.feedback, "sample", lambda model, tokenizer, prompts, *rest: ["wrong"] * len(prompts))
    with pytest.raises(RuntimeError, match="gave 0 paired rows, but 8 were requested"):
        toy.load_feedback_data("paired", 0, 8, cache, progress=False, _recipe=SHORT)
