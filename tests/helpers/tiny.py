"""Tiny random mixture-of-experts models, built from their configurations in milliseconds, and ways to look at them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # ten times the default: else so small a model would hardly notice its experts
}


def tiny_qwen3_moe(dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> PreTrainedModel:
    """Two sparse layers of eight experts; the same weights whenever it is called."""
    torch.manual_seed(7)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | overrides)).to(dtype).eval()


def tiny_qwen3_next(dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Likewise, with a shared expert in each block and one layer of linear, one of full attention."""
    torch.manual_seed(7)
    config = Qwen3NextConfig(
        **SIZES,
        layer_types=["linear_attention", "full_attention"],
        shared_expert_intermediate_size=32,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    return Qwen3NextForCausalLM(config).to(dtype).eval()


def prompt(batch: int = 2, length: int = 12, seed: int = 3) -> Tensor:
    """Random token ids, the same for the same seed."""
    return torch.randint(0, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """Logits of one forward over the prompt."""
    with torch.no_grad():
        return model(prompt() if ids is None else ids).logits


def steps(
    model: nn.Module, first: int, last: int, mask: Tensor | None = None, cache: Any = None, count: int = 1
) -> Tensor:
    """Logits of the first tokens of a prompt, and of those up to the last that follow, so many at a time."""
    ids, found = prompt(length=last), []
    with torch.no_grad():
        start = 0
        for end in (first, *range(first + count, last + 1, count)):
            seen = None if mask is None else mask[:, :end]
            output = model(ids[:, start:end], attention_mask=seen, use_cache=True, past_key_values=cache)
            cache, start = output.past_key_values, end
            found.append(output.logits)
    return torch.cat(found, 1)


def generated(model: nn.Module, new_tokens: int = 4) -> list[list[int]]:
    """What `model` writes greedily after the prompt."""
    return model.generate(prompt(), max_new_tokens=new_tokens, do_sample=False).tolist()


def sparse_blocks(model: nn.Module) -> list[nn.Module]:
    """The sparse block of each layer."""
    return [layer.mlp for layer in model.model.layers]


def anatomy(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """All that a patch might change: class, attributes and hooks of every module, the very bits of every tensor."""
    parts: dict[str, tuple[Any, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = [len(hooks) for key, hooks in sorted(vars(module).items()) if key.endswith("hooks")]
        parts[f"module {name}"] = (type(module), set(vars(module)), hooks, module.training)
        tensors = {key: t for key, t in (module._parameters | module._buffers).items() if t is not None}
        parts[f"order {name}"] = tuple(tensors)
        for key, t in tensors.items():
            bits = None if t.is_meta else t.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
            parts[f"tensor {name}.{key}"] = (id(t), type(t), t.dtype, t.device, t.shape, t.requires_grad, bits)
    parts["quantizer"] = (getattr(model, "hf_quantizer", None),)
    return parts


def steer(model: nn.Module, routes: Any, weight: float = 0.5) -> None:
    """Route token t of layer l to experts `routes[l][t % len(routes[l])]`, each with `weight`; None lets go again."""
    for layer, block in enumerate(sparse_blocks(model)):
        for handle in block.__dict__.pop("_steering", []):
            handle.remove()
        if routes is None:
            continue
        choices = torch.as_tensor(routes[layer])

        def choose(router: nn.Module, args: Any, output: Any, choices: Tensor = choices) -> Any:
            logits, weights, chosen = output
            return logits, torch.full_like(weights, weight), choices[torch.arange(len(chosen)) % len(choices)]

        block.__dict__["_steering"] = [block.gate.register_forward_hook(choose)]


def cold_routes(model: nn.Module) -> list[list[list[int]]]:
    """Routes to two experts of each layer that hold no upgrade."""
    tiers = model.dynaexq.tiers()
    return [[np.flatnonzero(row == tiers.min())[:2].tolist()] for row in tiers]
