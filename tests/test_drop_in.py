"""A TRL script with one import changed: every argument is accepted, every option gives TRL's run or is documented."""

import copy
import dataclasses
import inspect
import re
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import trl
from conftest import paired_rows, perturbed, unpaired_rows, weights
from peft import LoraConfig, PeftModel, get_peft_model
from test_kto_trainer import TRLWithOurPartners
from test_paired_trainers import OPTIONS as DPO_LOSS_OPTIONS

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

# Settings of both methods whose run has to be TRL's. Each is one run of either; one micro-batch in each step.
COMMON_OPTIONS = [
    {"beta": 0.3},
    {"max_length": None},
    {"seed": 7, "data_seed": 3, "trust_remote_code": True, "train_sampling_strategy": "sequential"},
    {
        "remove_unused_columns": False, "dataloader_pin_memory": False, "dataloader_num_workers": 0,
        "ddp_find_unused_parameters": True, "accelerator_config": {"split_batches": True},
    },
    {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8},
    {"save_strategy": "steps", "save_steps": 1},
    {"learning_rate": 1e-2, "max_grad_norm": 0.1, "weight_decay": 0.1, "warmup_steps": 2},
    {"optim": "adamw_torch", "learning_rate": 1e-4, "adam_epsilon": 1e-4},
    {"num_train_epochs": 1, "max_steps": -1, "dataloader_drop_last": True, "lr_scheduler_type": "cosine"},
    {"per_device_train_batch_size": 4},
    {"neftune_noise_alpha": 5.0, "average_tokens_across_devices": False, "label_smoothing_factor": 0.1},
    {
        "model_init_kwargs": None, "router_aux_loss_coef": None, "activation_offloading": False,
        "use_liger_kernel": False, "liger_kernel_config": None,
    },
]  # fmt: skip
OPTIONS = {
    "dpo": [
        *COMMON_OPTIONS,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"padding_free": True, "pad_token": "<|end|>"},
    ],  # and those of tests/test_paired_trainers.py
    "kto": [
        *COMMON_OPTIONS,
        {"max_length": 14, "loss_type": "apo_zero_unpaired"},  # KL partners: docs/methods.md
        {"pad_to_multiple_of": 16},
        {"disable_dropout": False},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"dataset_num_proc": 1},
        {"bf16": True, "learning_rate": 1e-2},
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.7},
        {"desirable_weight": 1.5, "undesirable_weight": 0.5},
        {"loss_type": "apo_zero_unpaired"},
        {"precompute_ref_log_probs": True, "loss_type": "apo_zero_unpaired"},
        {"precompute_ref_log_probs": True, "loss_type": "apo_zero_unpaired", "precompute_ref_batch_size": 3},
    ],
}
# Where a run's equality is tested elsewhere in this file, or cannot be read off a run.
ELSEWHERE = {
    "output_dir": "every test here", "hub_model_id": "tests/test_push_to_hub.py",
    "model_init_kwargs": "test_model_as_a_path", "router_aux_loss_coef": "test_mixture_of_experts",
    "gradient_accumulation_steps": "test_loss_and_weights_do_not_depend_on_the_split",
}  # fmt: skip


@pytest.fixture
def pair_of_runs(model, tokenizer, make_config):
    """Our trainer and TRL's on the same rows, from the same weights, against the same reference."""

    def run(
        method, *, train=True, policy=None, ref="near", data=None, tokenizer=tokenizer, arguments=None, **settings
    ):
        ours, our_config, theirs, trl_config, rows = CLASSES[method]
        data = rows(16) if data is None else data
        trainers = []
        for trainer_class, config_class in ((ours, our_config), (theirs, trl_config)):
            own = {k: v() if callable(v) and k != "compute_metrics" else v for k, v in (arguments or {}).items()}
            trainers.append(
                trainer_class(
                    model=copy.deepcopy(model) if policy is None else policy(),
                    ref_model=perturbed(model) if ref == "near" else ref,
                    args=make_config(
                        config_class, **({"train_sampling_strategy": "sequential", "max_steps": 2} | settings)
                    ),
                    train_dataset=data,
                    processing_class=tokenizer,
                    **own,
                )
            )
            if train:
                trainers[-1].train()
        return trainers

    return run


def assert_same_run(ours, theirs, *, low_precision=False):
    atol = 1e-4 if low_precision else 1e-6
    torch.testing.assert_close(weights(ours.model).float(), weights(theirs.model).float(), rtol=0, atol=atol)
    kept = [[e for e in t.state.log_history if "loss" in e or "eval_loss" in e] for t in (ours, theirs)]
    assert len(kept[0]) == len(kept[1]) > 0
    tolerance = {"rel": 1e-2, "abs": 2e-2} if low_precision else {"rel": 1e-5, "abs": 5e-6}
    for mine, trls in zip(*kept, strict=True):
        assert set(mine) == set(trls)
        for name, value in trls.items():
            if not re.search("runtime|per_second", name):
                assert mine[name] == pytest.approx(value, **tolerance), name


# -- arguments and fields ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(DPOTrainer, trl.DPOTrainer), (KTOTrainer, trl.KTOTrainer), (BradleyTerryTrainer, trl.RewardTrainer)],
)
def test_every_argument_of_trls_class_is_accepted(ours, theirs):
    mine, trls = inspect.signature(ours.__init__).parameters, inspect.signature(theirs.__init__).parameters
    if any(p.kind is p.VAR_KEYWORD for p in mine.values()):
        # Passed on by name: the class that receives them is TRL's own.
        assert issubclass(ours, theirs)
        return
    assert list(trls) == list(mine), "the same names in the same order"


@pytest.mark.parametrize("theirs", [trl.DPOTrainer, trl.KTOTrainer])
def test_positional_arguments_have_trls_order(theirs):
    order = list(inspect.signature(theirs.__init__).parameters)
    ours = list(inspect.signature(halos_trl._trl.TrainerHost.__init__).parameters)
    assert ours[: len(order)] == order


def documented(heading):
    """Names in backticks at the start of the rows of the table below a heading of docs/methods.md."""
    section = METHODS_PAGE.split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    cells = re.findall(r"^\| (`[^|]*`) \|", section, flags=re.M)
    return {name for cell in cells for name in re.findall(r"`(\w+)", cell)}


def fields_of(config_class):
    return {f.name: f for f in dataclasses.fields(config_class)}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(DPOConfig, trl.DPOConfig), (KTOConfig, trl.KTOConfig), (BradleyTerryConfig, trl.RewardConfig)],
)
def test_every_field_of_trls_config_exists_with_its_default(ours, theirs):
    def default(f):
        return f.default if f.default is not dataclasses.MISSING else f.default_factory and f.default_factory()

    differing = {
        name for name, f in fields_of(theirs).items() if default(f) != default(fields_of(ours)[name])
    }  # KeyError: a field is missing
    assert differing <= documented("Differences from TRL")


def read_by_trainers(method):
    """Fields of the config that TRL's trainer or this package reads by name."""
    files = [Path(inspect.getsourcefile({"dpo": trl.DPOTrainer, "kto": trl.KTOTrainer}[method]))]
    package = Path(halos_trl.__file__).parent
    own = ("base", "paired", "dpo") if method == "dpo" else ("base", "unpaired", "kto")
    files += [package / "_trl.py", package / "reference.py", *(package / "trainers" / f"{name}.py" for name in own)]
    text = "\n".join(path.read_text() for path in files)
    return set(re.findall(r"\bargs\.(\w+)", text)) | set(re.findall(r"getattr\((?:self\.)?args, \"(\w+)\"", text))


@BOTH
def test_every_field_that_a_trainer_reads_is_probed_or_documented(method):
    """The others are read by transformers.Trainer alone, which is the same code in both runs."""
    fields = set(fields_of(CLASSES[method][3]))
    own = fields - set(fields_of(transformers.TrainingArguments))
    probed = {name for options in OPTIONS[method] for name in options} | set(ELSEWHERE)
    if method == "dpo":
        probed |= {name for options in DPO_LOSS_OPTIONS for name in options}
    unknown = (own | (read_by_trainers(method) & fields)) - probed - documented("Differences from TRL")
    assert unknown == set(), "probe it in this file, or document it in docs/methods.md"


# -- options: TRL's run --------------------------------------------------------------------------------------------


CASES = [(method, options) for method, table in OPTIONS.items() for options in table]


@pytest.mark.parametrize(
    ("method", "options"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(f"{k}={x}" for k, x in v.items())
)
def test_option_gives_trls_run(pair_of_runs, method, options):
    arguments = {"eval_dataset": CLASSES[method][4](8, 1)} if "eval_strategy" in options else None
    ours, theirs = pair_of_runs(method, arguments=arguments, **({"beta": 0.5} | options))
    assert_same_run(ours, theirs, low_precision=options.get("bf16", False))


def test_accumulated_micro_batches_give_trls_run_without_a_kl_term(pair_of_runs):
    """With a KL term TRL's run depends on the split; ours does not (tests/test_kto_trainer.py)."""
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "beta": 0.5}
    for method, options in (("kto", {"loss_type": "apo_zero_unpaired"}), ("dpo", {})):
        ours, theirs = pair_of_runs(method, **split, **options)
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


IMAGE = "<image>"
IMAGE_TEMPLATE = (
    "{%- for message in messages %}{{- '<|' + message['role'] + '|>' }}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}<image>{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- if message['role'] == 'assistant' %}<|end|>{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{%- endif %}"
)


@pytest.fixture(scope="module")
def vision():
    """A Llava of a few thousand parameters and its processor, built without a download; images have 8 x 8 pixels."""
    pytest.importorskip("PIL")
    tokenizer = toy.build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.chat_template = None  # the processor has one
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
        ),
        tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default", image_token=IMAGE,
        num_additional_image_tokens=1, chat_template=IMAGE_TEMPLATE,
    )  # fmt: skip
    small = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(hidden_size=16, image_size=8, patch_size=4, **small),
        text_config=transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, max_position_embeddings=128, bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **small,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE), vision_feature_layer=-1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlavaForConditionalGeneration(config).float(), processor


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


# -- publishing ----------------------------------------------------------------------------------------------------


@BOTH
def test_tags_and_card_name_the_method_and_the_host(pair_of_runs, method, tmp_path):
    ours, _ = pair_of_runs(method, max_steps=1)
    ours.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    front = card.split("---")[1]
    assert all(f"- {tag}\n" in front for tag in ("trl", "halos-trl", method))
    assert {"dpo": "2305.18290", "kto": "2402.01306"}[method] in card


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
