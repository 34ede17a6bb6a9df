"""Trie packing: many prompts in one forward pass, every shared prefix computed once.

Decisions about the same people differ only in their last words, and a decision's candidates share its whole
prompt. The token sequences of a batch are merged into a prefix tree; its L nodes form one row of L tokens in
which a token attends to its ancestors only and stands at the position of its depth, so each sequence gets the
logits that it would get alone. This is the token-tree attention of speculative decoding (SpecInfer, Miao
et al. 2024, section 4.2), used for scoring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dso.models.tokens import common_prefix


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One packed row of L tokens.

    Attributes:
        input_ids: (1, L) int64.
        position_ids: (1, L) int64, the depth of each node.
        attention_mask: (1, 1, L, L) bool, True where the row's token attends to the column's.
        paths: for each sequence the indices of its tokens in the row.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    paths: tuple[tuple[int, ...], ...]

    def inputs(self, model) -> dict[str, torch.Tensor]:
        """What a model takes for the row, on its device."""
        mask = self.attention_mask
        if model.config.get_text_config()._attn_implementation == "eager":  # it adds its mask to the attention scores
            mask = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
        device = next(model.get_input_embeddings().parameters()).device
        tensors = {"input_ids": self.input_ids, "position_ids": self.position_ids, "attention_mask": mask}
        return {name: tensor.to(device) for name, tensor in tensors.items()}


def pack(sequences: Sequence[Sequence[int]]) -> PackedRow:
    """Merge token sequences into one row that holds each common prefix once."""
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    children: dict[tuple[int, int], int] = {}
    paths = []
    for sequence in sequences:
        node, path = -1, []
        for depth, token in enumerate(sequence):
            key = (node, token)
            if key not in children:
                children[key] = len(tokens)
                tokens.append(token)
                parents.append(node)
                depths.append(depth)
            node = children[key]
            path.append(node)
        paths.append(tuple(path))
    mask = np.eye(len(tokens), dtype=bool)
    for index, parent in enumerate(parents):
        if parent >= 0:  # a parent is always made before its children, so its row is complete
            mask[index] |= mask[parent]
    return PackedRow(torch.tensor([tokens]), torch.tensor([depths]), torch.from_numpy(mask)[None, None], tuple(paths))


def fill_rows(sequences: Sequence[Sequence[Sequence[int]]], max_tokens: int) -> list[list[int]]:
    """Divide items (each a list of token sequences) into rows of at most ``max_tokens`` tree nodes.

    Items are taken in lexicographic order, so that those with a common prefix meet in one row; an item
    that is larger than ``max_tokens`` alone gets a row to itself. Every item has at least one sequence.

    Returns:
        the indices of the items of each row.
    """
    order = sorted(range(len(sequences)), key=lambda index: list(map(tuple, sequences[index])))
    rows: list[list[int]] = []
    size = 0
    previous: Sequence[int] = ()
    for index in order:
        added = _new_nodes(previous, sequences[index])
        if rows and size + added <= max_tokens:
            rows[-1].append(index)
            size += added
        else:
            rows.append([index])
            size = tree_size(sequences[index])
        previous = sequences[index][0]
    return rows


def tree_size(sequences: Sequence[Sequence[int]]) -> int:
    """How many nodes one item's tree has: an upper bound, exact where its sequences share only the first's prefix."""
    return _new_nodes((), sequences)


def _new_nodes(previous: Sequence[int], sequences: Sequence[Sequence[int]]) -> int:
    """How many nodes an item adds behind ``previous``: an upper bound, for a prefix may be shared with another one."""
    added = 0
    for sequence in sequences:
        added += len(sequence) - common_prefix(previous, sequence)
        previous = sequence
    return added
