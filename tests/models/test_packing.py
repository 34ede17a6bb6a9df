"""The prefix tree: nodes, depths and masks by hand, rows within their limit."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dso.models.packing import fill_rows, pack, tree_size

SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=5)


def test_a_tree_by_hand():
    #  5 - 6 - 7          4
    #        \ 8 - 9
    row = pack([(5, 6, 7), (5, 6, 8, 9), (4,)])
    assert row.input_ids.tolist() == [[5, 6, 7, 8, 9, 4]]
    assert row.position_ids.tolist() == [[0, 1, 2, 2, 3, 0]]
    assert row.paths == ((0, 1, 2), (0, 1, 3, 4), (5,))
    assert row.attention_mask.shape == (1, 1, 6, 6)
    assert row.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_the_same_token_elsewhere_is_another_node():
    row = pack([(1, 1, 1), (1, 2, 1)])
    assert row.input_ids.tolist() == [[1, 1, 1, 2, 1]]
    assert row.paths == ((0, 1, 2), (0, 3, 4))
    assert row.attention_mask[0, 0, 4].int().tolist() == [1, 0, 0, 1, 1]


def test_a_sequence_that_occurs_twice_or_ends_in_another_adds_nothing():
    row = pack([(1, 2, 3), (1, 2), (1, 2, 3)])
    assert row.input_ids.tolist() == [[1, 2, 3]]
    assert row.paths == ((0, 1, 2), (0, 1), (0, 1, 2))


@settings(deadline=None, max_examples=60)
@given(SEQUENCES)
def test_every_token_sees_its_own_sequence_up_to_itself(sequences):
    row = pack(sequences)
    prefixes = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
    assert row.input_ids.shape[1] == len(prefixes)
    seen = row.attention_mask[0, 0]
    for sequence, path in zip(sequences, row.paths, strict=True):
        assert row.input_ids[0, list(path)].tolist() == list(sequence)
        assert row.position_ids[0, list(path)].tolist() == list(range(len(sequence)))
        for place, node in enumerate(path):
            assert seen[node].nonzero()[:, 0].tolist() == list(path[: place + 1])
    assert torch.equal(seen, seen.tril())


def test_tree_size_by_hand():
    assert tree_size([(1, 2, 3)]) == 3
    assert tree_size([(1, 2, 3), (1, 2, 4, 5), (1, 2)]) == 5
    assert (
        tree_size([(1, 9), (2,), (1, 9)]) == 5
    )  # a bound: the third shares with the first, which it is not compared to


def test_rows_by_hand():
    # Three items of one prompt (4 nodes) with two candidates of one more token each, and a lone one.
    items = [
        [(8, 8)],
        [(1, 2, 3, 4, 5), (1, 2, 3, 4, 6)],
        [(1, 2, 3, 7), (1, 2, 3, 8)],
        [(1, 2, 3, 4, 5), (1, 2, 3, 4, 6)],
    ]
    assert fill_rows(items, 100) == [[1, 3, 2, 0]]
    # 6 nodes, the same 6 again counted as 1 (the second candidate is compared with the first), 2 more, 2 more
    assert fill_rows(items, 9) == [[1, 3, 2], [0]]
    assert fill_rows(items, 8) == [[1, 3], [2, 0]]
    assert fill_rows(items, 1) == [[1], [3], [2], [0]]
    assert fill_rows([], 10) == []


@settings(deadline=None, max_examples=60)
@given(st.lists(SEQUENCES, max_size=6), st.integers(1, 30))
def test_rows_hold_every_item_once_and_keep_their_limit(items, limit):
    rows = fill_rows(items, limit)
    assert sorted(index for row in rows for index in row) == list(range(len(items)))
    for row in rows:
        nodes = pack([sequence for index in row for sequence in items[index]]).input_ids.shape[1]
        assert nodes <= limit or len(row) == 1
        assert len(row) > 1 or nodes <= tree_size(items[row[0]])
