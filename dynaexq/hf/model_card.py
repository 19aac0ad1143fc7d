"""The card of a packed checkpoint: what it is, what it was made from, how it is loaded. It only writes words."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dynaexq.hf.config import DynaExqConfig

CARD = "README.md"
_MADE_BY = "packed by [dynaexq](https://github.com/dynaexq/dynaexq)"

_TEXT = """\
---
{data}
---

# {name}

{architecture}{origin}, its experts {made_by} {version} at {tiers} ({quantizer}, groups of {group_size} weights).{mix}

```bash
pip install dynaexq
```

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{place}")
print(model.dynaexq.report())
```

With dynaexq installed it loads in any program, `transformers serve` and `lm_eval` among them. For another budget, pass
`quantization_config=dynaexq.DynaExqConfig(hbm_budget="20GiB")`; for other tiers that its planes allow, give `tiers`.
"""


def model_card(
    architecture: str, source: str | None, config: DynaExqConfig, place: str | None, tags: Iterable[str] = ()
) -> ModelCard:
    """The card of a checkpoint of `architecture`.

    Args:
        source: what the model was loaded from; named if it is a repository.
        config: as the checkpoint keeps it.
        place: the repository that it is for, where that is known.
    """
    from dynaexq import __version__  # the package imports this module, by way of others

    packed: dict[str, Any] = config.packed or {}
    tiers = packed["tiers"]
    repository = source if source and source.count("/") == 1 and not Path(source).exists() else None
    data = ModelCardData(
        library_name="transformers", base_model=repository, tags=["dynaexq", "mixture-of-experts", *tags]
    )
    mix = f" Every expert has its {tiers[0]} base; which ones are read at {tiers[-1]} follows the traffic."
    codes = f" (quantized by {packed['made_from']} before)" if "made_from" in packed else ""
    text = _TEXT.format(
        data=data.to_yaml(),
        name=place.rpartition("/")[2] if place else f"{architecture} at {' + '.join(tiers)}",
        architecture=architecture,
        origin=(f" from `{repository}`" if repository else "") + codes,
        made_by=_MADE_BY,
        version=__version__,
        tiers=" + ".join(tiers),
        quantizer=packed["quantizer"],
        group_size=packed["group_size"],
        mix=mix if len(tiers) > 1 else "",
        place=place or "this/directory",
    )
    return ModelCard(text)


def may_be_written(directory: Path) -> bool:
    """Whether `directory` has no card, or one that this wrote."""
    card = directory / CARD
    return not card.exists() or _MADE_BY in card.read_text(errors="replace")
