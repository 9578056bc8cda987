"""Dropout that keeps everything is exact, is seen wherever torch drops, and is put back."""

import torch
from torch import nn
from torch.nn import functional as F

from conformance.recording.dropping import everything_kept

X = torch.linspace(-1, 1, 2 * 4 * 8).view(2, 4, 8)


def test_what_drops_scales_instead() -> None:
    with everything_kept():
        for found in (nn.Dropout(0.2)(X), F.dropout(X, 0.2), torch.dropout(X, 0.2, True), nn.Dropout1d(0.2)(X)):
            torch.testing.assert_close(found, X / 0.8)
        inplace = X.clone()
        F.dropout(inplace, 0.2, inplace=True)
        torch.testing.assert_close(inplace, X / 0.8)


def test_what_does_not_drop_is_left_alone() -> None:
    with everything_kept():
        assert torch.equal(nn.Dropout(0.2).eval()(X), X)
        assert torch.equal(F.dropout(X, 0.0), X)


def test_attention_scales_its_weights() -> None:
    plain = F.scaled_dot_product_attention(X, X, X, is_causal=True)
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, bias=False, batch_first=True)
    without = attention.eval()(X, X, X)[0]
    attention.train()
    with everything_kept():
        torch.testing.assert_close(F.scaled_dot_product_attention(X, X, X, None, 0.2, is_causal=True), plain / 0.8)
        for weights in (True, False):  # by two paths
            torch.testing.assert_close(attention(X, X, X, need_weights=weights)[0], 2 * without)


def test_everything_is_put_back() -> None:
    kept = F.scaled_dot_product_attention, torch.dropout, torch._VF.dropout
    with everything_kept():
        pass
    assert kept == (F.scaled_dot_product_attention, torch.dropout, torch._VF.dropout)
    torch.manual_seed(1)
    assert (nn.Dropout(0.5)(X) == 0).any()


def test_one_call_acts_in_each_update() -> None:
    update = 0
    with everything_kept(but_for=lambda: update):
        for update in range(3):
            first, second = F.dropout(X, 0.2), nn.Dropout(0.2)(X)
            third = F.scaled_dot_product_attention(X, X, X, None, 0.2)
            random = [not torch.equal(first, X / 0.8), not torch.equal(second, X / 0.8)]
            assert random == [update == 0, update == 1]
            plain = F.scaled_dot_product_attention(X, X, X) / 0.8
            assert torch.allclose(third, plain) == (update != 2)


def test_a_mask_of_weights_is_no_place() -> None:
    weight = nn.Parameter(X.clone())
    with everything_kept(but_for=lambda: 0):
        torch.testing.assert_close(F.dropout(weight, 0.2), X / 0.8)
        assert not torch.equal(F.dropout(X, 0.2), X / 0.8)  # this one is the first
