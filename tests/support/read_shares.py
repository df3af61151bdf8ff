"""One of two processes of four devices each: reads checkpoints in shares, prints what it read.

python read_shares.py PORT NUMBER DIRECTORY
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

COUNTER = Path("/proc/self/io")


def bytes_read():
    return int(dict(line.split(": ") for line in COUNTER.read_text().splitlines())["rchar"])


def main():
    port, number, directory = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
    from jaxneurons.convert.gguf import read_gguf
    from jaxneurons.convert.hf import read_hf
    from jaxneurons.convert.native import read_native
    from jaxneurons.model.sharding import PRESETS, make_mesh, param_shardings

    readers = {"hf": read_hf, "gguf": read_gguf, "native": read_native}
    paths = {name: Path(directory) / name for name in ("hf", "native")}
    paths["gguf"] = Path(directory) / "m.gguf"
    config, whole = read_hf(paths["hf"])
    read_gguf(paths["gguf"])  # what it imports is read as well
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    report = {}
    for mesh in ("4x2", "1x8"):
        for preset, rules in PRESETS.items():
            shardings = param_shardings(config, make_mesh(mesh), rules)
            for name, read in readers.items():
                before = bytes_read()
                _, params = read(paths[name], place=lambda _, shardings=shardings: shardings)
                count, share, equal = bytes_read() - before, 0, True
                for leaf, plain in zip(
                    jax.tree.leaves(params), jax.tree.leaves(whole), strict=True
                ):
                    parts = {str(shard.index): shard for shard in leaf.addressable_shards}
                    for shard in parts.values():
                        share += shard.data.nbytes
                        equal &= np.array_equal(shard.data, np.asarray(plain)[shard.index])
                report[f"{name} {mesh} {preset}"] = (count, share, total, bool(equal))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
