"""Stored reference log-probs of rows with images: the run with a live reference, the cache, what is refused."""

import copy

import datasets
import pytest
import torch
from conftest import assistant, paired_rows, perturbed, unpaired_rows, user, weights
from PIL import Image

from halos_trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

STORED = {"precompute_ref_log_probs": True}
METHODS = {"dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig)}


def colour(i):
    return Image.new("RGB", (8, 8), (30 * i, 255 - 30 * i, 90))


def image_rows(method, n=8, without=()):
    """Rows with one image each, none in the rows `without`. KTO's rows answer in two ways by turns."""
    rows = (unpaired_rows if method == "kto" else paired_rows)(n).to_list()
    for i, row in enumerate(rows):
        row["images"] = [] if i in without else [colour(i)]
        if method == "kto":
            row |= {"completion": assistant("abba" if i % 2 else "b"), "label": i % 3 > 0}
    return with_images(rows)


def with_images(rows):
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


@pytest.fixture
def build(vision, make_config):
    base, processor = vision

    def run(method, data=None, *, processor=processor, ref=True, eval_dataset=None, **settings):
        trainer_class, config_class = METHODS[method]
        settings = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential", "beta": 0.5} | settings
        return trainer_class(
            model=copy.deepcopy(base),
            ref_model=perturbed(base, 0.1) if ref else None,
            args=make_config(config_class, **settings),
            train_dataset=image_rows(method) if data is None else data,
            eval_dataset=eval_dataset,
            processing_class=copy.deepcopy(processor),
        )

    return run


@pytest.fixture
def passes(monkeypatch):
    """The number of batches of each reference pass over a dataset."""
    made = []
    for trainer_class in (DPOTrainer, KTOTrainer):
        compute = trainer_class.compute_ref_log_probs

        def counted(self, model, inputs, compute=compute):
            made.append(len(inputs["input_ids"]))
            return compute(self, model, inputs)

        monkeypatch.setattr(trainer_class, "compute_ref_log_probs", counted)
    return made


def losses(trainer):
    return [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]


def assert_same_run(stored, live):
    assert stored.args.precompute_ref_log_probs
    for trainer in (stored, live):
        trainer.train()
        trainer.evaluate()
    assert losses(stored) == pytest.approx(losses(live), rel=0, abs=1e-6)
    assert len(losses(stored)) == 4
    torch.testing.assert_close(weights(stored.model), weights(live.model), rtol=0, atol=1e-6)


# -- the run of a live reference -----------------------------------------------------------------------------------

SHUFFLED = {"train_sampling_strategy": "random", "precompute_ref_batch_size": 3}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dpo", SHUFFLED | {"gradient_accumulation_steps": 2}),
        ("dpo", {"loss_type": ["sigmoid", "hinge"], "ld_alpha": 0.3, "max_length": 24}),
        ("kto", {"per_device_train_batch_size": 8}),
        ("kto", SHUFFLED | {"loss_type": "apo_zero_unpaired"}),
    ],
    ids=str,
)
def test_stored_and_live_references_train_alike(build, method, settings):
    """KTO's partner of a row answers like the row before it and the row after it, so both runs have the same KL."""
    evaluated = image_rows(method, 8).select([6, 1, 4, 3])
    stored, live = (
        build(method, eval_dataset=evaluated, precompute_ref_log_probs=stores, **settings) for stores in (True, False)
    )
    assert_same_run(stored, live)
    if settings == {"per_device_train_batch_size": 8}:
        assert all(entry["kl"] > 0 for entry in stored.state.log_history if "kl" in entry)


def test_shuffled_partners_keep_their_reference(build):
    """Batches of KTO with the same partners, scored by the reference model itself."""
    evaluated = image_rows("kto", 4)
    stored, live = (build("kto", eval_dataset=evaluated, **STORED, **SHUFFLED) for _ in range(2))
    live.reference = live.live_reference(live.model)
    assert_same_run(stored, live)


def test_rows_without_an_image(build):
    data = image_rows("dpo", without=(0, 1, 2, 3, 6))
    runs = (build("dpo", data, eval_dataset=data, precompute_ref_log_probs=stores) for stores in (True, False))
    assert_same_run(*runs)


def test_no_second_model_is_held(build):
    trainer = build("kto", ref=False, **STORED)
    assert trainer.ref_model is None
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.5, abs=1e-6)


def test_images_of_selected_rows_are_not_copied(build, tmp_path):
    image_rows("dpo").save_to_disk(tmp_path / "rows")
    data = datasets.load_from_disk(tmp_path / "rows").select([5, 0, 7, 2])
    stored = build("dpo", data, **STORED).train_dataset
    assert [row["images"][0].getpixel((0, 0)) for row in stored] == [colour(i).getpixel((0, 0)) for i in (5, 0, 7, 2)]
    again = build("dpo", image_rows("dpo"), **STORED).train_dataset
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        got, whole = (torch.tensor(list(rows[column])) for rows in (stored, again))
        torch.testing.assert_close(got, whole[[5, 0, 7, 2]], rtol=0, atol=1e-5)
    assert len(list((tmp_path / "rows").glob("cache-*"))) == 1, "the log-probs"


# -- the cache -----------------------------------------------------------------------------------------------------


def test_only_what_decides_the_numbers_changes_the_cache(build, vision, passes, tmp_path):
    def rows(method, folder="rows", n=8):
        if not (tmp_path / folder).exists():
            image_rows(method, n).save_to_disk(tmp_path / folder)
        return datasets.load_from_disk(tmp_path / folder)

    def computes(**changed):
        passes.clear()
        build("kto", rows("kto"), eval_dataset=rows("kto", "eval", 4), **STORED, **changed)
        return len(passes)

    assert computes() == 3
    assert computes(learning_rate=0.01) == 0
    processor = copy.deepcopy(vision[1])
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert computes(processor=processor) == 3
    assert computes(processor=processor) == 0


def test_a_changed_image_file_is_computed_anew(build, passes, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(8)]
    for i, file in enumerate(files):
        colour(i).save(file)
    rows = [row | {"images": [str(file)]} for row, file in zip(paired_rows(8).to_list(), files, strict=True)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")

    def stored():
        passes.clear()
        data = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
        data = data.cast_column("images", datasets.List(datasets.Image()))
        trainer = build("dpo", data, **STORED)
        return torch.tensor(list(trainer.train_dataset["ref_chosen_logps"]))[:, 0], len(passes)

    before, first = stored()
    _, second = stored()
    colour(20).save(files[3])
    after, third = stored()
    assert (first, second, third) == (2, 0, 2)
    assert ((before - after).abs() > 1e-4).tolist() == [i == 3 for i in range(8)]


# -- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_datasets_that_come_later(build, method):
    data, live = image_rows(method, 4), build(method)
    stored = build(method, **STORED)
    for evaluated in (data, {"a": data}):
        got, expected = stored.evaluate(evaluated), live.evaluate(evaluated)
        assert [got[k] for k in got if k.endswith("_loss")] == pytest.approx(
            [expected[k] for k in expected if k.endswith("_loss")], abs=1e-6
        )
    without = build(method, ref=False, **STORED, max_steps=1)
    without.train()
    assert without.evaluate(without.train_dataset)["eval_loss"] > 0
    with pytest.raises(ValueError, match="Pass it as `eval_dataset` to the trainer"):
        without.evaluate(data)


# -- refusals ------------------------------------------------------------------------------------------------------


def test_tokens_that_have_changed_are_refused(build):
    trainer = build("dpo", **STORED)
    trainer.processing_class.tokenizer.add_tokens(["ab"])
    with pytest.raises(ValueError, match="has other tokens than when its reference log-probs were computed"):
        trainer.train()


def test_a_transform_is_refused(build):
    data = image_rows("dpo").with_transform(lambda rows: rows)
    with pytest.raises(ValueError, match="has a transform or format"):
        build("dpo", data, **STORED)


def test_rows_of_one_prompt_and_image_are_refused(build):
    rows = [{"prompt": user("what?"), "completion": assistant("a" * (i + 1)), "label": i > 1} for i in range(4)]
    build("kto", with_images([row | {"images": [colour(i)]} for i, row in enumerate(rows)]), **STORED)
    with pytest.raises(ValueError, match="All 4 rows of the train dataset have the same prompt and image"):
        build("kto", with_images([row | {"images": [colour(1)]} for row in rows]), **STORED)
