from itertools import pairwise

import numpy as np
import pytest
from crosspool.config.errors import ConfigError
from crosspool.kvpool.layout import KVLayout
from crosspool.models.spec import DenseFFN, MLASpec, ModelSpec, RopeSpec


@pytest.fixture
def spec() -> ModelSpec:
    """The KV shape of DeepSeek-V2-Lite: 27 layers of 512 + 64 features."""
    return ModelSpec(
        family="deepseek_v2",
        hidden=2048,
        vocab=102400,
        context=163840,
        dtype="bfloat16",
        norm_eps=1e-6,
        tied_embeddings=False,
        attention=MLASpec(
            q_heads=16,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            scale=0.1,
            rope=RopeSpec(dim=64, interleaved=True),
        ),
        ffn=(DenseFFN(intermediate=8),) * 27,
        eos_token_ids=(1,),
    )


def test_sizes(spec):
    layout = KVLayout(spec, 16, 2 << 20)
    assert layout.page_bytes == 27 * 16 * 576 * 2
    assert [layout.pages_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert layout.pages_in(1) == 4
    assert layout.pages_in(100) == 421
    assert layout.range_bytes(100) == 100 * (2 << 20)


def test_every_byte_of_a_page_lies_in_its_chunks(spec):
    layout = KVLayout(spec, 16, 2 << 20)
    covered = [layout.chunks_of_pages(page) for page in range(layout.pages_in(50))]
    assert any(len(chunks) == 2 for chunks in covered)
    for page, chunks in enumerate(covered):
        assert chunks.start * layout.chunk_bytes <= page * layout.page_bytes
        assert chunks.stop * layout.chunk_bytes >= (page + 1) * layout.page_bytes
    assert all(after.start in (before[-1], before[-1] + 1) for before, after in pairwise(covered))
    assert covered[-1].stop <= 50


def test_a_page_may_span_many_chunks(spec):
    layout = KVLayout(spec, 256, 2 << 20)
    assert layout.chunks_of_pages(0) == range(4)
    assert layout.chunks_of_pages(1) == range(3, 8)


def test_chunks_beneath_pages_in_a_row(spec):
    layout = KVLayout(spec, 16, 2 << 20)
    assert layout.chunks_for(0) == 0
    for pages in (1, 4, 5, 421, 422):
        assert layout.chunks_for(pages) == layout.chunks_of_pages(pages - 1).stop
    assert layout.chunks_for(np.array([0, 5])).tolist() == [0, layout.chunks_for(5)]


class _Recurrent:
    """A model of 24 bytes of KV per token, with 1000 rows of 512 bytes of recurrent state."""

    kv_bytes_per_token = 24
    state_bytes = 512_000
    state_row = 512


def test_recurrent_state_lies_in_the_first_pages_of_a_sequence():
    layout = KVLayout(_Recurrent(), 64, 2 << 20)
    assert layout.page_bytes == 1536 and layout.state_pages == 334  # 3 rows to a page
    assert [layout.pages_for(tokens) for tokens in (1, 64, 65)] == [335, 335, 336]
    assert [layout.tokens_in(pages) for pages in (0, 334, 335, 340)] == [0, 0, 64, 384]
    narrow = KVLayout(_Recurrent(), 22, 2 << 20)
    assert narrow.page_bytes == 528 and narrow.state_pages == 1000


def test_a_page_that_holds_no_row_of_state_is_refused():
    with pytest.raises(ConfigError, match=r"page_size: 21: a page of 504 bytes .* at least 22"):
        KVLayout(_Recurrent(), 21, 2 << 20)
