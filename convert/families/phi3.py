"""Phi-3, Phi-3.5-mini, Phi-4 and Phi-4-mini: fused projections, LongRoPE, partial rotation."""

from typing import Any

from jaxneurons.convert.family import Family, Fused, GGUFForm, Shape
from jaxneurons.convert.hf_rope import RopeRules, longrope_attention_factor, read_rope
from jaxneurons.convert.hf_rope_out import rope_scaling
from jaxneurons.convert.keys import Keys
from jaxneurons.convert.windows import one_window
from jaxneurons.model.config import ModelConfig

_ORIGINAL = 4096
_FIXED = {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}
"""Keys of the first configurations, which transformers' own class knows no more."""
_PUBLISHED_CODE = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    "AutoTokenizer": "Xenova/gpt-4o",
}
"""The code that came with the published models before transformers had the family."""
_QKV = ("layers.attn.q", "layers.attn.k", "layers.attn.v")
_GATE_UP = ("layers.ffn.gate", "layers.ffn.up")


def _read(keys: Keys, shape: Shape) -> dict[str, Any]:
    for key, value in _FIXED.items():
        stated = keys.left.pop(key, value)
        if stated != value or isinstance(stated, bool) != isinstance(value, bool):
            raise keys.error(key, stated, f"only {value!r} is supported")
    code = keys.left.get("auto_map")
    if isinstance(code, dict) and all(_PUBLISHED_CODE.get(k) == code[k] for k in code):
        del keys.left["auto_map"]
    rules = RopeRules(
        kinds=("default", "longrope"),
        also_called=(("su", "longrope"),),
        original=_ORIGINAL,
        head_dim=shape.head_dim,
    )
    fields = one_window(keys, shape, model_type="phi3")
    return {**fields, "rope": read_rope(keys, shape.max_position, rules)}


def _write(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    values: dict[str, Any] = {
        "sliding_window": config.sliding_window,
        "partial_rotary_factor": (rope.dim or config.head_dim) / config.head_dim,
        "original_max_position_embeddings": config.max_position,
    }
    if rope.rope_type == "longrope":
        original = rope.original_max_position
        scaling = rope_scaling(config) or {}
        scaling["type"] = scaling.pop("rope_type")  # transformers 4 wants three keys
        del scaling["original_max_position_embeddings"]
        usual = longrope_attention_factor(config.max_position, original)
        if abs(rope.attention_factor - usual) < 1e-6 * usual:
            del scaling["attention_factor"]
        values["original_max_position_embeddings"] = original
        values["rope_scaling"] = scaling
    return values


def _read_gguf(keys: Keys, shape: Shape) -> dict[str, Any]:
    window = keys.integer("attention.sliding_window")
    if window is None and shape.layers in (32, 40) and shape.max_position == 4096:
        window = 2047  # files of July 2024 and before do not say so
    return {"sliding_window": window or None}


PHI3 = Family(
    name="phi3",
    model_class="Phi3ForCausalLM",
    defaults={
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    read=_read,
    write=_write,
    fused=(
        Fused("model.layers.{i}.self_attn.qkv_proj.weight", _QKV),
        Fused("model.layers.{i}.mlp.gate_up_proj.weight", _GATE_UP),
    ),
    gguf=GGUFForm(
        "phi3",
        _read_gguf,
        fused=(
            Fused("blk.{i}.attn_qkv.weight", _QKV),
            Fused("blk.{i}.ffn_up.weight", _GATE_UP),
        ),
        longrope=True,
    ),
)
