"""Configurations of published models, which are all that planning needs of them."""

from pathlib import Path

from transformers import PreTrainedConfig, Qwen3MoeConfig, Qwen3NextConfig

QWEN3_30B = Qwen3MoeConfig(
    architectures=["Qwen3MoeForCausalLM"],
    dtype="bfloat16",
    vocab_size=151936,
    hidden_size=2048,
    num_hidden_layers=48,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
)
QWEN3_NEXT_80B = Qwen3NextConfig(
    architectures=["Qwen3NextForCausalLM"],
    dtype="bfloat16",
    vocab_size=151936,
    hidden_size=2048,
    num_hidden_layers=48,
    num_experts=512,
    num_experts_per_tok=10,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=256,
)


def saved(config: PreTrainedConfig, directory: Path) -> Path:
    """A directory with a config.json and nothing else."""
    config.save_pretrained(directory)
    return directory
