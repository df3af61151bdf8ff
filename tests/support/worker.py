"""One of several processes that tests start: joins the others, and does what it is told.

Run as a script with the arguments of `join` and the name and arguments of one of `JOBS`, as JSON.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 600
"""Until a test gives its processes up."""


def locate(model, queries, out, *, stages=True, mesh=None):
    """QRNCA, with the stages after it if they are wanted."""
    import jaxneurons
    from jaxneurons import qrnca
    from jaxneurons.qrnca.method import QRNCAConfig

    lm = jaxneurons.load(model, mesh=mesh)
    settings = QRNCAConfig(quadrature=jaxneurons.Quadrature("gauss", 2))
    chosen = qrnca.read_queries(queries)
    run = qrnca.locate(lm, chosen, out=out, settings=settings, batch_size=2)
    if stages:
        qrnca.evaluate(run, out=out)
        qrnca.predict(run, out=out)


def study(model, relations, out, *, mesh=None):
    """A study of relations with the analyses that each keep parts of their own."""
    import jaxneurons
    from jaxneurons import relspec
    from jaxneurons.prompts.relations import read_relations
    from jaxneurons.relspec.stages import plot

    lm = jaxneurons.load(model, mesh=mesh)
    settings = relspec.RelSpecConfig(k=24, minimum=5, minimum_right=1, seeds=2, sweep_seeds=1)
    whole = relspec.Study(lm, read_relations(relations), settings=settings, out=out)
    whole.collect()
    whole.write_neurons()
    whole.analyse(["ablation", "overlap", "perplexity"])
    plot(out)


def edits(model, out, *, mesh=None):
    """Edits by two methods, each alone and one after the other, in directories of their own."""
    from support.tiny_edits import REQUESTS

    import jaxneurons
    from jaxneurons import edit

    lm = jaxneurons.load(model, mesh=mesh)
    methods = {
        f"layer {layer}": edit.KnowledgeNeurons(jaxneurons.NeuronSet.of(act=[(layer, 3)]))
        for layer in (0, 1)
    }
    measures = edit.MeasureSettings(steps=2, fluency_tokens=4, perplexity_tokens=0, batch=1)
    common = {"measures": measures, "texts": ()}
    edit.evaluate(lm, REQUESTS, methods, out=out, **common)
    edit.evaluate_sequential(lm, REQUESTS, methods, sizes=(1, 3), out=f"{out}-sequence", **common)


def every_method(model, out, *, mesh=None):
    """The down kernels that each method makes of a model's, and how probable the answers are."""
    import jax
    from support.tiny_edits import REQUESTS

    import jaxneurons
    from jaxneurons import edit
    from jaxneurons.processes.sharing import fetch

    lm = jaxneurons.load(model, mesh=mesh)
    text = [request.prompt for request in REQUESTS] * 8
    covariance = edit.collect_covariance(lm, [0, 1], text=text)
    neurons = jaxneurons.NeuronSet.of(act=[(0, 3), (1, 5)])
    few = edit.Optimisation(steps=2, stop=0.0, prefixes=1)
    methods = {
        "rome": edit.ROME(layer=1, optimisation=few),
        "memit": edit.MEMIT(layers=(0, 1), optimisation=few),
        "alphaedit": edit.AlphaEdit(layers=(0, 1), optimisation=few),
        "finetune": edit.FineTune(layer=1, steps=2, learning_rate=0.05),
        "rows": edit.LearnedNeurons(neurons, steps=2),
        "multipliers": edit.LearnedNeurons(neurons, learn="multipliers", steps=2),
        "surgery": edit.KnowledgeNeurons(neurons),
    }
    values = {"base": fetch(lm.params["layers"]["ffn"]["down"]["kernel"])}
    for name, settings in methods.items():
        made = edit.edit(
            lm.params,
            REQUESTS,
            config=lm.config,
            tokenizer=lm.tokenizer,
            settings=settings,
            covariance=covariance,
        )
        edited = edit.apply(lm.params, made.changes, config=lm.config)
        values[name] = fetch(edited["layers"]["ffn"]["down"]["kernel"])
        if made.trace is not None:
            values[f"{name}, probability"] = np.asarray(made.trace.probability)
    if jax.process_index() == 0:
        np.savez(out, **values)


def spread(model, queries, out):
    """Logits and attribution of a model that lies on the devices of all processes."""
    import jax
    from jax.experimental import multihost_utils

    import jaxneurons

    count = len(jax.devices())
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, count), ("data", "model"), axis_types=kinds)
    lm = jaxneurons.load(model, mesh=mesh)
    values = {
        name: multihost_utils.process_allgather(array, tiled=True)
        for name, array in spread_values(lm).items()
    }
    if jax.process_index() == 0:
        whole = all(not leaf.is_fully_addressable for leaf in jax.tree.leaves(lm.params))
        np.savez(out, whole=whole, **values)
    said = jaxneurons.generate(lm, ["The capital of France is"], steps=3)
    Path(f"{out}-{jax.process_index()}.txt").write_text("\n".join(said))
    locate(model, queries, f"{out}-run", mesh=mesh)


def spread_values(lm):
    """Logits and attribution of two prompts."""
    import jax
    import jax.numpy as jnp

    import jaxneurons

    tokens = np.arange(20).reshape(2, 10).astype(np.int32) * 7 % 200

    def run(params):
        return jaxneurons.forward(params, jnp.asarray(tokens), config=lm.config).logits

    # Kernels of variance 1 amplify float32's rounding beyond what is compared.
    params = jax.tree_util.tree_map_with_path(
        lambda path, array: 0.3 * array if path[-1].key == "kernel" else array, lm.params
    )
    logits = jax.jit(run)(params)

    def attribute(params):
        return jaxneurons.integrated_gradients(
            params,
            jnp.asarray(tokens),
            jnp.array([[7], [8]], jnp.int32),
            config=lm.config,
            lengths=jnp.array([10, 8], jnp.int32),
            answer_lengths=jnp.array([1, 1], jnp.int32),
            site="up",
            quadrature=jaxneurons.Quadrature("gauss", 3),
        ).scores

    return {"logits": logits, "scores": jax.jit(attribute)(params)}


def hold(team, out, ill):
    """Say that it is here; the ill one fails or hangs, the others wait for it."""
    Path(out, f"{team.index}").write_text(str(os.getpid()))
    if team.index == ill["process"]:
        if ill["how"] == "raises":
            raise RuntimeError("no more of this")
        time.sleep(SECONDS)
    team.wait("who never comes")


JOBS = {
    "locate": locate,
    "study": study,
    "edits": edits,
    "every_method": every_method,
    "spread": spread,
}


def work(job: Mapping[str, Any]) -> None:
    from jaxneurons.processes import join

    with join(**job["join"]) as team:
        what, how = job["job"]
        if what == "hold":
            hold(team, **how)
        elif what != "nothing":
            JOBS[what](**how)
    print(f"process {team.index} is done")


# --- of the tests ---------------------------------------------------------------------------------


def free_port() -> int:
    """A port of this host that nobody listens at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(
    jobs: Sequence[tuple[str, Mapping[str, Any]]], **joining: Any
) -> list[subprocess.Popen[str]]:
    """A process for each job."""
    port = free_port()
    common = {"coordinator": f"127.0.0.1:{port}", "processes": len(jobs), "timeout": 60, **joining}
    return [
        launch([__file__, json.dumps({"join": {**common, "process": number}, "job": job})])
        for number, job in enumerate(jobs)
    ]


def launch(words: Sequence[str]) -> subprocess.Popen[str]:
    """A process of Python that compiles as the tests do."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return subprocess.Popen(
        [sys.executable, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each, when it has ended."""
    try:
        streams = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *both) for process, both in zip(processes, streams, strict=True)]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    work(json.loads(sys.argv[1]))
