"""What neurons add to letters' logits, on options of a configuration that bend it on its way."""

import numpy as np
import pytest
from support.models import random_tokens
from support.options import BUNDLES, params_of
from support.plain import Plain, wide

from jaxneurons.prompts import batches
from jaxneurons.prompts.answers import TokenPrompt
from jaxneurons.qrnca.prediction import _read

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_contributions_pass_the_norms_and_the_unembedding(name):
    config, params = BUNDLES[name], params_of(name)
    ids = np.asarray(random_tokens(config, (1, 7)))[0]
    options = (5, 11)
    prompt = TokenPrompt(tuple(ids.tolist()), (5,), options=tuple((i,) for i in options))
    (batch,) = batches.plan([prompt])
    rows = len(batch.tokens)
    at = np.broadcast_to(np.array([(0, 3), (1, 7), (2, 30)], np.int32), (rows, 3, 2))
    chance, seen, added = _read(params, batch, at, config=config, site="up")
    plain = Plain(params, ids, config)
    words = wide(params["embed"]["embedding"] if config.tied else params["unembed"]["kernel"].T)
    final = wide(params["final_norm"]["scale"]) + config.norm_offset
    np.testing.assert_allclose(
        chance[0, :2], np.log(plain.probabilities[-1, list(options)]), rtol=1e-4
    )
    for column, (layer, index) in enumerate(at[0].tolist()):
        row = wide(params["layers"]["ffn"]["down"]["kernel"][layer, index])
        down = plain.sites["down", layer][-1]
        size = np.sqrt((down**2).mean() + config.norm_eps)
        weight = wide(params["layers"]["ffn_post_norm"]["scale"][layer]) + config.norm_offset
        written = plain.sites["act", layer][-1, index] * row * weight / size
        wanted = words[list(options)] @ (written * final)
        np.testing.assert_allclose(added[0, :2, column], wanted, rtol=1e-4, atol=1e-5)
    after = Plain(params, [*ids, options[1]], config)
    np.testing.assert_allclose(
        seen[0, 1], [after.sites["up", layer][-1, index] for layer, index in at[0]], rtol=1e-3
    )
