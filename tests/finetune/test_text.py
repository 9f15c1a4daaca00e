"""Short ways through the text tower give what the long way gives."""

import numpy as np
import pytest
import torch

from finetune.contrastive.architectures import PRESETS, build, tokenizer
from finetune.contrastive.text import TokenTable, UsedVocabulary, can_shorten, encode_text

TEXTS = ["a red rose.", "a much longer sentence about a small yellow tulip in the rain", "rose"]


def test_f29_long_captions_are_cut_and_keep_their_end() -> None:
    tokenize = tokenizer(PRESETS["demo-rn"])
    table = TokenTable.of(["word " * 100, "word"], tokenize)
    start, end = 49406, 49407
    assert table.ids.shape == (2, 32)
    assert table.ids[0, 0] == start
    assert table.ids[0, -1] == end
    assert table.lengths.tolist() == [32, 3]
    model = build(PRESETS["demo-rn"]).eval()
    assert encode_text(model, table.rows(np.array([0, 1]))).isfinite().all()


def test_batches_are_cut_to_their_longest_text() -> None:
    table = TokenTable.of(TEXTS, tokenizer(PRESETS["demo-rn"]))
    assert table.rows(np.array([0, 2])).shape == (2, table.lengths[0])
    assert table.rows(np.array([2])).shape == (1, 3)


def test_shortened_text_equals_open_clips_own() -> None:
    torch.manual_seed(0)
    model = build(PRESETS["demo-rn"]).eval()
    assert can_shorten(model)
    table = TokenTable.of(TEXTS, tokenizer(PRESETS["demo-rn"]))
    with torch.inference_mode():
        expected = model.encode_text(torch.from_numpy(table.ids).long())
        found = encode_text(model, table.rows(np.arange(3)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_other_text_towers_take_the_long_way() -> None:
    torch.manual_seed(0)
    model = build({**PRESETS["demo-rn"], "custom_text": True}).eval()
    assert not can_shorten(model)
    table = TokenTable.of(TEXTS, tokenizer(PRESETS["demo-rn"]))
    with torch.inference_mode():
        expected = model.encode_text(torch.from_numpy(table.ids).long())
        found = encode_text(model, table.rows(np.arange(3)))
    torch.testing.assert_close(found, expected)


def test_used_vocabulary_changes_nothing_but_the_size() -> None:
    torch.manual_seed(0)
    model = build(PRESETS["demo-rn"]).eval()
    table = TokenTable.of(TEXTS, tokenizer(PRESETS["demo-rn"]))
    tokens = table.rows(np.arange(3))
    before = model.token_embedding.weight.detach().clone()
    expected = encode_text(model, tokens).detach()
    vocabulary = UsedVocabulary(model, table.ids)
    compact = vocabulary.compact(table)
    assert len(model.token_embedding.weight) == len(np.unique(table.ids))
    torch.testing.assert_close(encode_text(model, compact.rows(np.arange(3))), expected)

    with torch.no_grad():
        model.token_embedding.weight.add_(1.0)
    vocabulary.restore()
    after = model.token_embedding.weight.detach()
    used = torch.from_numpy(np.unique(table.ids)).long()
    unused = torch.ones(len(before), dtype=torch.bool)
    unused[used] = False
    torch.testing.assert_close(after[used], before[used] + 1.0)
    assert torch.equal(after[unused], before[unused])


def test_a_word_outside_the_vocabulary_is_an_error() -> None:
    tokenize = tokenizer(PRESETS["demo-rn"])
    vocabulary = UsedVocabulary(build(PRESETS["demo-rn"]), TokenTable.of(["a rose"], tokenize).ids)
    with pytest.raises(KeyError):
        vocabulary.compact(TokenTable.of(["a zebra"], tokenize))
