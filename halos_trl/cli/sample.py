"""`halos-trl sample`: completions of a model for the prompts of a dataset, in HALOs' sample format."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm
from trl import DatasetMixtureConfig, ScriptArguments

from .. import toy
from ..data.named import NAMED, named_items
from ..data.prompts import unique_prompts
from ..sampling import Completion, Sampler, SamplingSettings, TransformersSampler, VLLMSampler, load_sampler, samples
from .arguments import read_arguments
from .data import load_data
from .flags import refuse_half_named
from .output import OutputFile, fingerprint

EMBEDDED_PROMPTS = 1000


@dataclass
class SampleArguments:
    """Sample completions of a model for the distinct prompts of a dataset, and write them as JSON Lines in HALOs'
    sample format.

    An interrupted run continues when it is started again with the same flags, and gives the same file.
    """

    output: str = field(default="samples.jsonl", metadata={"help": "File to write."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model or adapter: Hub id or folder. Without model and dataset: the embedded task."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, a name such as `shp` (docs/data.md), local file or folder."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split that provides the prompts."})
    num_prompts: int | None = field(default=None, metadata={"help": "Number of prompts to sample for. None: all."})
    num_skip: int = field(default=0, metadata={"help": "Number of prompts to skip at the start."})
    num_samples_per_prompt: int = field(default=1, metadata={"help": "Number of completions per prompt."})
    temperature: float = field(
        default=0.7, metadata={"help": "Sampling temperature; 0 selects the most likely token at each step."}
    )
    top_p: float = field(
        default=0.95,
        metadata={"help": "Sample from the smallest set of tokens with this total probability; 1: all tokens."},
    )
    max_tokens: int = field(default=2048, metadata={"help": "Maximum number of tokens per completion."})
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Maximum number of tokens per prompt; a longer prompt is an error. None: no limit."},
    )
    stop: list[str] = field(default_factory=list, metadata={"help": "Stop strings, which end a completion."})
    seed: int = field(default=0, metadata={"help": "Random seed."})
    logprobs: bool = field(
        default=False,
        metadata={
            "help": "Also write the log-prob of each token under the model, in nats; "
            "`train grpo --old_policy sampler` reads them."
        },
    )
    batch_size: int = field(default=64, metadata={"help": "Number of completions generated in one batch."})
    engine: Literal["auto", "vllm", "transformers"] = field(
        default="auto", metadata={"help": "Sampling engine; `auto`: vLLM if it is installed, else transformers."}
    )
    tensor_parallel_size: int = field(default=1, metadata={"help": "Number of GPUs over which vLLM splits the model."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Dtype of the weights; auto: the checkpoint's."}
    )
    alpaca_eval: str | None = field(
        default=None,
        metadata={
            "help": "Also write this `.json` file for AlpacaEval: an array of instruction, output and generator."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing output."})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand."""
    arguments = read_arguments(SampleArguments, argv, "sample")
    settings = settings_of(arguments)
    refuse_half_named(arguments.model_name_or_path is not None, arguments.dataset_name is not None)
    prompts = prompts_of(arguments)
    check_alpaca_eval(arguments, prompts)
    write_samples(arguments, settings, prompts)


def settings_of(arguments: SampleArguments) -> SamplingSettings:
    """The settings that determine the samples."""
    if arguments.num_skip < 0 or (arguments.num_prompts is not None and arguments.num_prompts < 1):
        raise ValueError(
            f"`--num_skip` is {arguments.num_skip} and `--num_prompts` {arguments.num_prompts}; expected at least 0 "
            "prompts to skip and at least 1 to sample for."
        )
    return SamplingSettings(
        n=arguments.num_samples_per_prompt,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        max_prompt_length=arguments.max_prompt_length,
        stop=tuple(arguments.stop),
        seed=arguments.seed,
        logprobs=arguments.logprobs,
        batch_size=arguments.batch_size,
    )


def prompts_of(arguments: SampleArguments) -> list[dict[str, Any]]:
    """The distinct prompts of the dataset, with `prompt_id` and the other columns of their rows."""
    if arguments.dataset_name is None:
        count = (arguments.num_prompts or EMBEDDED_PROMPTS) + arguments.num_skip
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in toy.make_prompts(count, 0, "feedback")]
    elif arguments.dataset_name in NAMED and not Path(arguments.dataset_name).exists():
        items = named_items(arguments.dataset_name, arguments.dataset_split)
        rows = unique_prompts(({"prompt": item["prompt"]} for item in items), f"`{arguments.dataset_name}`")
    else:
        names = ScriptArguments(dataset_name=arguments.dataset_name, dataset_config=arguments.dataset_config)
        splits = load_data(names, DatasetMixtureConfig())
        if arguments.dataset_split not in splits:
            raise ValueError(
                f"The dataset has splits {sorted(splits)}, not {arguments.dataset_split!r}. Choose one with "
                "`--dataset_split`."
            )
        rows = unique_prompts(splits[arguments.dataset_split], f"`{arguments.dataset_name}`")
    end = None if arguments.num_prompts is None else arguments.num_skip + arguments.num_prompts
    chosen = [{**row, "prompt_id": number} for number, row in enumerate(rows)][arguments.num_skip : end]
    if not chosen:
        raise ValueError(
            f"`--num_skip {arguments.num_skip}` skips all {len(rows)} prompts of `{arguments.dataset_name}`. Skip "
            "fewer."
        )
    return chosen


def write_samples(
    arguments: SampleArguments,
    settings: SamplingSettings,
    prompts: list[dict[str, Any]],
    sampler: Sampler | None = None,
) -> None:
    """Write the samples of all prompts to `arguments.output`, continuing an interrupted run."""
    n = settings.n
    with OutputFile(arguments.output, _decisive(arguments, prompts), overwrite=arguments.overwrite) as output:
        if output.resumed:
            print(f"{arguments.output}: continuing after {output.count} samples")
        skip, part = divmod(output.count, n)
        if skip < len(prompts):
            sampler = sampler or _sampler(arguments, settings)
        bar = tqdm(total=len(prompts), initial=skip, desc="sampling", unit="prompt")
        for row, completions in zip(prompts[skip:], samples(sampler, prompts, skip) if sampler else (), strict=True):
            output.write(*itertools.islice(items(row, completions, arguments), part, None))
            part = 0
            bar.update()
        bar.close()
        if arguments.alpaca_eval:
            write_alpaca_eval(output.items(), Path(arguments.alpaca_eval))
    print(f"{arguments.output}: {n * len(prompts)} samples of {len(prompts)} prompts")


def items(
    row: dict[str, Any], completions: Sequence[Completion], arguments: SampleArguments
) -> Iterator[dict[str, Any]]:
    """The samples of a prompt in HALOs' format, with additional fields: tokens, log-probs, other columns."""
    dataset = Path(arguments.dataset_name).stem if arguments.dataset_name else "embedded"
    for sample_id, completion in enumerate(completions):
        yield {
            **{name: value for name, value in row.items() if name not in ("prompt", "prompt_id")},
            "prompt": row["prompt"],
            "output": completion.text,
            "generator": arguments.model_name_or_path or "embedded",
            "dataset": f"{dataset}_{arguments.dataset_split}",
            "split": arguments.dataset_split,
            "prompt_id": row["prompt_id"],
            "sample_id": sample_id,
            "type": "sample",
            "finish_reason": completion.finish_reason,
            "token_ids": completion.token_ids,
            **({"logprobs": completion.logprobs} if completion.logprobs is not None else {}),
        }


def check_alpaca_eval(arguments: SampleArguments, prompts: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for what AlpacaEval cannot read: it needs one text output per prompt, in a `.json` file."""
    if arguments.alpaca_eval is None:
        return
    path = Path(arguments.alpaca_eval)
    if path.suffix != ".json":
        raise ValueError(
            f"`--alpaca_eval {path}`: AlpacaEval reads only `.json` files. Choose a name that ends in `.json`."
        )
    if path.exists() and not arguments.overwrite:
        raise ValueError(f"`{path}` exists. Choose another file, or pass `--overwrite` to replace it.")
    if arguments.num_samples_per_prompt != 1:
        raise ValueError(
            f"`--alpaca_eval` needs one output per prompt, not {arguments.num_samples_per_prompt}. Leave out "
            "`--num_samples_per_prompt`."
        )
    for row in prompts:
        if instruction_of(row["prompt"]) is None:
            raise ValueError(
                f"`--alpaca_eval` needs prompts of one user turn; prompt {row['prompt_id']} of "
                f"`{arguments.dataset_name}` has the roles {[turn['role'] for turn in row['prompt']]}. Leave the "
                "flag out, or choose a dataset of single instructions."
            )


def instruction_of(prompt: str | list[dict[str, Any]]) -> str | None:
    """The text of a prompt with a single user turn; None for any other prompt."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if [turn["role"] for turn in prompt] == ["user"] else None


def write_alpaca_eval(samples_: Iterable[dict[str, Any]], path: Path) -> None:
    """The samples as the JSON array that `alpaca_eval evaluate --model_outputs` reads."""
    outputs = [
        {"instruction": instruction_of(item["prompt"]), "output": item["output"], "generator": item["generator"]}
        for item in samples_
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(outputs, ensure_ascii=False, indent=1), "utf-8")
    partial.replace(path)


def _decisive(arguments: SampleArguments, prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings that the file's content depends on."""
    free = ("output", "overwrite", "tensor_parallel_size", "dataset_config", "alpaca_eval")
    named = {name: value for name, value in vars(arguments).items() if name not in free}
    return named | {"engine": _engine(arguments), "prompts": fingerprint(prompts)}


def _engine(arguments: SampleArguments) -> str:
    if arguments.engine != "auto":
        return arguments.engine
    return "vllm" if find_spec("vllm") and arguments.model_name_or_path else "transformers"


def _sampler(arguments: SampleArguments, settings: SamplingSettings) -> Sampler:
    name = arguments.model_name_or_path or toy.load_model_path()
    if _engine(arguments) == "transformers":
        model, tokenizer = load_sampler(name, dtype=arguments.dtype)
        return TransformersSampler(model, tokenizer, settings)
    if not find_spec("vllm"):
        raise ValueError("`--engine vllm` needs vLLM, which is not installed: `pip install vllm`.")
    return VLLMSampler(name, settings, tensor_parallel_size=arguments.tensor_parallel_size, dtype=arguments.dtype)
