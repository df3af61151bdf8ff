"""Low-rank patches as an adapter directory of PEFT, which transformers and vLLM put on the base.

LoRA's `B A` of a projection [out, in] is `(left right)^T` of our kernel [in, out]: `A = left^T`,
`B = right^T`, scaled by `lora_alpha / r = 1` (Hu et al. 2021, arXiv 2106.09685).
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.checkpoints.provenance import PATCHES
from jaxneurons.checkpoints.saving import check_free, published
from jaxneurons.convert.rules import fused_tensors, tensor_name
from jaxneurons.convert.safetensors_file import ToWrite, write_safetensors
from jaxneurons.edit.applying import apply_patches
from jaxneurons.edit.changes import LowRank, Multipliers, Rows, kernel_path
from jaxneurons.edit.patch import Patch
from jaxneurons.errors import DataError
from jaxneurons.storage.settings import as_path, check_argument
from jaxneurons.storage.store import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KINDS = {Rows: "rows that are set", Multipliers: "neurons that are multiplied"}
_PREFIX = "base_model.model."
"""Before the names of a wrapped model's modules."""
_HUB = re.compile(r"[\w.-]+/[\w.-]+@\w+")
"""What `load` calls a model of the hub: `org/name@revision`."""


def write_adapter(
    lm: LM,
    patches: Sequence[Patch] | Patch,
    directory: str | os.PathLike[str],
    *,
    base_model: str | None = None,
) -> Path:
    """Write low-rank patches as a LoRA adapter: `PeftModel.from_pretrained(base, directory)`.

    Terms of one kernel are joined, and all are filled up with zeros to the largest rank, since some
    readers know one rank only.

    Args:
      lm: the base, as it was loaded.
      patches: one, or several, of low-rank changes only.
      directory: must not exist yet, or be empty.
      base_model: what transformers loads the base by, for the adapter's configuration; default:
        `lm.source`.

    Returns:
      The directory.

    Raises:
      DataError: patches of another model, of other changes, or none.
      SourceError: the directory is not empty or cannot be written.
    """
    check_argument("lm", LM, lm)
    check_argument("base_model", str | None, base_model)
    target = as_path("directory", directory)
    patches = [patches] if isinstance(patches, Patch) else list(patches)
    if lm.changed:
        raise DataError(
            f"{lm.source} is edited in memory, an adapter goes on the base's files: give the model "
            "as it was loaded, or export the edited one as a model (save(..., to='hf'), --to hf)"
        )
    edited = apply_patches(lm, patches)  # which refuses what is not for this model
    terms = _terms(patches)
    _check_apart(lm, terms)
    rank = max(sum(term.left.shape[1] for term in of_kernel) for of_kernel in terms.values())
    tensors: dict[str, ToWrite] = {}
    for (module, layer), of_kernel in sorted(terms.items()):
        name = _PREFIX + _module_name(module, layer)
        tensors[f"{name}.lora_A.weight"] = _filled([term.left.T for term in of_kernel], rank, 0)
        tensors[f"{name}.lora_B.weight"] = _filled([term.right.T for term in of_kernel], rank, 1)
    check_free(target)
    with published(target) as partial:
        write_safetensors(partial / WEIGHTS, tensors)
        write_json(partial / CONFIG, _config(list(terms), rank, base_model or lm.source))
        write_json(partial / PATCHES, edited.patch_facts())
    return target


def _terms(patches: Sequence[Patch]) -> dict[tuple[str, int], list[LowRank]]:
    """Low-rank changes by module and layer."""
    terms: dict[tuple[str, int], list[LowRank]] = {}
    for patch in patches:
        for change in patch.changes:
            if not isinstance(change, LowRank):
                raise DataError(
                    f"{patch.name} holds {_KINDS[type(change)]}, and an adapter holds low-rank "
                    "terms only, as ROME, MEMIT and AlphaEdit make them: export the edited "
                    "model (save(..., to='hf'), --to hf)"
                )
            terms.setdefault((change.module, change.layer), []).append(change)
    if not terms:
        raise DataError("no patches: an adapter of nothing")
    return terms


def _check_apart(lm: LM, kernels: Iterable[tuple[str, int]]) -> None:
    """Refuse kernels that transformers keeps with others in one tensor: it has no such module."""
    inside = {
        part: whole for whole, parts in fused_tensors(lm.config, "hf").items() for part in parts
    }
    for kernel in kernels:
        if lm.config.experts and kernel[0].startswith("ffn."):
            raise DataError(
                f"{kernel[0]} is a part of {lm.source}'s experts, which adapters know no module "
                "for: export the edited model (save(..., to='hf'), --to hf)"
            )
        name = f"{_module_name(*kernel)}.weight"
        if name in inside:
            raise DataError(
                f"{lm.source} keeps {name} in {inside[name]}, with others, and an adapter adds to "
                "whole tensors: export the edited model (save(..., to='hf'), --to hf)"
            )


def _filled(parts: Sequence[Any], rank: int, axis: int) -> ToWrite:
    """Parts one after the other along the axis of ranks, and zeros behind them."""
    joined = np.concatenate([np.asarray(part, np.float32) for part in parts], axis=axis)
    padding = [(0, 0), (0, 0)]
    padding[axis] = (0, rank - joined.shape[axis])
    values = np.pad(joined, padding)
    return ToWrite(values.dtype, values.shape, lambda: (values,))


def _module_name(module: str, layer: int) -> str:
    """What transformers calls it: "model.layers.5.mlp.down_proj"."""
    return tensor_name(kernel_path(module), "hf").format(i=layer).removesuffix(".weight")


def _config(kernels: Sequence[tuple[str, int]], rank: int, base_model: str) -> Mapping[str, Any]:
    """`adapter_config.json`: which modules of which layers, and how the terms are scaled."""
    name, _, revision = (
        base_model.partition("@") if _HUB.fullmatch(base_model) else (base_model, "", "")
    )
    modules = sorted({module for module, _ in kernels})
    layers = sorted({layer for _, layer in kernels})
    if len(kernels) == len(modules) * len(layers):
        targets = [_module_name(module, 0).rsplit(".", 1)[1] for module in modules]
        of_layers: list[int] | None = layers
    else:  # other modules in other layers: each by its whole name
        targets, of_layers = [_module_name(*kernel) for kernel in sorted(kernels)], None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "layers_to_transform": of_layers,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
