"""The action slots are those of the published masks, for LIBERO's and for ALOHA's chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from maps_ray.models.decoder import slot_states

BEGIN = 31743


@pytest.mark.parametrize(("robot", "chunk", "action_dim", "proprio_dim"), [("libero", 8, 7, 8), ("aloha", 25, 14, 14)])
def test_slots_of_the_published_masks(
    oft_fixtures: Path, robot: str, chunk: int, action_dim: int, proprio_dim: int
) -> None:
    stored = np.load(oft_fixtures / f"masks_{robot}.npz")
    sizes = (stored["chunk"], stored["action_dim"], stored["proprio_dim"])
    assert tuple(map(int, sizes)) == (chunk, action_dim, proprio_dim)
    slots = stored["labels"] > BEGIN
    np.testing.assert_array_equal(slots, stored["current_unshifted"] | stored["next_unshifted"])
    # Hidden states that name their own place show which are read: those under the shifted mask, in order.
    length, patches = slots.shape[1], 5
    places = torch.arange(length + patches, dtype=torch.float32)[None, :, None].expand(len(slots), -1, 1)
    read = slot_states(places, torch.from_numpy(slots), chunk * action_dim)[..., 0].numpy()
    shifted = stored["current_shifted"] | stored["next_shifted"]
    expected = [patches + np.flatnonzero(row) for row in shifted]
    np.testing.assert_array_equal(read, expected)
    # The first action of the chunk comes first.
    current = [patches + np.flatnonzero(row) for row in stored["current_shifted"]]
    np.testing.assert_array_equal(read[:, :action_dim], current)
