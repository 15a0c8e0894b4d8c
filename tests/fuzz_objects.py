"""Changes of the fuzz suite to tokenizers, models and other arguments of a trainer."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from fuzz_cases import Case, Change
from fuzz_rows import NEVER, as_dataset, stream
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as vocabularies

import halos_trl
from halos_trl import toy

# -- tokenizers ----------------------------------------------------------------------------------------------------


@functools.cache
def _toy_tokenizer() -> Any:
    return toy.build_tokenizer()


def plain_tokenizer() -> Any:
    return copy.deepcopy(_toy_tokenizer())


def _tokenizer(template: str | None = toy.CHAT_TEMPLATE, single: str | None = None, **attributes: Any) -> Any:
    tokenizer = plain_tokenizer()
    tokenizer.chat_template = template
    if single is not None:  # what it makes of a text
        tokenizer.bos_token = toy.SYSTEM
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (toy.SYSTEM, toy.END)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=special
        )
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def _larger_tokenizer() -> Any:
    tokenizer = plain_tokenizer()
    tokenizer.add_tokens(list("abcdefghijklmnopqrst "))  # ids that the model has no row for
    return tokenizer


def _one_word_tokenizer() -> Any:
    backend = Tokenizer(vocabularies.WordLevel({"[UNK]": 0, "[END]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", eos_token="[END]", pad_token="[END]"
    )
    made.chat_template = toy.CHAT_TEMPLATE
    return made


GENERATION_MARKERS = """\
{%- for message in messages %}{{- "<|" ~ message.role ~ "|>" }}
{%- if message.role == "assistant" %}{% generation %}{{- message.content ~ eos_token }}{% endgeneration %}
{%- else %}{{- message.content }}{% endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>" }}{% endif %}"""
NO_PREFIX = "{% for m in messages %}<|user|>{{ messages|length }}{{ m.content }}{% endfor %}"
UNDEFINED = "{% for m in messages %}{{ m.thinking.text }}{% endfor %}"

TOKENIZERS: dict[str, tuple[Any, bool, tuple[str, ...]]] = {
    # name: (maker, whether weights have to move where the run trains, what else an error may name)
    "no EOS": (lambda: _tokenizer(eos_token=None), True, ("[eE][oO][sS]", "end-of-sequence")),
    "no PAD": (lambda: _tokenizer(pad_token=None), True, ("[pP][aA][dD]",)),
    "no EOS, no PAD": (lambda: _tokenizer(eos_token=None, pad_token=None), True, ("[eE][oO][sS]", "[pP][aA][dD]")),
    "PAD is EOS": (lambda: _tokenizer(pad_token=toy.END), True, ("pad",)),
    "adds BOS": (lambda: _tokenizer(single=f"{toy.SYSTEM} $A"), True, ()),
    "adds EOS": (lambda: _tokenizer(single=f"$A {toy.END}"), True, ()),
    "adds BOS and EOS": (lambda: _tokenizer(single=f"{toy.SYSTEM} $A {toy.END}"), True, ()),
    "no template": (lambda: _tokenizer(None), True, ("template",)),
    "empty template": (lambda: _tokenizer(""), True, ("template",)),
    "template of white space": (lambda: _tokenizer("  "), False, ("template",)),
    "template that says nothing": (lambda: _tokenizer("{{ '' }}"), False, ("template",)),
    "template that ignores content": (lambda: _tokenizer("{{ messages[0].role }}"), False, ("template",)),
    "template that raises": (lambda: _tokenizer("{{ raise_exception('no') }}"), True, ("template",)),
    "template with a syntax error": (lambda: _tokenizer("{% for %}"), True, ("template",)),
    "template that divides by zero": (lambda: _tokenizer("{{ 1 / 0 }}"), True, ("template",)),
    "template of undefined values": (lambda: _tokenizer(UNDEFINED), True, ("template",)),
    "template of another type": (lambda: _tokenizer(5), True, ("template",)),
    "named templates": (lambda: _tokenizer({"default": toy.CHAT_TEMPLATE, "rag": "{{ 1 }}"}), True, ("template",)),
    "generation markers": (lambda: _tokenizer(GENERATION_MARKERS), True, ("template",)),
    "prompt is no prefix": (lambda: _tokenizer(NO_PREFIX), True, ("template", "prefix", "prompt")),
    "pads left": (lambda: _tokenizer(padding_side="left"), True, ()),
    "truncates left": (lambda: _tokenizer(truncation_side="left"), True, ()),
    "short limit": (lambda: _tokenizer(model_max_length=8), True, ("model_max_length", "max_length")),
    "ids beyond the embedding": (_larger_tokenizer, True, ("vocabulary", "embedding", r"[Rr]ow \d+.*id")),
    "one word": (_one_word_tokenizer, False, ("template", "pad", r"[Rr]ows? \d+")),
    "None": (lambda: None, True, ()),
    "a string": (lambda: "toy", True, ()),
    "a number": (lambda: 5, True, ()),
    "the class itself": (lambda: transformers.PreTrainedTokenizerFast, True, ()),
    "the backend": (lambda: plain_tokenizer().backend_tokenizer, True, ()),
}


def tokenizers(rng: random.Random, case: Case) -> Change:
    """Another tokenizer, or an object that is not one."""
    name = rng.choice(sorted(TOKENIZERS))
    maker, learns, named = TOKENIZERS[name]

    def apply(case: Case) -> None:
        case.tokenizer = maker

    return Change(
        f"tokenizer: {name}", apply, ("`processing_class", "tokenizer", *named), learns=learns, hosts_speak=True
    )


# -- models --------------------------------------------------------------------------------------------------------

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


def _built(config_name: str, model_name: str, **settings: Any) -> Any:
    tokenizer = _toy_tokenizer()
    common = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    config = getattr(transformers, config_name)(**(common | settings))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return getattr(transformers, model_name)(config).float()


@functools.cache
def _cached(config_name: str, model_name: str, settings: tuple) -> Any:
    return _built(config_name, model_name, **dict(settings))


def _small(config_name: str, model_name: str, **settings: Any) -> Any:
    return copy.deepcopy(_cached(config_name, model_name, tuple(settings.items())))


def llama(case: Case, **settings: Any) -> Any:
    """The trained model: with a language-model head or a score head."""
    settings = SIZES | dict(max_position_embeddings=256, tie_word_embeddings=True) | settings
    if case.kind == "reward":
        return _small("LlamaConfig", "LlamaForSequenceClassification", **{"num_labels": 1, **settings})
    return _small("LlamaConfig", "LlamaForCausalLM", **settings)


def gpt2(case: Case, **settings: Any) -> Any:
    settings = dict(n_embd=32, n_layer=1, n_head=2, n_positions=256) | settings
    if case.kind == "reward":
        return _small("GPT2Config", "GPT2ForSequenceClassification", **{"num_labels": 1, **settings})
    return _small("GPT2Config", "GPT2LMHeadModel", **settings)


def opt(case: Case) -> Any:
    settings = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32)
    name = "OPTForSequenceClassification" if case.kind == "reward" else "OPTForCausalLM"
    return _small("OPTConfig", name, **settings, **({"num_labels": 1} if case.kind == "reward" else {}))


def mixtral(case: Case) -> Any:
    settings = SIZES | dict(num_local_experts=2, num_key_value_heads=2, num_hidden_layers=1)
    name = "MixtralForSequenceClassification" if case.kind == "reward" else "MixtralForCausalLM"
    return _small("MixtralConfig", name, **settings, **({"num_labels": 1} if case.kind == "reward" else {}))


def _t5(case: Case) -> Any:
    settings = dict(d_model=32, d_ff=48, d_kv=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return _small("T5Config", "T5ForConditionalGeneration", **settings)


def _other_head(case: Case) -> Any:
    other = copy.copy(case)
    other.trainer = "DPO" if case.kind == "reward" else "BradleyTerry"
    return llama(other)


def _with(model: Any, change: Any) -> Any:
    change(model)
    return model


def _spoilt(value: float) -> Any:
    def spoil(model: Any) -> None:
        next(model.parameters()).data[5:] = value

    return spoil


def _config_value(name: str, value: Any) -> Any:
    return lambda model: setattr(model.config, name, value)


def lora(case: Case, **settings: Any) -> peft.LoraConfig:
    task = "SEQ_CLS" if case.kind == "reward" else "CAUSAL_LM"
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": task, **settings})


def _adapted(case: Case, trainable: bool = True, **names: Any) -> Any:
    model = peft.get_peft_model(llama(case), lora(case), **names)
    if not trainable:
        model.requires_grad_(False)
    return model


def _half_frozen(model: Any) -> None:
    for parameter in list(model.parameters())[:-1]:
        parameter.requires_grad_(False)


MODELS: dict[str, tuple[Any, bool, tuple[str, ...]]] = {
    # name: (maker, whether weights have to move where the run trains, what else an error may name)
    "smaller vocabulary": (lambda case: llama(case, vocab_size=100), True, ("vocabulary", "embedding")),
    "few positions": (lambda case: gpt2(case, n_positions=8), True, ("max_position_embeddings", "position")),
    "few positions, rotary": (lambda case: llama(case, max_position_embeddings=8), True, ("position",)),
    "GPT-2 with dropout": (gpt2, True, ()),
    "OPT": (opt, True, ()),
    "dropout in the attention": (lambda case: llama(case, attention_dropout=0.5), True, ("dropout",)),
    "mixture of experts": (mixtral, True, ()),
    "encoder and decoder": (_t5, True, ("T5|encoder",)),
    "no head": (lambda case: _small("LlamaConfig", "LlamaModel", **SIZES), True, ("LlamaModel|head",)),
    "another head": (_other_head, True, ("head|LM|logit|label",)),
    "two labels": (lambda case: llama(case, num_labels=2), True, ("label",)),
    "frozen": (lambda case: llama(case).requires_grad_(False), True, ("frozen|requires_grad|trainable",)),
    "frozen but for one": (lambda case: _with(llama(case), _half_frozen), True, ("requires_grad|trainable",)),
    "bfloat16": (lambda case: llama(case).to(torch.bfloat16), True, ()),
    "float16": (lambda case: llama(case).to(torch.float16), True, ("float16|dtype",)),
    "float64": (lambda case: llama(case).to(torch.float64), True, ()),
    "NaN weights": (lambda case: _with(llama(case), _spoilt(float("nan"))), True, ("NaN",)),
    "infinite weights": (lambda case: _with(llama(case), _spoilt(float("inf"))), True, ("NaN|infinit",)),
    "huge weights": (lambda case: _with(llama(case), _spoilt(1e30)), True, ("NaN|infinit",)),
    "on the meta device": (lambda case: llama(case).to("meta"), True, ("meta",)),
    "no PAD id": (lambda case: _with(llama(case), _config_value("pad_token_id", None)), True, ("pad",)),
    "no EOS id": (lambda case: _with(llama(case), _config_value("eos_token_id", None)), True, ("eos",)),
    "PAD id beyond": (lambda case: _with(llama(case), _config_value("pad_token_id", 10**6)), True, ("pad",)),
    "no name": (lambda case: _with(llama(case), _config_value("_name_or_path", None)), True, ()),
    "untied": (lambda case: llama(case, tie_word_embeddings=False), True, ()),
    "in training mode": (lambda case: llama(case).train(), True, ()),
    "adapter": (_adapted, True, ()),
    "frozen adapter": (lambda case: _adapted(case, trainable=False), True, ("is_trainable|trainable|frozen",)),
    "adapter of another name": (lambda case: _adapted(case, adapter_name="mine"), True, ("adapter",)),
    "adapter named reference": (lambda case: _adapted(case, adapter_name="reference"), True, ("adapter",)),
    "adapter named ref": (lambda case: _adapted(case, adapter_name="ref"), True, ("adapter",)),
    "None": (lambda case: None, True, ()),
    "a number": (lambda case: 5, True, ()),
    "an empty string": (lambda case: "", True, ()),
    "a folder that is not there": (lambda case: "./not-there", True, ("not-there",)),
    "a hub id that nobody has": (lambda case: "nobody/nothing", True, ("nobody/nothing",)),
    "a linear layer": (lambda case: torch.nn.Linear(4, 4), True, ("Linear",)),
    "the class itself": (lambda case: transformers.LlamaForCausalLM, True, ("LlamaForCausalLM",)),
    "a config": (lambda case: llama(case).config, True, ("LlamaConfig",)),
}


def models(rng: random.Random, case: Case) -> Change:
    """Another model, or what is none."""
    name = rng.choice(sorted(MODELS))
    maker, learns, named = MODELS[name]

    def apply(case: Case) -> None:
        case.model = functools.partial(maker, case)

    return Change(f"model: {name}", apply, ("`model`", "[Mm]odel", *named), learns=learns)


# -- the other arguments -------------------------------------------------------------------------------------------


class _Quiet(transformers.TrainerCallback):
    """Does nothing."""


def _optimizer(case: Case, parameters: Any = None) -> tuple:
    parameters = parameters or [torch.nn.Parameter(torch.zeros(1))]
    return torch.optim.SGD(parameters, lr=0.1), None


def _metrics(prediction: Any) -> dict[str, float]:
    return {"rows": float(len(prediction.predictions[0]))}


class UsersOwnError(KeyError):
    """What a user's own function raises, and nobody else has to explain."""


def _broken(*args: Any, **kwargs: Any) -> Any:
    raise UsersOwnError


REFERENCES = {
    "the model's class": lambda case: transformers.LlamaForCausalLM,
    "a copy": llama,
    "in training mode": lambda case: llama(case).train(),
    "another vocabulary": lambda case: llama(case, vocab_size=100),
    "a larger vocabulary": lambda case: llama(case, vocab_size=300),
    "another architecture": gpt2,
    "an adapter": _adapted,
    "a folder that is not there": lambda case: "./not-there",
    "a number": lambda case: 5,
    "no head": lambda case: _small("LlamaConfig", "LlamaModel", **SIZES),
    "encoder and decoder": _t5,
    "bfloat16": lambda case: llama(case).to(torch.bfloat16),
    "NaN weights": lambda case: _with(llama(case), _spoilt(float("nan"))),
    "a linear layer": lambda case: torch.nn.Linear(4, 4),
}
ADAPTERS = {
    "LoRA": lora,
    "all biases": lambda case: lora(case, bias="all"),
    "modules to save": lambda case: lora(case, modules_to_save=["norm"]),
    "head to save": lambda case: lora(case, modules_to_save=["lm_head" if case.kind != "reward" else "score"]),
    "no task": lambda case: lora(case, task_type=None),
    "another task": lambda case: lora(case, task_type="SEQ_2_SEQ_LM"),
    "dropout": lambda case: lora(case, lora_dropout=0.5),
    "DoRA": lambda case: lora(case, use_dora=True),
    "all linear": lambda case: lora(case, target_modules="all-linear"),
    "embeddings": lambda case: lora(case, target_modules=["embed_tokens"]),
    "trainable tokens": lambda case: lora(case, trainable_token_indices=[4]),
    "PiSSA": lambda case: lora(case, init_lora_weights="pissa"),
    "no such module": lambda case: lora(case, target_modules=["bogus"]),
    "rank 0": lambda case: lora(case, r=0),
    "rank of text": lambda case: lora(case, r="4"),
    "IA3": lambda case: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt tuning": lambda case: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "a dict": lambda case: {"r": 4},
    "True": lambda case: True,
    "a string": lambda case: "lora",
    "the class itself": lambda case: peft.LoraConfig,
}
COLLATORS = {
    "a string": lambda case: "bogus",
    "a number": lambda case: 5,
    "gives nothing": lambda case: lambda rows: None,
    "gives an empty dict": lambda case: lambda rows: {},
    "gives the rows": lambda case: lambda rows: rows,
    "gives other keys": lambda case: lambda rows: {"input_ids": torch.zeros(len(rows), 3, dtype=torch.long)},
    "transformers' default": lambda case: transformers.default_data_collator,
    "raises": lambda case: _broken,
}
EVALUATIONS = {
    "a list": lambda case: case.rows,
    "an empty dict": lambda case: {},
    "a dict of datasets": lambda case: {"a": as_dataset(case.rows), "b": as_dataset(case.rows)},
    "a dict with None": lambda case: {"a": None},
    "a DatasetDict": lambda case: datasets.DatasetDict(a=as_dataset(case.rows)),
    "a stream": lambda case: stream(case.rows),
    "an empty stream": lambda case: stream([]),
    "no rows": lambda case: as_dataset(case.rows).select(range(0)),
    "one row": lambda case: as_dataset(case.rows).select([0]),
    "five rows": lambda case: as_dataset(case.rows).select(range(min(5, len(case.rows)))),
    "other columns": lambda case: datasets.Dataset.from_list([{"text": "ab"}]),
    "None in a row": lambda case: as_dataset([*case.rows[:1], dict.fromkeys(case.rows[0])]),
    "torch format": lambda case: as_dataset(case.rows).with_format("torch"),
    "a string": lambda case: "test",
    "True": lambda case: True,
}
CALLBACKS = {
    "one": lambda case: [_Quiet()],
    "a class": lambda case: [_Quiet],
    "no list": lambda case: _Quiet(),
    "None in a list": lambda case: [None],
    "a string": lambda case: "bogus",
    "a function": lambda case: [print],
    "twice": lambda case: [_Quiet(), _Quiet()],
}
OPTIMIZERS = {
    "none": lambda case: (None, None),
    "of other parameters": _optimizer,
    "three": lambda case: (None, None, None),
    "None": lambda case: None,
    "numbers": lambda case: (5, 5),
    "a list": lambda case: [None, None],
    "a class": lambda case: (torch.optim.SGD, None),
    "no pair": lambda case: _optimizer(case)[0],
    "a schedule alone": lambda case: (None, torch.optim.lr_scheduler.LambdaLR(_optimizer(case)[0], lambda step: 1.0)),
}
METRICS = {
    "a function": lambda case: _metrics,
    "gives None": lambda case: lambda prediction: None,
    "gives a number": lambda case: lambda prediction: 5.0,
    "gives NaN": lambda case: lambda prediction: {"nan": float("nan")},
    "a string": lambda case: "accuracy",
    "a number": lambda case: 5,
}
TRL_CONFIGS = {"paired": "DPOConfig", "reward": "RewardConfig"}
ARGS = {
    "None": lambda case: None,
    "a dict": lambda case: {"learning_rate": 0.1},
    "TRL's": lambda case: getattr(trl, TRL_CONFIGS.get(case.kind, "KTOConfig"))(output_dir="out"),
    "a string": lambda case: "args.yaml",
    "of another method": lambda case: (halos_trl.KTOConfig if case.trainer != "KTO" else halos_trl.DPOConfig)(
        **case.settings
    ),
    "of transformers": lambda case: transformers.TrainingArguments(**case.settings),
    "the class itself": lambda case: getattr(halos_trl, f"{case.trainer}Config"),
}
REWARDS = {
    "without a tokenizer": lambda case: _other_head(case),
    "a string": lambda case: "not-there",
    "a number": lambda case: 5,
    "a language model": llama,
}
QUANTIZATIONS = {"a dict": lambda case: {"load_in_4bit": True}, "True": lambda case: True}
UNKNOWN = {"a misspelt name": lambda case: 1}

ARGUMENTS: dict[str, dict[str, Any]] = {
    "ref_model": REFERENCES,
    "peft_config": ADAPTERS,
    "data_collator": COLLATORS,
    "eval_dataset": EVALUATIONS,
    "callbacks": CALLBACKS,
    "optimizers": OPTIMIZERS,
    "compute_metrics": METRICS,
    "args": ARGS,
    "reward_model": REWARDS,
    "quantization_config": QUANTIZATIONS,
    "train_datset": UNKNOWN,
}
EXPECTED = {
    "ref_model": ("reference", "vocabulary"),
    "peft_config": ("[Aa]dapter", "target_modules", "[Tt]arget modules", "`r`", "LoRA", "PEFT"),
    "data_collator": ("collator",),
    "eval_dataset": (r"eval", r"the (a|b|test) dataset"),
    "callbacks": ("[Cc]allback",),
    "optimizers": ("optimizer",),
    "compute_metrics": ("metric",),
    "args": ("Config", "use_cpu"),
    "reward_model": ("[Rr]eward model", "reward_processing_class"),
    "quantization_config": ("quantiz",),
}
"""What an error may name beside the argument itself."""

ONLY = {"ref_model": ("paired", "unpaired", "scored"), "reward_model": ("scored",)}
NEVER_TRAINS = {
    "ref_model": ("the model's class", "a number", "a linear layer", "NaN weights", "no head"),
    "peft_config": ("no such module", "rank 0", "rank of text", "a dict", "True", "a string", "the class itself"),
    "data_collator": ("a string", "a number", "gives nothing", "gives an empty dict", "gives the rows"),
    "eval_dataset": ("other columns", "None in a row", "no rows", "a string", "True", "an empty stream"),
    "callbacks": ("a string",),
    "optimizers": ("of other parameters", "numbers", "a class", "no pair"),
    "compute_metrics": ("a string", "a number"),
    "args": ("a dict", "a string", "of another method", "of transformers", "the class itself"),
    "train_datset": ("a misspelt name",),
}
TRAIN_ARGUMENTS = ("./not-there", True, 5, "")


def arguments(rng: random.Random, case: Case) -> Change:
    """Another argument of the trainer, or of `train`."""
    fitting = [name for name in ARGUMENTS if case.kind in ONLY.get(name, (case.kind,))]
    name = rng.choice([*fitting, "resume_from_checkpoint"])
    if name == "resume_from_checkpoint":
        return _resume(rng.choice(TRAIN_ARGUMENTS))
    value = rng.choice(sorted(ARGUMENTS[name]))

    def apply(case: Case) -> None:
        case.arguments[name] = ARGUMENTS[name][value]
        case.evaluates = case.evaluates or name in ("compute_metrics", "eval_dataset")

    return Change(
        f"{name}: {value}",
        apply,
        (rf"(?<!\w){name}(?!\w)", *EXPECTED.get(name, ())),
        learns=(name, value) not in (("peft_config", "trainable tokens"), ("args", "None")),
        trains=value not in NEVER_TRAINS.get(name, ()),
        hosts_speak=True,
    )


def _resume(value: Any) -> Change:
    def apply(case: Case) -> None:
        case.train_arguments["resume_from_checkpoint"] = value

    names = ("resume_from_checkpoint", "checkpoint")
    return Change(f"train(resume_from_checkpoint={value!r})", apply, names, trains=value == "", hosts_speak=True)


__all__ = ["NEVER", "arguments", "models", "tokenizers"]
