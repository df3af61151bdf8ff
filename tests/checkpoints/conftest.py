"""One tiny model, as a GGUF file and as a Hugging Face directory."""

import pytest
from support.checkpoints import (
    byte_level_vocabulary,
    gguf_fields,
    gguf_tensors,
    hf_tensors,
    tiny,
    write_gguf,
    write_hf,
)

VOCABULARY = byte_level_vocabulary()
CONFIG = tiny(vocab_size=len(VOCABULARY["tokenizer.ggml.tokens"]))


@pytest.fixture
def gguf_file(tmp_path):
    tensors = gguf_tensors(CONFIG, hf_tensors(CONFIG))
    return write_gguf(tmp_path / "tiny.gguf", gguf_fields(CONFIG) | VOCABULARY, tensors)


@pytest.fixture
def hf_directory(tmp_path, gguf_file):
    from jaxneurons.checkpoints.loading import load

    directory = write_hf(tmp_path / "tiny", CONFIG, hf_tensors(CONFIG), shards=2)
    load(gguf_file).tokenizer.save_pretrained(directory)
    return directory
