"""Which layers have a sliding window: the ways in which configurations say so."""

from collections.abc import Sequence
from typing import Any

from jaxneurons.convert.family import Shape
from jaxneurons.convert.keys import Keys
from jaxneurons.model.config import ModelConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def window_fields(window: int | None, sliding: Sequence[bool]) -> dict[str, Any]:
    """The fields of `ModelConfig` that say which layers have the window."""
    if window is None or not any(sliding):
        return {"sliding_window": None, "sliding_layers": None}
    return {"sliding_window": window, "sliding_layers": None if all(sliding) else tuple(sliding)}


def no_window(keys: Keys, shape: Shape, *, model_type: str) -> dict[str, Any]:
    """Models without a window; a stated one must be switched off."""
    window = keys.integer("sliding_window")
    keys.integer("max_window_layers")  # of layers without a window: there are only such
    if window is not None and keys.left.get("use_sliding_window") is not False:
        raise keys.error(
            "sliding_window", window, f"model_type {model_type!r} has no sliding window"
        )
    _check_types(keys, None, [FULL] * shape.layers, model_type)
    return window_fields(None, ())


def one_window(
    keys: Keys, shape: Shape, *, model_type: str, default: int | None = None
) -> dict[str, Any]:
    """Models whose layers all have the window, if there is one."""
    window = keys.integer("sliding_window", default)
    keys.integer("max_window_layers")
    kind = FULL if window is None else SLIDING
    _check_types(keys, window, [kind] * shape.layers, model_type)
    return window_fields(window, [window is not None] * shape.layers)


def switched_window(
    keys: Keys, shape: Shape, *, model_type: str, default: int | None, sliding: Sequence[bool]
) -> dict[str, Any]:
    """Models with a switch, `use_sliding_window`, and a list of layers that have the window.

    Args:
      keys: of the configuration.
      shape: of the model.
      model_type: for messages.
      default: the window, where it is not stated.
      sliding: the layers that have it, where no list says so.
    """
    window = keys.integer("sliding_window", default)
    if not keys.boolean("use_sliding_window", False):
        window = None
    expected = [SLIDING if window is not None and slides else FULL for slides in sliding]
    # The list decides where there is a window; the other keys only fill it in.
    if window is not None:
        expected = _types(keys, shape.layers) or expected
    _check_types(keys, window, expected, model_type)
    return window_fields(window, [kind == SLIDING for kind in expected])


def late_window(
    keys: Keys, shape: Shape, *, model_type: str, default: int, first: int
) -> dict[str, Any]:
    """Models (of Qwen) with a switch, whose layers from `max_window_layers` on have the window."""
    full = keys.integer("max_window_layers", first)
    full = keys.need("max_window_layers", full)
    sliding = [layer >= full for layer in range(shape.layers)]
    return switched_window(keys, shape, model_type=model_type, default=default, sliding=sliding)


def periodic_window(
    keys: Keys, shape: Shape, *, default: int, period: int, stated: str | None = None
) -> dict[str, Any]:
    """Models (of Gemma) of which every so many layers one is without the window.

    Args:
      keys: of the configuration.
      shape: of the model.
      default: the window, where it is not stated.
      period: one layer of so many is full, the last of them.
      stated: a key that may state the period.
    """
    window = keys.integer("sliding_window", default)
    layers = None if stated is None else keys.integer(stated)
    if stated is not None and layers is not None:
        if layers <= 0:
            raise keys.error(stated, layers, "a positive number of layers is needed")
        period = layers
    repeated = [bool((layer + 1) % period) for layer in range(shape.layers)]
    expected = [SLIDING if slides else FULL for slides in repeated]
    types = _types(keys, shape.layers) or expected
    if stated is not None and layers is not None and types != expected:
        raise keys.error(stated, layers, "contradicts layer_types")
    keys.left.pop("layer_types", None)
    if window is None and SLIDING in types:
        raise keys.error("sliding_window", window, "layer_types says that layers have a window")
    return window_fields(window, [kind == SLIDING for kind in types])


def types_of(config: ModelConfig) -> list[str]:
    """`layer_types` of a model."""
    windowed = config.sliding_layers or (config.sliding_window is not None,) * config.num_layers
    return [SLIDING if slides else FULL for slides in windowed]


def _types(keys: Keys, layers: int) -> list[str] | None:
    """`layer_types`, which stays, if it is a list of those that are known."""
    types = keys.left.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != layers:
        raise keys.error("layer_types", types, f"a list of {layers} entries is needed")
    if any(kind not in (FULL, SLIDING) for kind in types):
        known = f"only {FULL!r} and {SLIDING!r} are supported"
        raise keys.error("layer_types", sorted(set(map(str, types))), known)
    return types


def _check_types(keys: Keys, window: int | None, expected: list[str], model_type: str) -> None:
    """Consume `layer_types`, which must say what follows from the other keys."""
    types = keys.left.get("layer_types")
    if isinstance(types, list) and len(types) == len(expected) and types != expected:
        raise keys.error(
            "layer_types",
            sorted(set(map(str, types))),
            f"sliding_window = {window} of model_type {model_type!r} goes with {expected[0]!r}"
            + ("" if len(set(expected)) > 1 else " in every layer"),
        )
    _types(keys, len(expected))
    keys.left.pop("layer_types", None)
