"""Fine-tuning a patched model by the trainers that people use: adapters learn, are kept, and go on after a stop."""

from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

import dynaexq

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STEPS, ROWS = 8, 4


def patched() -> PreTrainedModel:
    model = tiny.tiny_qwen3_moe(torch.float32)
    dynaexq.patch(model, "1GiB", tiers=("int4", "int8"))
    return model


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in tiny.prompt(batch=ROWS)]


def options(directory: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": ROWS,
        "gradient_checkpointing": True,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": 3,
    } | more


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_trains_an_adapter_with_checkpointing_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def trainer(steps: int) -> Trainer:
        torch.manual_seed(3)
        model = peft.get_peft_model(patched(), lora())
        arguments = TrainingArguments(**options(tmp_path / "out", max_steps=steps))
        return Trainer(model=model, args=arguments, train_dataset=rows())

    whole = trainer(STEPS)
    runtime = whole.model.get_base_model().dynaexq
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    tokens = STEPS * tiny.prompt(batch=ROWS).numel()
    assert tokens / 2 < runtime.stats()["tokens"] <= tokens, "what is recomputed is not counted again"
    rest = trainer(STEPS)
    rest.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{STEPS // 2}"))
    assert losses(rest) == pytest.approx(losses(whole), rel=1e-4)
    plain = tiny.tiny_qwen3_moe(torch.float32)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "out" / f"checkpoint-{STEPS}").eval()
    assert not torch.equal(tiny.logits(adapted), tiny.logits(tiny.tiny_qwen3_moe(torch.float32)))


def test_dense_weights_are_trained_where_patched_and_need_an_adapter_where_loaded(tmp_path: Path) -> None:
    model = patched()
    trainer = Trainer(model=model, args=TrainingArguments(**options(tmp_path / "out")), train_dataset=rows())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    loaded = type(model).from_pretrained(tmp_path / "out" / f"checkpoint-{STEPS}")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model.eval()))
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(model=loaded, args=TrainingArguments(**options(tmp_path / "out")), train_dataset=rows())


def test_sft_trainer_trains_an_adapter_on_a_loaded_model(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "examples" / "tiny-moe")
    tiny.tiny_qwen3_moe(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    model = type(tiny.tiny_qwen3_moe()).from_pretrained(
        tmp_path / "model", quantization_config=dynaexq.DynaExqConfig(tiers=("int4", "int8"), hbm_budget="1GiB")
    )
    data = datasets.Dataset.from_dict({"text": ["The hotter an expert, the finer its weights. " * 3] * ROWS})
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**options(tmp_path / "out"), dataset_text_field="text", max_length=32),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora(),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert model.dynaexq.memory()["total"] <= 2**30
    assert model.dynaexq.stats()["tokens"] > 0
