"""Mini-batches in memory, and the same order through a DataLoader."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fastdl import data


def _examples(num_examples=23):
    X = torch.arange(num_examples * 6, dtype=torch.uint8).reshape(num_examples, 2, 3)
    return X, torch.arange(num_examples)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 40])
def test_batches_follow_the_permutation_of_the_generator(batch_size, seed):
    X, y = _examples()
    taken = list(data.batches(X, y, batch_size, torch.Generator().manual_seed(seed)))
    rows = torch.randperm(23, generator=torch.Generator().manual_seed(seed))
    expected = rows.split(batch_size)
    assert len(taken) == len(expected)
    for (images, labels), index in zip(taken, expected, strict=True):
        assert images.dtype == torch.uint8
        assert torch.equal(images, X[index])
        assert torch.equal(labels, y[index])


def test_without_a_generator_the_default_one_decides(seed):
    X, y = _examples()
    torch.manual_seed(seed)
    expected = torch.randperm(23)
    torch.manual_seed(seed)
    assert torch.equal(torch.cat([labels for _, labels in data.batches(X, y, 5)]), y[expected])


def test_without_shuffling_the_rows_stay_and_nothing_is_drawn():
    X, y = _examples()
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    taken = list(data.batches(X, y, 5, generator, shuffle=False))
    assert [len(labels) for _, labels in taken] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat([images for images, _ in taken]), X)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("shuffle", [True, False])
def test_no_examples_are_no_batches(shuffle):
    assert list(data.batches(torch.empty(0, 3), torch.empty(0), 5, shuffle=shuffle)) == []


def test_a_data_loader_follows_the_same_orders_over_epochs(seed):
    X, y = _examples()
    sampler = data.OrderSampler(23, torch.Generator().manual_seed(seed))
    loader = DataLoader(TensorDataset(X, y), batch_size=4, sampler=sampler)
    generator = torch.Generator().manual_seed(seed)
    orders = []
    for _ in range(3):
        pairs = zip(loader, data.batches(X, y, 4, generator), strict=True)
        for (loaded_images, loaded_labels), (images, labels) in pairs:
            assert torch.equal(loaded_images, images)
            assert torch.equal(loaded_labels, labels)
            orders.append(labels)
    assert len(sampler) == 23
    assert not torch.equal(torch.cat(orders[:6]), torch.cat(orders[6:12]))


def test_a_difference_in_length_is_named_when_called():
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(5,\)"):
        data.batches(torch.zeros(4, 2), torch.zeros(5), 2)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_without_rows_is_refused_when_called(batch_size):
    with pytest.raises(ValueError, match=f"batch_size.*{batch_size}"):
        data.batches(torch.zeros(4, 2), torch.zeros(4), batch_size)
