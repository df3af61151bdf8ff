"""Attribution, neurons changed on prompts that have been run, ablation, expertise of neurons."""

from jaxneurons.engine.ablation import Shape, ablated, default_shape, generate_ablated
from jaxneurons.engine.attribution import Attribution, attribute, integrated_gradients
from jaxneurons.engine.experts import Examples, Expertise, average_precision, expertise
from jaxneurons.engine.likelihood import sentence_loss, token_loss
from jaxneurons.engine.out_of_memory import SmallerChunkWarning
from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.engine.readout import words, written_directions
from jaxneurons.engine.responses import ResponseStore, mean_responses
from jaxneurons.engine.row_memory import memory_bound
from jaxneurons.engine.rows import prefill
from jaxneurons.engine.texts import Generations, ablate, generate

__all__ = [
    "Attribution",
    "Examples",
    "Expertise",
    "Generations",
    "Quadrature",
    "ResponseStore",
    "Shape",
    "SmallerChunkWarning",
    "ablate",
    "ablated",
    "attribute",
    "average_precision",
    "default_shape",
    "expertise",
    "generate",
    "generate_ablated",
    "integrated_gradients",
    "mean_responses",
    "memory_bound",
    "prefill",
    "sentence_loss",
    "token_loss",
    "words",
    "written_directions",
]
