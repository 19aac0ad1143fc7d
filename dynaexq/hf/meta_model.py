"""A model on the meta device, from its configuration alone: every shape and dtype, and not a byte of weights.

No weights are looked for, and no code that a checkpoint may bring with it is run.
"""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dynaexq.errors import CheckpointError, UnsupportedModelError


def meta_model(source: Path) -> Any:
    """The model of a 16-bit checkpoint directory.

    Raises:
        CheckpointError: there is no configuration, or the checkpoint is quantized already.
        UnsupportedModelError: no model can be built from it.
    """
    if not (source / "config.json").is_file():
        raise CheckpointError(f"expected a checkpoint directory with a config.json, found none in {source}")
    config = read_config(source)
    method = quantization_method(config)
    if method is not None:
        raise CheckpointError(
            f"{source} is quantized already (quant_method={method!r}), and its packing cannot be taken over exactly; "
            "give the 16-bit checkpoint it was made from"
        )
    return build_meta_model(config)


def read_config(source: Path) -> Any:
    """The configuration at `source`: a directory, a config.json, or the name of a repository on the Hub.

    Raises:
        CheckpointError: it is missing, or Transformers cannot read it.
    """
    is_repository = len(source.parts) <= 2 and not source.is_absolute() and source.suffix != ".json"
    if not source.exists() and not is_repository:
        raise CheckpointError(f"expected a checkpoint directory or a config.json, found nothing at {source}")
    if source.is_dir() and not (source / "config.json").is_file():
        raise CheckpointError(f"expected a checkpoint directory with a config.json, found none in {source}")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever the configuration of whatever family makes of what is written there
        raise CheckpointError(f"cannot read the configuration of {source}: {_first_line(error)}") from error


def quantization_method(config: Any) -> str | None:
    """The quantization method of the weights that belong to `config`, or None."""
    quantized = getattr(config, "quantization_config", None)
    if quantized is None:
        return None
    return str(quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method)


def build_meta_model(config: Any) -> Any:
    """The model that `config` describes, ready to infer.

    Raises:
        UnsupportedModelError: Transformers cannot build it.
    """
    name = (config.architectures or [""])[0]
    model_class = getattr(transformers, name, None)
    dtype = config.dtype or torch.bfloat16
    try:
        with torch.device("meta"):
            if model_class is None:
                return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            return model_class._from_config(config, dtype=dtype).eval()
    except Exception as error:  # as above
        raise UnsupportedModelError(
            f"cannot build a {name or config.model_type} from its configuration: {_first_line(error)}"
        ) from error


def meta_twin(model: PreTrainedModel) -> Any:
    """A twin of a model that is loaded already; the model is left alone."""
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype).eval()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
