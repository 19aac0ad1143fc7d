"""What differs between the versions of Transformers that are supported. Everything is detected, nothing is pinned."""

from importlib import import_module
from typing import Any

from torch import nn

CAPTURING = "transformers.utils.output_capturing"
"""The module of the hooks behind `output_router_logits`, in versions that have them."""
try:
    _COLLECTOR: Any = import_module(CAPTURING)._active_collector
except (ImportError, AttributeError):
    _COLLECTOR = None


def install_output_capturing(model: nn.Module) -> None:
    """Install the hooks behind `output_router_logits` now: done lazily, they take a lock that cannot be compiled."""
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:
        return
    from transformers import PreTrainedModel

    for module in model.modules():
        # Installing on a parent installs on its children again, and every output would be recorded twice.
        if isinstance(module, PreTrainedModel) and not any(map(_captures, module.modules())):
            maybe_install_capturing_hooks(module)


def _captures(module: nn.Module) -> bool:
    return getattr(module, "_output_capturing_hooks_installed", False)


def captures_outputs() -> bool:
    """Whether the forward at work collects outputs of modules inside the model, by those hooks."""
    return bool(_COLLECTOR is not None and _COLLECTOR.get())


def is_capturing_hook(hook: Any) -> bool:
    """Whether it is one of them, which do nothing while nothing is collected."""
    return getattr(hook, "__module__", None) == CAPTURING


def take_loading_attributes(config_class: type) -> None:
    """Let a configuration given to `from_pretrained` override options stored in a checkpoint."""
    from transformers.quantizers import auto

    if config_class not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (config_class,)


def has_parallel_plans() -> bool:
    """Whether a quantizer is shown the parallel plans of the model at hand, and may edit them."""
    from transformers.quantizers.base import HfQuantizer

    return hasattr(HfQuantizer, "update_parallel_plan")


def is_distributed(model: nn.Module) -> bool:
    """Whether Transformers has spread the model over ranks."""
    return getattr(model, "_device_mesh", None) is not None


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model inside `model`, or None where there is none."""
    config = getattr(model, "config", None)
    return config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config


EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")
"""What configurations call it, by family."""


def experts_per_token(model: nn.Module) -> int | None:
    """Experts that each layer of `model` routes a token to; None where its configuration has another name for it."""
    config = text_config(model)
    found = next((value for name in EXPERTS_PER_TOKEN if (value := getattr(config, name, None))), None)
    return found if isinstance(found, int) else None


def returned_cache(output: Any) -> Any:
    """The cache in what a model returned, or None: `cache` of late, `past_key_values` before."""
    return output["cache"] if "cache" in output else output.get("past_key_values")
