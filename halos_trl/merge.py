"""The saved adapter merged into its base model: loaded, merged, saved and pushed."""

from __future__ import annotations

import os
import shutil
from typing import Any

from huggingface_hub import HfApi
from peft import PeftModel
from transformers.integrations import unset_hf_deepspeed_config

from . import model_card
from .value_head import VALUE_HEAD_FILE


def merge_adapter(trainer: Any, used_datasets: list[str]) -> None:
    """Merge the saved adapter into its base model and save (and push) the result; on one process only.

    The base is loaded anew, unquantized, in the dtype of the run (`--dtype`): merging into quantized weights would
    round the update away, and the trainer's own model may be sharded.
    """
    args = trainer.args
    # DeepSpeed ZeRO-3 would shard every model that is loaded while its configuration is set, with all processes.
    unset_hf_deepspeed_config()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    # FSDP puts a class of its own in front of the model's.
    model_class: Any = next(c for c in type(trained.get_base_model()).__mro__ if not c.__module__.startswith("torch."))
    settings = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if trained.active_peft_config.task_type == "SEQ_CLS":  # a reward model; its base may be a language model
        settings["num_labels"] = trained.config.num_labels
    base = model_class.from_pretrained(trained.active_peft_config.base_model_name_or_path, **settings)
    merged = PeftModel.from_pretrained(base, args.output_dir).merge_and_unload()
    merged.generation_config = getattr(trained, "generation_config", None)
    # A trained copy of tied embeddings (`--lora_modules_to_save embed_tokens`) unties them; reloading has to know.
    # PEFT sees to it itself from some version on.
    head = merged.get_output_embeddings()
    if head is not None and head.weight is not merged.get_input_embeddings().weight:
        merged.config.get_text_config().tie_word_embeddings = False

    target = model_card.merged_name(os.path.normpath(args.output_dir))
    merged.save_pretrained(target)
    value_head = os.path.join(args.output_dir, VALUE_HEAD_FILE)
    if os.path.isfile(value_head):
        shutil.copy(value_head, target)
    trainer.processing_class.save_pretrained(target)
    model_card.write(trainer, None, used_datasets, None, merged_dir=target)
    trainer.accelerator.print(f"Merged model saved to {target}")
    if args.push_to_hub:
        api, repo = HfApi(token=args.hub_token), model_card.merged_name(trainer.hub_model_id)
        api.create_repo(repo, private=args.hub_private_repo, exist_ok=True)
        revision = getattr(args, "hub_revision", None)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=target, revision=revision, commit_message="Merged model")
        trainer.accelerator.print(f"Merged model pushed to {repo}")
