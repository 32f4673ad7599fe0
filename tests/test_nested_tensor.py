"""Padding of image batches."""

from __future__ import annotations

import pytest
import torch

from util.nested_tensor import NestedTensor, as_nested_tensor, nested_tensor_from_tensor_list


def test_batch_is_padded_at_the_bottom_and_right():
    images = [torch.ones(3, 2, 5), torch.full((3, 4, 3), 2.0)]
    batch, mask = nested_tensor_from_tensor_list(images).decompose()
    assert batch.shape == (2, 3, 4, 5) and mask.shape == (2, 4, 5)
    for index, image in enumerate(images):
        h, w = image.shape[1:]
        assert torch.equal(batch[index, :, :h, :w], image)
        assert not mask[index, :h, :w].any()
        assert int(mask[index].sum()) == 20 - h * w
        assert float(batch[index].sum()) == float(image.sum())


def test_sizes_are_rounded_up_to_a_multiple():
    batch = nested_tensor_from_tensor_list([torch.ones(3, 2, 5), torch.ones(3, 4, 3)], 4)
    assert batch.tensors.shape == (2, 3, 4, 8) and batch.padded
    assert int((~batch.mask).sum()) == 2 * 5 + 4 * 3 == float(batch.tensors.sum()) / 3
    # What fits already stays as it is.
    assert not nested_tensor_from_tensor_list([torch.ones(3, 4, 8)], 4).padded
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        nested_tensor_from_tensor_list([torch.ones(3, 4, 8)], 0)


@pytest.mark.parametrize("wrong", [[], [torch.zeros(4, 4)]])
def test_anything_but_images_is_refused(wrong):
    with pytest.raises(ValueError, match=r"non-empty list of \(C, H, W\)"):
        nested_tensor_from_tensor_list(wrong)


def test_as_nested_tensor_pads_lists_and_keeps_batches():
    batch = as_nested_tensor([torch.zeros(3, 2, 2)])
    assert isinstance(batch, NestedTensor)
    assert as_nested_tensor(batch) is batch
    assert isinstance(batch.to("cpu"), NestedTensor)


def test_absence_of_padding_is_known_and_survives_copies():
    same = nested_tensor_from_tensor_list([torch.zeros(3, 4, 5), torch.ones(3, 4, 5)])
    assert not same.padded and same.padding_mask is None
    assert not same.to("cpu").padded
    different = nested_tensor_from_tensor_list([torch.zeros(3, 4, 5), torch.ones(3, 4, 6)])
    assert different.padded and different.to("cpu").padding_mask is not None
