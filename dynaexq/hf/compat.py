"""What differs between the versions of Transformers that are supported. Everything is detected, nothing is pinned."""

from typing import Any

from torch import nn


def install_output_capturing(model: nn.Module) -> None:
    """Install the hooks behind `output_router_logits` now: Transformers does it lazily, under a lock that cannot compile."""
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:
        return
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            maybe_install_capturing_hooks(module)


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model inside `model`, or None where there is none."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
