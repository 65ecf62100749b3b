"""Attention measures where the answer is known by construction, and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from probe.measures.mass import (
    all_rows_mass,
    contribution,
    one_hot_segments,
    output_factors,
    residual,
    row_attention,
    segment_mass,
    segment_outputs,
)

torch.manual_seed(0)
BATCH, HEADS, KV, LENGTH, WIDTH = 2, 6, 2, 23, 8


def draw(seed=0, queries=LENGTH):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, HEADS, queries, WIDTH, generator=generator)
    k = torch.randn(BATCH, KV, LENGTH, WIDTH, generator=generator)
    v = torch.randn(BATCH, KV, LENGTH, WIDTH, generator=generator)
    return q, k, v


def by_hand(q, k, visible, scale):
    """Softmax rows from Python floats: ``[batch, head, query, key]``."""
    out = torch.zeros(*q.shape[:3], k.shape[2])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = [j for j in range(k.shape[2]) if visible(b, i, j)]
                scores = [
                    scale * sum(x * y for x, y in zip(q[b, h, i].tolist(), k[b, h // 3, j].tolist(), strict=True))
                    for j in keys
                ]
                top = max(scores)
                total = sum(math.exp(s - top) for s in scores)
                for j, s in zip(keys, scores, strict=True):
                    out[b, h, i, j] = math.exp(s - top) / total
    return out


def masks():
    """The same visibility as no mask, as a boolean mask and as an additive one."""
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    additive = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~causal, torch.finfo(torch.float32).min)
    return {"none": (None, True), "boolean": (causal, False), "additive": (additive, False)}


@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
def test_rows_of_attention(kind):
    q, k, _ = draw()
    mask, causal = masks()[kind]
    rows = torch.tensor([[0, 5, 22], [22, 22, 3]])
    expected = by_hand(q, k, lambda b, i, j: j <= i, 0.3)
    got = row_attention(q, k, mask, 0.3, causal, rows)
    for b in range(BATCH):
        torch.testing.assert_close(got[b], expected[b][:, rows[b]], atol=1e-6, rtol=0)


def test_a_mask_of_its_own_for_each_episode():
    """Left padding: an episode's first keys are hidden from it and from nobody else."""
    q, k, _ = draw()
    hidden = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    hidden[1, :, :, :9] = False
    hidden[1, :, :9, 0] = True  # rows of padding: anything but empty
    got = row_attention(q, k, hidden, 1.0, False, torch.full((BATCH, 1), LENGTH - 1))
    expected = by_hand(q, k, lambda b, i, j: j <= i and (b == 0 or j >= 9 or i < 9), 1.0)
    torch.testing.assert_close(got, expected[:, :, -1:], atol=1e-6, rtol=0)
    assert (got[1, ..., :9] == 0).all()


def test_rows_with_a_cache_see_the_keys_before_them():
    """Fewer queries than keys, causal without a mask: the last query sees the last key."""
    q, k, _ = draw(queries=4)
    got = row_attention(q, k, None, 1.0, True, torch.tensor([[0, 3], [1, 2]]))
    expected = by_hand(q, k, lambda b, i, j: j <= i + LENGTH - 4, 1.0)
    torch.testing.assert_close(got[0], expected[0][:, [0, 3]], atol=1e-6, rtol=0)
    torch.testing.assert_close(got[1], expected[1][:, [1, 2]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("n_segments", [2, 7, 8, 20])
@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
def test_all_rows_equal_the_sum_over_rows(n_segments, kind):
    """More segments than a head is wide as well, which takes several calls of the kernel."""
    q, k, _ = draw(1)
    mask, causal = masks()[kind]
    index = torch.randint(-1, n_segments, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    segments = one_hot_segments(index, n_segments)
    attention = row_attention(q, k, mask, 0.5, causal, torch.arange(LENGTH).expand(BATCH, -1))
    rows = segment_mass(attention, segments)
    every = all_rows_mass(q, k, segments, mask, 0.5, causal)
    torch.testing.assert_close(every, rows, atol=2e-6, rtol=0)
    for b in range(BATCH):
        for s in range(n_segments):
            keys = [j for j in range(LENGTH) if index[b, j] == s]
            torch.testing.assert_close(rows[b, ..., s], attention[b][..., keys].sum(-1), atol=1e-6, rtol=0)


def test_planted_attention_is_found():
    """A key that a query is aligned with takes all the mass, and its segment shows it."""
    q = torch.zeros(1, 2, 5, 4)
    k = torch.zeros(1, 1, 5, 4)
    k[0, 0, 1, 0] = 60.0
    q[0, 1, 4, 0] = 60.0  # head 1 looks at key 1; head 0 looks everywhere alike
    segments = one_hot_segments(torch.tensor([[0, 1, 1, 2, 2]]), 3)
    mass = segment_mass(row_attention(q, k, None, 1.0, True, torch.tensor([[4]])), segments)
    torch.testing.assert_close(mass[0, :, 0], torch.tensor([[0.2, 0.4, 0.4], [0.0, 1.0, 0.0]]))


def test_segment_outputs_give_back_the_kernel_and_the_two_part_identity():
    """sum_s z_s is what the kernel returns; with D and the rest, SA = (1 - mu) SA_Q + mu SA_D."""
    q, k, v = draw(3)
    every = torch.arange(LENGTH).expand(BATCH, -1)
    in_d = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.4
    in_d[:, 0] = False  # the first row sees only the rest
    segments = one_hot_segments(in_d.long(), 2)
    attention = row_attention(q, k, None, 0.4, True, every)
    z = segment_outputs(attention, v, segments)
    kernel = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), is_causal=True, scale=0.4
    )
    torch.testing.assert_close(z.sum(3), kernel, atol=2e-6, rtol=0)
    mu = segment_mass(attention, segments)[..., 1:]
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()

    def restricted(part):
        visible = (causal & part[:, None, None, :]).expand(-1, HEADS, -1, -1)
        dead = ~visible.any(-1, keepdim=True)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), attn_mask=visible | dead, scale=0.4
        )
        return out.masked_fill(dead, 0.0)

    both = (1 - mu) * restricted(~in_d) + mu * restricted(in_d)
    torch.testing.assert_close(both, kernel, atol=2e-6, rtol=0)


def test_contribution_is_the_norm_of_what_is_written():
    q, k, v = draw(4)
    weight = torch.randn(40, HEADS * WIDTH, generator=torch.Generator().manual_seed(5))
    segments = one_hot_segments(torch.arange(LENGTH).expand(BATCH, -1) * 3 // LENGTH, 3)
    attention = row_attention(q, k, None, 1.0, True, torch.full((BATCH, 2), LENGTH - 1))
    z = segment_outputs(attention, v, segments)
    got = contribution(z, output_factors(weight, HEADS))
    for h in range(HEADS):
        written = z[:, h] @ weight[:, h * WIDTH : (h + 1) * WIDTH].T
        torch.testing.assert_close(got[:, h], written.norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_opposite_values_cancel_in_a_contribution():
    """The norm of the sum, not the sum of the norms."""
    v = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).view(1, 1, 2, 2)
    attention = torch.full((1, 1, 1, 2), 0.5)
    z = segment_outputs(attention, v, one_hot_segments(torch.zeros(1, 2, dtype=torch.long), 1))
    assert contribution(z, output_factors(torch.eye(2), 1)).item() == pytest.approx(0.0)


def test_residual_is_relative_to_the_layer_and_sees_one_bad_head():
    own = torch.ones(1, 4, 1, 9)
    rebuilt = own.clone()
    rebuilt[0, 2] *= 1.01
    torch.testing.assert_close(
        residual(rebuilt, own)[0, :, 0], torch.tensor([0.0, 0.0, 0.01, 0.0]), rtol=1e-3, atol=1e-6
    )
    assert (residual(own * 0, own * 0) == 0).all()
