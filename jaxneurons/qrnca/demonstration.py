"""The demo: which neurons hold a few dozen facts of a small model, and what if they are off?

Asks the model the bundled facts and keeps those it knows, locates their neurons with QRNCA, turns
them off at the last prompt position, and turns off random neurons of the same layers as a control.
"""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxneurons.checkpoints.fetch import LAB
from jaxneurons.checkpoints.loading import LM
from jaxneurons.engine.last_position import changes, last_position, scaled_answers
from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.errors import DataError
from jaxneurons.lab.bundled import bundled_queries
from jaxneurons.model.axis_types import any_axes
from jaxneurons.neurons.controls import generator
from jaxneurons.neurons.sets import Neuron, NeuronSet, site_width
from jaxneurons.plots.figures import neuron_map
from jaxneurons.processes.sharing import write_once
from jaxneurons.prompts import batches
from jaxneurons.prompts.queries import Query
from jaxneurons.qrnca.arguments import check_model
from jaxneurons.qrnca.encoding import encode_queries
from jaxneurons.qrnca.joining import join
from jaxneurons.qrnca.locating import locate
from jaxneurons.qrnca.method import QRNCAConfig, run_prompts
from jaxneurons.qrnca.run import Run
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.store import write_json
from jaxneurons.storage.tables import as_table, html_table

if TYPE_CHECKING:
    import pyarrow as pa

SETTINGS = QRNCAConfig(quadrature=Quadrature())
"""The paper's method with converged attributions."""


@dataclasses.dataclass(frozen=True)
class Effect:
    """What suppressing neurons did to the facts of one group.

    Attributes:
      group: the facts' group; "all" for every fact.
      facts: facts in it.
      neurons: mean number of neurons suppressed per fact.
      before: mean probability of the answer, model untouched.
      suppressed: the same with the fact's own neurons off.
      random: the same with random neurons of the same layers off, mean over the draws.
      random_spread: standard deviation of that mean over the draws.
      lost: share of prompts whose answer is no longer the most probable token.
      random_lost: the same for the random neurons.
    """

    group: str
    facts: int
    neurons: float
    before: float
    suppressed: float
    random: float
    random_spread: float
    lost: float
    random_lost: float


@dataclasses.dataclass(frozen=True, repr=False)
class Demo:
    """Neurons of facts that a model knows, and what happens to the facts without them.

    Attributes:
      run: neurons of the facts the model knows.
      effects: per group, then over all.
      unknown: ids of the facts it did not answer in every wording; left out.
      figure: the picture; None where nothing was written.
    """

    run: Run
    effects: list[Effect]
    unknown: list[str]
    figure: Path | None

    @property
    def table(self) -> "pa.Table":
        """The effects as a table."""
        return as_table(map(dataclasses.asdict, self.effects))

    def __repr__(self) -> str:
        everything = self.effects[-1]
        return (
            f"Demo on {self.run.name}: {everything.facts} facts; the answer's probability is "
            f"{everything.before:.3f}, {everything.suppressed:.3f} with each fact's neurons off, "
            f"{everything.random:.3f} with random ones of the same layers off"
        )

    def _repr_html_(self) -> str:
        return html_table(repr(self), [dataclasses.asdict(effect) for effect in self.effects])


def bundled_facts(per_group: int | None = None) -> list[Query]:
    """The facts that ship with the package, or the first few of each group."""
    facts = bundled_queries("facts")
    if per_group is None:
        return facts
    seen: dict[str, int] = {}
    chosen = []
    for fact in facts:
        seen[fact.group] = seen.get(fact.group, 0) + 1
        if seen[fact.group] <= per_group:
            chosen.append(fact)
    return chosen


def demo_facts(source: str) -> list[Query]:
    """Six facts of each group that a model may know: of its own world for the lab model."""
    if source != LAB:
        return bundled_facts(per_group=6)
    groups: dict[str, list[Query]] = {}
    for query in bundled_queries("lab-cloze"):
        groups.setdefault(query.group, []).append(query)
    return [fact for members in groups.values() for fact in members[:: len(members) // 6][:6]]


@any_axes
def known(lm: LM, facts: list[Query]) -> list[bool]:
    """Whether the model says the answer, whole, after every wording of a fact."""
    _, first = _suppressed(lm, facts, [[NeuronSet()]] * len(facts))
    return [bool(by_trial[0].all()) for by_trial in first]


@any_axes
def demo(
    lm: LM,
    *,
    out: str | os.PathLike[str] | None = None,
    facts: list[Query] | None = None,
    draws: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> Demo:
    """Locate the neurons of the facts that `lm` knows, suppress them, and see what happens.

    Args:
      lm: the model.
      out: the run directory: that of `locate`, with `effects.json` and `neurons.png`; default:
        none, and nothing is written.
      facts: default: `demo_facts`.
      draws: random control sets per fact.
      seed: of those draws.
      progress: called with how many prompts are attributed, of how many.

    Raises:
      DataError: the model knows fewer than two of the facts.
    """
    check_model(lm)
    facts = demo_facts(lm.source) if facts is None else facts
    encode_queries(lm, facts, SETTINGS)
    facts = join(lm.params, lm.tokenizer, facts, config=lm.config, site=SETTINGS.site)
    knows = known(lm, facts)
    unknown = [fact.id for fact, yes in zip(facts, knows, strict=True) if not yes]
    facts = [fact for fact, yes in zip(facts, knows, strict=True) if yes]
    if len(facts) < 2:
        raise DataError(
            f"the model knows {len(facts)} of the facts, too few to locate: "
            "try another model, or facts of your own with `jaxneurons qrnca locate`"
        )
    run = locate(lm, facts, settings=SETTINGS, out=out, cache_bytes=0, progress=progress)
    effects = suppress(lm, facts, run, draws=draws, seed=seed)
    if out is None:
        return Demo(run, effects, unknown, None)
    record = {
        "suppressed_at": "last prompt position",
        "draws": draws,
        "seeds": {"random control": seed},
        "unknown_facts": unknown,
        "effects": [dataclasses.asdict(effect) for effect in effects],
    }
    figure = Path(out) / "neurons.png"

    def write() -> None:
        write_json(figure.with_name("effects.json"), record)
        draw(lm, facts, run, figure)

    write_once("effects", write)
    return Demo(run, effects, unknown, figure)


def suppress(
    lm: LM, facts: list[Query], run: Run, *, draws: int = 10, seed: int = 0
) -> list[Effect]:
    """Each fact's answer with its own neurons off, and with random ones of the same layers off."""
    rng = generator(seed)
    trials = []
    for fact in facts:
        neurons = run[fact.id].neurons
        controls = [neurons.random_like(lm.config, rng) for _ in range(draws)]
        sets = [NeuronSet(), neurons, *controls]
        trials.append(sets)
    p, first = _suppressed(lm, facts, trials)

    def effect(group: str, members: list[int]) -> Effect:
        chance = np.concatenate([p[i] for i in members], axis=1)  # [trial, prompt]
        kept = np.concatenate([first[i] for i in members], axis=1)
        random = chance[2:].mean(1)
        sizes = [len(run[facts[i].id].ranking) for i in members]
        return Effect(
            group=group,
            facts=len(members),
            neurons=float(np.mean(sizes)),
            before=float(chance[0].mean()),
            suppressed=float(chance[1].mean()),
            random=float(random.mean()),
            random_spread=float(random.std()),
            lost=float(1 - kept[1].mean()),
            random_lost=float(1 - kept[2:].mean()),
        )

    groups: dict[str, list[int]] = {}
    for i, fact in enumerate(facts):
        groups.setdefault(fact.group, []).append(i)
    everything = effect("all", list(range(len(facts))))
    return [effect(group, members) for group, members in groups.items()] + [everything]


def draw(lm: LM, facts: list[Query], run: Run, path: Path) -> Path:
    """The picture: layers x neurons, naica accumulated over the facts of each group."""
    groups: dict[str, dict[Neuron, float]] = {}
    for fact in facts:
        group = groups.setdefault(fact.group, {})
        for neuron, naica in zip(run[fact.id].ranking, run[fact.id].naica, strict=True):
            group[neuron] = group.get(neuron, 0.0) + naica
    return neuron_map(
        groups,
        path,
        num_layers=lm.config.num_layers,
        width=site_width(lm.config, SETTINGS.site),
        common=[neuron for neuron, _ in run.common],
        title=f"Query-relevant neurons of {len(facts)} facts, {lm.source} (size: naica)",
    )


def _suppressed(
    lm: LM, facts: list[Query], trials: list[list[NeuronSet]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per fact, [trial, prompt]: the answer's probability and whether it comes first.

    `trials` holds the sets of neurons to be turned off, for each fact.
    """
    prompts = encode_queries(lm, facts, SETTINGS)
    owner = [i for i, fact in enumerate(facts) for _ in fact.prompts[: SETTINGS.prompts]]
    p = np.zeros((len(trials[0]), len(prompts)), np.float32)
    first = np.zeros(p.shape, bool)
    for batch in batches.plan(prompts):
        index = batch.index[batch.index >= 0]
        rows = np.where(batch.index >= 0, batch.index, index[0])
        off = [[(trials[owner[i]][t], 0.0) for i in rows] for t in range(len(trials[0]))]
        pre = run_prompts(lm.params, batch, config=lm.config, site=SETTINGS.site)
        last = last_position(pre)
        off = changes(off, site=SETTINGS.site)
        answers = jax.device_get(
            scaled_answers(lm.params, last, off, config=lm.config, site=SETTINGS.site)
        )
        p[:, index] = answers.probability[:, : len(index)]
        first[:, index] = answers.first[:, : len(index)]
    members = [np.flatnonzero(np.array(owner) == i) for i in range(len(facts))]
    return [p[:, m] for m in members], [first[:, m] for m in members]
