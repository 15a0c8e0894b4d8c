"""A TRL script with one import changed: every argument is accepted, every option gives TRL's run or is documented.

Three things are shown of every field of TRL's configs:
1. its default is TRL's (`OWN_DEFAULTS`: the exceptions),
2. set to another value, it still holds what TRL's config holds, also after a trainer was built from it,
3. if TRL's trainer or this package reads it, it has a probe: a setting that changes TRL's run, and ours in the same
   way (`UNSEEN`: fields that change nothing which can be seen here).
"""

import copy
import dataclasses
import inspect
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import trl
from accelerate.parallelism_config import ParallelismConfig
from conftest import paired_rows, perturbed, unpaired_rows, weights
from peft import LoraConfig, PeftModel, get_peft_model
from test_kto_trainer import TRLWithOurPartners

import halos_trl
from halos_trl import BradleyTerryConfig, BradleyTerryTrainer, DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, toy

ROOT = Path(__file__).parents[1]
METHODS_PAGE = (ROOT / "docs" / "methods.md").read_text()

# method -> our classes, TRL's classes, rows
CLASSES = {
    "dpo": (DPOTrainer, DPOConfig, trl.DPOTrainer, trl.DPOConfig, paired_rows),
    "kto": (KTOTrainer, KTOConfig, TRLWithOurPartners, trl.KTOConfig, unpaired_rows),
}
BOTH = pytest.mark.parametrize("method", CLASSES)
CONFIGS = pytest.mark.parametrize(
    ("ours", "theirs"),
    [(DPOConfig, trl.DPOConfig), (KTOConfig, trl.KTOConfig), (BradleyTerryConfig, trl.RewardConfig)],
)

# (our config, field): its default here, where that is not TRL's. Each has a row in docs/methods.md.
OWN_DEFAULTS = {("KTOConfig", "train_sampling_strategy"): "random"}

# -- values other than the default, for fields whose type does not suggest one -------------------------------------

VALUES = {
    "output_dir": "elsewhere", "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}, "optim": "sgd",
    "optim_args": "momentum=0.5", "optim_target_modules": "all-linear", "bf16": True, "tf32": False,
    "activation_checkpointing": False, "activation_checkpointing_kwargs": {"use_reentrant": True},
    "gradient_checkpointing_kwargs": {"use_reentrant": True}, "torch_compile_backend": "eager",
    "torch_compile_mode": "reduce-overhead", "liger_kernel_config": {"rope": False}, "neftune_noise_alpha": 5.0,
    "torch_empty_cache_steps": 3, "logging_strategy": "epoch", "include_num_input_tokens_seen": "all",
    "disable_tqdm": True, "report_to": "tensorboard", "run_name": "run", "project": "mine",
    "trackio_space_id": "me/it", "trackio_bucket_id": "me/bucket", "trackio_static_space_id": "me/static",
    "eval_strategy": "epoch", "eval_steps": 7, "eval_accumulation_steps": 2, "include_for_metrics": ["loss"],
    "max_steps": 3, "save_strategy": "epoch", "save_total_limit": 2, "hub_token": "token", "hub_private_repo": True,
    "hub_model_id": "me/model", "hub_strategy": "end", "hub_revision": "branch", "metric_for_best_model": "loss",
    "greater_is_better": True, "data_seed": 3, "use_cpu": False, "accelerator_config": {"split_batches": True},
    "parallelism_config": ParallelismConfig(), "dataloader_prefetch_factor": 2, "label_names": ["label"],
    "length_column_name": "size", "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 5,
    "ddp_broadcast_buffers": True, "ddp_static_graph": True, "fsdp": "full_shard",
    "fsdp_config": {"min_num_params": 5}, "debug": "underflow_overflow", "resume_from_checkpoint": "checkpoint-1",
    "model_init_kwargs": {"dtype": "bfloat16"}, "router_aux_loss_coef": 0.5, "dataset_num_proc": 1,
    "pad_to_multiple_of": 16, "precompute_ref_batch_size": 3, "loss_type": "hinge", "loss_weights": [2.0],
    "ld_alpha": 0.5, "pad_token": "<|end|>", "f_divergence_type": "js_divergence",
    "chat_template_path": "template.jinja", "eos_token": "<|end|>", "center_rewards_coefficient": 0.1,
}  # fmt: skip
# What has to be set together with a field.
WITH = {
    "dataloader_pin_memory": {"use_cpu": False}, "dataloader_prefetch_factor": {"dataloader_num_workers": 2},
    "load_best_model_at_end": {"eval_strategy": "steps", "save_strategy": "steps"},
}  # fmt: skip
# No config with one of these can be made here.
NO_CONFIG = {"ddp_backend": "needs a process group", "deepspeed": "needs its library"}
# No trainer is built here with one of these fields of transformers.TrainingArguments.
NO_TRAINER = {
    "needs a GPU or several processes": {"use_cpu", "fsdp", "parallelism_config"},
    "excludes another of the fields": {"fp16", "fp16_full_eval", "load_best_model_at_end"},
    "needs a compiler": {"torch_compile", "torch_compile_backend", "torch_compile_mode"},
    "needs the network, or a tracker's library": {"push_to_hub", "report_to"},
    "is set for the whole process": {"full_determinism", "log_level"},
}

# -- probes --------------------------------------------------------------------------------------------------------

# (the field with its value, what is set in TRL's run without it too). `model` chooses the policy.
WITHOUT_KL = {"loss_type": "apo_zero_unpaired"}  # where TRL's pairing of a row with its KL partner is in the way
SHUFFLED = {"train_sampling_strategy": "random"}
IN_ANY_ORDER = [
    ({"train_sampling_strategy": "random"}, {}),
    ({"seed": 7}, SHUFFLED),
    ({"data_seed": 3}, SHUFFLED),
    ({"accelerator_config": {"use_seedable_sampler": False}}, SHUFFLED),
    ({"max_length": 14}, {}),
    ({"precompute_ref_log_probs": True}, {}),
    ({"disable_dropout": False}, {"model": "dropout"}),
]
PROBES = {
    "both": [
        ({"beta": 0.3}, {}),
        ({"pad_to_multiple_of": 16}, {}),
        ({"model_init_kwargs": {"rms_norm_eps": 0.1}}, {"model": "path"}),
        ({"router_aux_loss_coef": 0.5}, {"model": "experts"}),
        ({"gradient_checkpointing": True}, {}),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {"gradient_checkpointing": True}),
        ({"sync_ref_model": True}, {"ref_model_sync_steps": 1}),
        ({"ref_model_sync_steps": 1}, {"sync_ref_model": True}),
        ({"ref_model_mixup_alpha": 0.7}, {"sync_ref_model": True, "ref_model_sync_steps": 1}),
        ({"per_device_train_batch_size": 4}, {}),
        ({"num_train_epochs": 2}, {"max_steps": -1}),
        ({"dataloader_drop_last": True}, {"max_steps": -1, "per_device_train_batch_size": 6}),
        ({"learning_rate": 1e-2}, {}),
        ({"lr_scheduler_type": "cosine"}, {}),
        ({"warmup_steps": 2}, {"lr_scheduler_type": "linear"}),
        ({"max_grad_norm": 0.1}, {}),
        ({"weight_decay": 0.1}, {}),
        ({"optim": "adamw_torch"}, {"learning_rate": 1e-4, "adam_epsilon": 1e-4}),
        ({"neftune_noise_alpha": 5.0}, {}),
        ({"per_device_eval_batch_size": 4}, {}),
        ({"eval_strategy": "steps"}, {}),
        ({"eval_steps": 2}, {"eval_strategy": "steps"}),
        ({"save_strategy": "steps"}, {"save_steps": 1}),
        ({"save_steps": 1}, {"save_strategy": "steps"}),
    ],
    "dpo": [
        *IN_ANY_ORDER,
        ({"loss_type": "hinge"}, {}),
        ({"bf16": True}, {"loss_type": "hinge"}),  # for our own loss TRL sums log-probs in less than float32
        ({"loss_weights": [2.0]}, {}),
        ({"label_smoothing": 0.2}, {"loss_type": "robust"}),
        ({"ld_alpha": 0.5}, {}),
        ({"f_divergence_type": "js_divergence"}, {}),
        ({"f_alpha_divergence_coef": 0.7}, {"f_divergence_type": "alpha_divergence"}),
        ({"use_weighting": True}, {}),
        ({"discopop_tau": 0.1}, {"loss_type": "discopop"}),
        ({"truncation_mode": "keep_end"}, {"max_length": 14}),
        ({"pad_token": "<|end|>"}, {}),
    ],  # each loss type: tests/test_paired_trainers.py
    "kto": [
        *((option, given | WITHOUT_KL) for option, given in IN_ANY_ORDER),
        (WITHOUT_KL, {}),
        ({"desirable_weight": 1.5}, {}),
        ({"undesirable_weight": 0.5}, {}),
        ({"bf16": True}, {}),
    ],
}  # fmt: skip
# Fields that a trainer reads and that change nothing which can be seen here: value, why.
UNSEEN = {
    "trust_remote_code": (True, "the models here need no code of their own"),
    "dataset_num_proc": (1, "as many rows with any number of processes"),
    "dataloader_num_workers": (1, "the same batches with any number of processes"),
    "ddp_find_unused_parameters": (True, "one process"),
    "remove_unused_columns": (False, "the collator takes columns by name"),
    "liger_kernel_config": ({"rope": False}, "read with `use_liger_kernel` only"),
    "padding_free": (True, "TRL warns and goes on without it"),
}
# Fields that a trainer reads and that need a test, or a machine, of their own.
ELSEWHERE = {
    "precompute_ref_batch_size": "tests/test_drop_in.py::test_batch_size_of_precomputing",
    "output_dir": "tests/test_push_to_hub.py::test_received_files_equal_the_local_ones",
    "hub_model_id": "tests/test_push_to_hub.py::test_every_request_is_served_and_every_repository_is_expected",
    "gradient_accumulation_steps": "tests/test_drop_in.py::"
    "test_accumulated_micro_batches_give_trls_run_without_a_kl_term",
    "activation_offloading": "moves activations from a GPU to the CPU",
    "dataloader_pin_memory": "pins memory for a GPU",
    "use_liger_kernel": "kernels for a GPU",
    "max_steps": "tests/test_loops.py::test_settings_without_a_step_are_refused",
    "torch_compile": "tests/test_packed_training.py::test_compiled_models_are_given_padded_rows",
}


OURS, TRLS = 0, 1
# Rounding in bfloat16, noise and the load of a router depend on which rows the model is given.
ROWS_MATTER = {"bf16", "neftune_noise_alpha", "router_aux_loss_coef"}


@pytest.fixture
def run_of(model, tokenizer, make_config, tmp_path):
    """One run of this package's trainer or TRL's, with the same rows, initial weights and reference."""

    def run(
        method,
        side,
        *,
        train=True,
        policy=None,
        ref="near",
        data=None,
        tokenizer=tokenizer,
        arguments=None,
        **settings,
    ):
        trainer_class, config_class = CLASSES[method][2 * side : 2 * side + 2]
        folder = tmp_path / ("ours", "trls")[side]
        shutil.rmtree(folder, ignore_errors=True)
        if side == OURS and (ROWS_MATTER & settings.keys() or settings.get("disable_dropout") is False):
            settings["packed"] = "off"
        settings = {"train_sampling_strategy": "sequential", "max_steps": 2, "output_dir": str(folder)} | settings
        trainer = trainer_class(
            model=copy.deepcopy(model) if policy is None else policy(),
            ref_model=perturbed(model) if ref == "near" else ref,
            args=make_config(config_class, **settings),
            train_dataset=CLASSES[method][4](16) if data is None else data,
            processing_class=tokenizer,
            **(arguments or {}),
        )
        if train:
            trainer.train()
        return trainer

    return run


@pytest.fixture
def pair_of_runs(run_of):
    def run(method, **settings):
        return [run_of(method, side, **settings) for side in (OURS, TRLS)]

    return run


FILES_OF_OURS = {"run_summary.json", "data_summary.json", "train_log.jsonl"}


def seen(trainer):
    """The observable results of a finished run."""
    entries = [e for e in trainer.state.log_history if "loss" in e or "eval_loss" in e]
    loaders = [trainer.get_train_dataloader()]
    if isinstance(trainer.eval_dataset, datasets.Dataset):
        loaders.append(trainer.get_eval_dataloader())
    folder = Path(trainer.args.output_dir)
    return {
        "weights": weights(trainer.model).float(),
        "log": [{k: v for k, v in e.items() if not re.search("runtime|per_second", k)} for e in entries],
        "first batches": [next(iter(loader))["input_ids"].tolist() for loader in loaders],
        "precomputed": [c for c in trainer.train_dataset.column_names if c.startswith("ref_")],
        "files": sorted({str(path.relative_to(folder)) for path in folder.rglob("*")} - FILES_OF_OURS),
        "checkpointing": {
            repr(m._gradient_checkpointing_func)
            for m in trainer.model.modules()
            if getattr(m, "gradient_checkpointing", False)
        },
    }


def assert_same(mine, trls, *, low_precision=False):
    torch.testing.assert_close(mine["weights"], trls["weights"], rtol=0, atol=1e-4 if low_precision else 1e-6)
    assert len(mine["log"]) == len(trls["log"]) > 0
    tolerance = {"rel": 1e-2, "abs": 2e-2} if low_precision else {"rel": 1e-5, "abs": 5e-6}
    for my_entry, trls_entry in zip(mine["log"], trls["log"], strict=True):
        assert set(my_entry) == set(trls_entry)
        for name, value in trls_entry.items():
            assert my_entry[name] == pytest.approx(value, **tolerance), name
    for name in mine.keys() - {"weights", "log"}:
        assert mine[name] == trls[name], name


def assert_same_run(ours, theirs, *, low_precision=False):
    assert_same(seen(ours), seen(theirs), low_precision=low_precision)
    assert_same_settings(ours.args, theirs.args, but={"output_dir"})


# -- arguments and fields ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(DPOTrainer, trl.DPOTrainer), (KTOTrainer, trl.KTOTrainer), (BradleyTerryTrainer, trl.RewardTrainer)],
)
def test_every_argument_of_trls_class_is_accepted(ours, theirs):
    mine, trls = inspect.signature(ours.__init__).parameters, inspect.signature(theirs.__init__).parameters
    assert list(trls) == list(mine), "the same names in the same order"


def documented(heading):
    """Names in backticks at the start of the rows of the table below a heading of docs/methods.md."""
    section = METHODS_PAGE.split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    cells = re.findall(r"^\| (`[^|]*`) \|", section, flags=re.M)
    return {name for cell in cells for name in re.findall(r"`(\w+)", cell)}


def fields_of(config_class):
    return {f.name: f for f in dataclasses.fields(config_class)}


HOST_FIELDS = set(fields_of(transformers.TrainingArguments))


def held(config, but=()):
    """What a config holds in the fields of TRL's config."""
    theirs = next(c for c in type(config).__mro__ if c.__module__.startswith("trl."))
    return {name: getattr(config, name) for name in fields_of(theirs).keys() - set(but)}


def assert_same_settings(ours, theirs, but=()):
    mine, trls = held(ours, but), held(theirs, but)
    assert {k: v for k, v in mine.items() if v != trls[k]} == {k: v for k, v in trls.items() if v != mine[k]} == {}


@CONFIGS
def test_every_default_is_trls(ours, theirs):
    def default(f):
        return f.default if f.default is not dataclasses.MISSING else f.default_factory and f.default_factory()

    own = {name: value for (config, name), value in OWN_DEFAULTS.items() if config == ours.__name__}
    assert own.keys() <= documented("Differences from TRL")
    mine, trls = ({name: default(f) for name, f in fields_of(c).items()} for c in (ours, theirs))
    assert {name: mine[name] for name, value in trls.items() if mine[name] != value} == own
    # What construction makes of them.
    mine, trls = (held(c("out", use_cpu=True)) for c in (ours, theirs))
    assert {name: mine[name] for name, value in trls.items() if mine[name] != value} == own


def common_settings(config_class):
    """Settings that are valid for both configs, with TRL's default where the defaults differ."""
    own = [name for (config, name) in OWN_DEFAULTS if config == config_class.__name__]
    return {"output_dir": "out", "use_cpu": True, "bf16": False} | {n: fields_of(config_class)[n].default for n in own}


def other_value(field):
    """A value other than the default."""
    if choices := field.metadata.get("choices"):
        return next(choice for choice in choices if choice != field.default)
    if field.name in VALUES:
        return VALUES[field.name]
    assert isinstance(field.default, bool | int | float), f"give `{field.name}` another value in VALUES"
    if isinstance(field.default, bool):
        return not field.default
    return field.default + 1 if isinstance(field.default, int) else field.default / 2 + 0.2  # shares stay shares


@CONFIGS
def test_every_field_holds_what_it_holds_in_trls_config(ours, theirs):
    for name, field in fields_of(theirs).items():
        if name not in NO_CONFIG:
            given, option = common_settings(theirs) | WITH.get(name, {}), {name: other_value(field)}
            trls = theirs(**(given | option))
            assert getattr(trls, name) != getattr(theirs(**given), name), f"{name}: its value in VALUES has no effect"
            assert_same_settings(ours(**(given | option)), trls)


@BOTH
def test_a_trainer_leaves_every_field_as_trls_trainer_leaves_it(run_of, method, tmp_path):
    """The fields of transformers.TrainingArguments, all at once; the trainer's own are in the probes below."""
    fields, rows = fields_of(CLASSES[method][3]), CLASSES[method][4]
    apart = NO_CONFIG.keys() | set().union(*NO_TRAINER.values())
    settings = {name: other_value(fields[name]) for name in HOST_FIELDS - apart}
    settings |= {"output_dir": str(tmp_path / "same"), "train_sampling_strategy": "sequential"}
    ours, theirs = (
        run_of(method, side, train=False, arguments={"eval_dataset": rows(8)}, **settings) for side in (OURS, TRLS)
    )
    assert_same_settings(ours.args, theirs.args)


def read_by_trainers(method):
    """Fields of the config that TRL's trainer or this package reads by name."""
    files = [Path(inspect.getsourcefile({"dpo": trl.DPOTrainer, "kto": trl.KTOTrainer}[method]))]
    package = Path(halos_trl.__file__).parent
    own = ("base", "paired", "dpo") if method == "dpo" else ("base", "unpaired", "kto")
    files += [
        *package.glob("_trl/*.py"),
        *package.glob("reference/*.py"),
        *(package / "trainers" / f"{name}.py" for name in own),
    ]
    text = "\n".join(path.read_text() for path in files)
    return set(re.findall(r"\bargs\.(\w+)", text)) | set(re.findall(r"getattr\((?:self\.)?args, \"(\w+)\"", text))


@BOTH
def test_every_field_that_a_trainer_reads_has_a_probe_or_a_reason(method):
    """The others are read by transformers.Trainer alone, which is the same code in both runs."""
    fields = set(fields_of(CLASSES[method][3]))
    probed = {name for option, _ in PROBES["both"] + PROBES[method] for name in option}
    reasons = UNSEEN.keys() | ELSEWHERE.keys()
    assert not probed & reasons
    read = (fields - HOST_FIELDS) | (read_by_trainers(method) & fields)
    assert read - probed - reasons == set(), "give it a probe"


@pytest.mark.parametrize("test", [where for where in ELSEWHERE.values() if "::" in where])
def test_named_test_exists(test):
    file, name = test.split("::")
    assert f"def {name}(" in (ROOT / file).read_text()


# -- options: TRL's run --------------------------------------------------------------------------------------------


def model_of_probe(kind, model, tokenizer, folder):
    """Arguments of a run for `model` of a probe."""
    if kind == "path":
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        return {"policy": lambda: str(folder / "model"), "ref": None, "tokenizer": None}
    if kind == "experts":
        model = mixture_of_experts(tokenizer)
    if kind == "dropout":
        model.model.norm = torch.nn.Sequential(model.model.norm, torch.nn.Dropout(0.2)).eval()
    return {"policy": lambda: copy.deepcopy(model), "ref": perturbed(model)}


@pytest.fixture
def probe(run_of, model, tokenizer, tmp_path):
    """What is seen of a run with these settings, and the arguments it ends with."""

    def run(method, side, settings):
        settings = {"beta": 0.5} | settings
        extra = model_of_probe(settings.pop("model", None), copy.deepcopy(model), tokenizer, tmp_path)
        arguments = {"eval_dataset": CLASSES[method][4](8, 1)}
        trainer = run_of(method, side, arguments=arguments, **extra, **settings)
        return seen(trainer), trainer.args

    return run


CASES = [
    pytest.param(method, option, given, id=f"{method}-{'-'.join(f'{k}={v}' for k, v in (option | given).items())}")
    for method in CLASSES
    for option, given in PROBES["both"] + PROBES[method]
]
TRLS_RUNS_WITHOUT = {}


@BOTH
def test_a_repeated_run_looks_the_same(probe, method):
    """Else the test below would take chance for the effect of an option."""
    settings = SHUFFLED | {"model": "dropout", "disable_dropout": False, "save_strategy": "steps"}
    settings |= WITHOUT_KL if method == "kto" else {}
    first, again = (probe(method, TRLS, settings)[0] for _ in range(2))
    assert_same(first, again)


@pytest.mark.parametrize(("method", "option", "given"), CASES)
def test_option_changes_trls_run_and_ours_alike(probe, method, option, given):
    if option.keys() - fields_of(CLASSES[method][3]).keys():
        pytest.skip("this version of TRL has no such field")
    case = f"{method} {given}"
    if case not in TRLS_RUNS_WITHOUT:
        TRLS_RUNS_WITHOUT[case], _ = probe(method, TRLS, given)
    (theirs, their_args), (ours, our_args) = (probe(method, side, given | option) for side in (TRLS, OURS))
    with pytest.raises(AssertionError):  # else a trainer that ignores the option would go unnoticed
        assert_same(theirs, TRLS_RUNS_WITHOUT[case])
    assert_same(ours, theirs)
    assert_same_settings(our_args, their_args, but={"output_dir"})


@BOTH
def test_fields_without_a_visible_effect_give_trls_run(probe, method):
    fields = fields_of(CLASSES[method][3])
    settings = {name: value for name, (value, _) in UNSEEN.items() if name in fields}
    settings["max_length"] = None  # no row is as long as the default
    (theirs, their_args), (ours, our_args) = (probe(method, side, settings) for side in (TRLS, OURS))
    assert_same(ours, theirs)
    assert_same_settings(our_args, their_args, but={"output_dir"})


@BOTH
def test_batch_size_of_precomputing(run_of, method, monkeypatch):
    """It changes no number, only how many rows the reference scores at once."""
    settings = {"precompute_ref_log_probs": True, "loss_type": {"dpo": "sigmoid", "kto": "apo_zero_unpaired"}[method]}
    rows, trainers = ([], []), [None, None]
    for side in (OURS, TRLS):
        trainer_class = CLASSES[method][2 * side]
        compute = trainer_class.compute_ref_log_probs

        def counting(self, model, inputs, side=side, compute=compute):
            rows[side].append(len(inputs["input_ids"]))
            return compute(self, model, inputs)

        with monkeypatch.context() as patch:
            patch.setattr(trainer_class, "compute_ref_log_probs", counting)
            for size in (None, 3):
                trainers[side] = run_of(method, side, precompute_ref_batch_size=size, **settings)
    assert rows[OURS] == rows[TRLS]
    assert len(rows[OURS]) == 2 + 6, "16 rows, 8 or 3 at once"
    assert_same_run(*trainers)


def test_accumulated_micro_batches_give_trls_run_without_a_kl_term(pair_of_runs):
    """With a KL term TRL's run depends on the split; ours does not (tests/test_kto_trainer.py)."""
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "beta": 0.5}
    for method, options in (("kto", {"loss_type": "apo_zero_unpaired"}), ("dpo", {})):
        ours, theirs = pair_of_runs(method, **split, **options)
        assert ours.state.epoch == theirs.state.epoch == 1.0, "two steps of 8 rows each"
        torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=0, atol=1e-6)
        for mine, trls in zip(ours.state.log_history, theirs.state.log_history, strict=True):
            assert mine.get("loss") == pytest.approx(trls.get("loss"), abs=1e-6)


# -- models --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@BOTH
def test_model_as_a_path(pair_of_runs, saved, method):
    ours, theirs = pair_of_runs(
        method, policy=lambda: saved, ref=None, tokenizer=None, beta=0.5, model_init_kwargs={"dtype": "float32"}
    )
    assert_same_run(ours, theirs)
    assert ours.ref_model is not None


@BOTH
def test_new_adapter(pair_of_runs, method):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ours, theirs = pair_of_runs(method, ref=None, arguments={"peft_config": config}, beta=0.5)
    assert isinstance(ours.model, PeftModel)
    assert ours.ref_model is None
    assert_same_run(ours, theirs)


@BOTH
def test_trained_adapter_is_its_own_reference(pair_of_runs, model, method):
    def policy():
        torch.manual_seed(5)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(copy.deepcopy(model), config)

    ours, theirs = pair_of_runs(method, policy=policy, ref=None, beta=0.5, learning_rate=1e-3)
    first = ours.state.log_history[0]
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-6), "the reference is the trained adapter"
    assert first["rewards/rejected"] == pytest.approx(0.0, abs=1e-6)
    assert ours.state.log_history[1]["rewards/chosen"] != pytest.approx(0.0, abs=1e-6)
    assert_same_run(ours, theirs)


@BOTH
@pytest.mark.slow
def test_quantized_base_with_an_adapter(pair_of_runs, saved, method):
    pytest.importorskip("bitsandbytes")
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    arguments = {
        "quantization_config": quantization,
        "peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    }
    ours, theirs = pair_of_runs(
        method, policy=lambda: saved, ref=None, arguments=arguments, tokenizer=None, beta=0.5, learning_rate=1e-2
    )
    assert ours.model.is_loaded_in_4bit
    assert_same_run(ours, theirs, low_precision=True)


def mixture_of_experts(tokenizer):
    config = transformers.MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
        router_aux_loss_coef=0.1, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.MixtralForCausalLM(config).float()


@BOTH
@pytest.mark.parametrize("coefficient", [None, 0.5, 0.0])
def test_mixture_of_experts(pair_of_runs, tokenizer, method, coefficient):
    base = mixture_of_experts(tokenizer)
    ours, theirs = pair_of_runs(
        method, policy=lambda: copy.deepcopy(base), ref=perturbed(base), beta=0.5, router_aux_loss_coef=coefficient
    )
    assert ("aux_loss" in ours.state.log_history[0]) == (coefficient != 0.0)
    assert_same_run(ours, theirs)


# -- data ----------------------------------------------------------------------------------------------------------


@BOTH
def test_several_evaluation_sets_and_compute_metrics(pair_of_runs, method):
    rows = CLASSES[method][4]
    sets = datasets.DatasetDict({"a": rows(8, 1), "b": rows(4, 2)})

    def shape(prediction):
        return {"width": prediction.predictions.shape[-1]}

    settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8, "beta": 0.5}
    ours, theirs = pair_of_runs(method, arguments={"eval_dataset": sets, "compute_metrics": shape}, **settings)
    evaluated = {
        k for e in ours.state.log_history for k in e if k.startswith("eval_") and k.endswith(("_loss", "_width"))
    }
    assert evaluated == {"eval_a_loss", "eval_b_loss", "eval_a_width", "eval_b_width"}
    for mine, trls in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        for name in trls.keys() & {"eval_a_loss", "eval_b_loss", "eval_a_width", "eval_b_width"}:
            assert mine[name] == pytest.approx(trls[name], rel=1e-5, abs=5e-6), name


TOOL = {
    "type": "function",
    "function": {"name": "sort", "description": "Sort", "parameters": {"type": "object", "properties": {}}},
}


@BOTH
def test_tools_and_template_arguments_of_a_row_reach_the_chat_template(pair_of_runs, tokenizer, method):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{%- if tools %}{{- '<|system|>' + tools[0]['function']['name'] }}{%- endif %}"
        "{%- if style %}{{- '<|system|>' + style }}{%- endif %}" + toy.CHAT_TEMPLATE
    )
    rows = CLASSES[method][4](8).to_list()
    rows = [row | {"tools": [TOOL], "chat_template_kwargs": {"style": "abc"[i % 3]}} for i, row in enumerate(rows)]
    ours, theirs = pair_of_runs(
        method, data=datasets.Dataset.from_list(rows), tokenizer=tokenizer, max_steps=1, beta=0.5
    )
    mine, trls = (list(t.train_dataset["prompt_ids"]) for t in (ours, theirs))
    assert mine == trls
    text = tokenizer.decode(mine[1])
    assert text.startswith("<|system|>sort<|system|>b<|user|>")
    assert_same_run(ours, theirs)


@BOTH
def test_implicit_prompt_and_standard_text(pair_of_runs, method):
    if method == "kto":
        rows = [
            {"prompt": "a b", "completion": " c d", "label": True},
            {"prompt": "d", "completion": " e", "label": False},
        ]
    else:
        rows = [{"chosen": "a b c", "rejected": "a b d e"}, {"chosen": "x y", "rejected": "x z"}]
    data = datasets.Dataset.from_list(rows * 4)
    assert_same_run(*pair_of_runs(method, data=data, beta=0.5, max_steps=1))


@BOTH
def test_images(pair_of_runs, vision, method):
    from PIL import Image

    base, processor = vision
    colours = [Image.new("RGB", (8, 8), (30 * i, 255 - 30 * i, 90)) for i in range(8)]
    rows = [row | {"images": [colours[i]]} for i, row in enumerate(CLASSES[method][4](8).to_list())]
    data = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    policy, near = lambda: copy.deepcopy(base), perturbed(base)
    classes = CLASSES["kto"]
    with pytest.MonkeyPatch.context() as patch:  # TRL's own class: its collator pairs vision data, not the dataset
        patch.setitem(CLASSES, "kto", (*classes[:2], trl.KTOTrainer, *classes[3:]))
        ours, theirs = pair_of_runs(
            method, data=data, policy=policy, ref=near, tokenizer=processor, beta=0.5, per_device_train_batch_size=4
        )
    assert "pixel_values" in next(iter(ours.get_train_dataloader()))
    assert_same_run(ours, theirs)
    if method == "kto":
        assert any(entry.get("kl", 0) > 0 for entry in ours.state.log_history)


# -- refusals ------------------------------------------------------------------------------------------------------


def refusals():
    """Rows of the table of refusals in docs/methods.md: config class, settings as one writes them in Python."""
    section = METHODS_PAGE.split("## Refused settings", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(\w+Config)` \| `([^`]+)` \|", section, flags=re.M)
    return [(config, alone) for config, settings in rows for alone in settings.split("; ")]


@pytest.mark.parametrize(("config", "settings"), refusals())
def test_documented_refusal_is_true(make_config, config, settings):
    names = re.findall(r"(\w+)=", settings)
    with pytest.raises(ValueError) as refused:
        make_config(getattr(halos_trl, config), **eval(f"dict({settings})"))
    assert any(name in str(refused.value) for name in names)


def test_every_refused_field_is_documented():
    documented_fields = {(config, name) for config, settings in refusals() for name in re.findall(r"(\w+)=", settings)}
    for name in ("CDPOConfig", "IPOConfig", "SimPOConfig", "SLiCConfig"):
        for refused in getattr(halos_trl, name)._refused:
            assert (name, refused) in documented_fields, (name, refused)
