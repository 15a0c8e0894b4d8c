"""Engines on a CPU, and runs of KTO and DPO for `every_engine.py`."""

import contextlib
import copy
import functools
import os

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import cpu_config, paired_rows, perturbed, unpaired_rows, weights
from datasets import load_from_disk
from peft import LoraConfig
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from halos_trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, toy
from halos_trl.sharded import parameters_by_name, whole

EXAMPLES_PER_STEP = 8
STEPS = 3


def settings_of_engine(engine, reshard=True):
    """What a config says about the engine; `reshard`: whether FSDP2 gives shards back after a forward pass."""
    if engine == "zero":
        return {"use_cpu": False, "ddp_backend": "gloo"}
    if engine == "fsdp2":
        layers = ["LlamaDecoderLayer"]
        config = {"version": 2, "transformer_layer_cls_to_wrap": layers, "reshard_after_forward": reshard}
        return {"fsdp": True, "fsdp_config": config}
    return {}


def assert_engine(trainer, engine):
    """The requested engine is in use, and not silently another one."""
    assert isinstance(trainer.model_wrapped, FSDPModule) == (engine == "fsdp2")
    assert trainer.is_deepspeed_enabled == (engine == "zero")


def make_fsdp2_real():
    """On a CPU accelerate runs DDP where FSDP2 was asked for, without a word. Make it do what it was asked for."""
    original = AcceleratorState.__init__

    @functools.wraps(original)
    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


class CompareReference(TrainerCallback):
    """Checks that after step t the reference holds the policy as it was before step t, bit for bit."""

    def __init__(self):
        self.checked = 0
        self.before = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = self.policy(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        after = self.policy(model)
        assert any(not torch.equal(self.before[k], after[k]) for k in after), "the policy did not move"
        reference = self.trainer.reference.tensors(self.trainer.model)
        assert len(reference) == len(self.before)
        for name, tensor in reference.items():
            assert torch.equal(whole(tensor), self.before[name.replace(".ref.", ".default.")]), name
        self.checked += 1

    def policy(self, model):
        parameters = parameters_by_name(self.trainer.accelerator.unwrap_model(model))
        return {k: whole(v).clone() for k, v in parameters.items() if not self.lora or ".default." in k}


@contextlib.contextmanager
def layer_by_layer(engine, model):
    """Nothing that runs inside gathers more of what ZeRO-3 has split than a layer of policy and reference."""
    if engine != "zero":
        yield
        return
    import deepspeed

    class Counted(deepspeed.zero.GatheredParameters):
        open, most = 0, 0

        def __init__(self, params, *args, **kwargs):
            self.size = sum(getattr(p, "ds_numel", 0) for p in params)
            super().__init__(params, *args, **kwargs)

        def __enter__(self):
            Counted.open += self.size
            Counted.most = max(Counted.most, Counted.open)
            return super().__enter__()

        def __exit__(self, *error):
            Counted.open -= self.size
            return super().__exit__(*error)

    original, deepspeed.zero.GatheredParameters = deepspeed.zero.GatheredParameters, Counted
    try:
        yield
    finally:
        deepspeed.zero.GatheredParameters = original
    sizes = [sum(p.numel() for p in module.parameters()) for module in (*model.model.layers, model.lm_head)]
    assert Counted.most <= 2 * max(sizes) < sum(p.numel() for p in model.parameters())


def run_one(
    trainer_class,
    config_class,
    data,
    out,
    *,
    ref=True,
    per_device=None,
    lora=False,
    engine=None,
    reshard=True,
    **settings,
):
    tokenizer = toy.build_tokenizer()
    model = toy.tiny_model(tokenizer)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    per_device = per_device or EXAMPLES_PER_STEP // processes
    args = cpu_config(
        config_class,
        out / "runs",
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=EXAMPLES_PER_STEP // processes,
        gradient_accumulation_steps=EXAMPLES_PER_STEP // (per_device * processes),
        **settings_of_engine(engine, reshard),
        **settings,
    )
    compare = CompareReference()
    trainer = trainer_class(
        copy.deepcopy(model),
        perturbed(model) if ref else None,
        args,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[compare] if settings.get("humanline") else None,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None,
    )
    compare.trainer, compare.lora = trainer, lora
    with layer_by_layer(engine, model):
        trainer.train()
    assert trainer.accelerator.num_processes == args.world_size
    assert_engine(trainer, engine)
    assert trainer.ref_model is None or isinstance(trainer.ref_model, FSDPModule) == (engine == "fsdp2")
    if settings.get("humanline"):
        assert compare.checked == STEPS
    logs = [{k: v for k, v in e.items() if "runtime" not in k} for e in trainer.state.log_history if "loss" in e]
    if trainer_class is KTOTrainer or not trainer.uses_trl_loss:
        # 11 rows: the last batch of two processes is filled up with repetitions.
        rows = unpaired_rows if trainer_class is KTOTrainer else paired_rows
        logs.append(timeless(trainer.evaluate(on_disk(rows(11, seed=1), out / f"evaluated {rows.__name__}"))))
    return {"weights": weights(trainer.model), "logs": logs, "processes": trainer.accelerator.num_processes}


def timeless(metrics):
    return {name: value for name, value in metrics.items() if not name.endswith(("runtime", "_per_second", "_time"))}


def on_disk(data, folder):
    """Processes share what is precomputed through the data set's cache folder."""
    with PartialState().main_process_first():
        if not folder.exists():
            data.save_to_disk(folder)
    return load_from_disk(folder)


def runs(out, engine):
    """How the runs ended, by name. OUT holds saved `rows`."""
    run = functools.partial(run_one, engine=engine)
    kto = (KTOTrainer, KTOConfig, unpaired_rows(24), out)
    dpo = (DPOTrainer, DPOConfig, paired_rows(24), out)
    return {
        "kto, accumulated": run(*kto, beta=0.5, per_device=2),
        "kto, streamed": run(KTOTrainer, KTOConfig, unpaired_rows(24).to_iterable_dataset(), out, beta=0.5),
        "kto, humanline": run(*kto, beta=0.5, ref=False, humanline=True),
        # From disk: processes share what is precomputed through the data set's cache folder.
        "kto, precomputed": run(
            KTOTrainer, KTOConfig, load_from_disk(out / "rows"), out, beta=0.5, precompute_ref_log_probs=True
        ),
        "dpo, robust": run(*dpo, beta=0.5, loss_type="robust", label_smoothing=0.1),
        "dpo, humanline, lora": run(*dpo, beta=0.5, ref=False, humanline=True, lora=True),
        # FSDP2 leaves the reference whole after a forward pass; DDP takes no notice.
        "dpo, humanline, never resharded": run(*dpo, beta=0.5, ref=False, humanline=True, reshard=False),
    }
