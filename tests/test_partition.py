"""The partition function of attention against loops over keys, and what one key more would take."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import probe.measures.partition as module
from probe.measures.partition import log_partition

BATCH, HEADS, KV, ROWS, KEYS, WIDTH, SCALE = 2, 6, 2, 5, 7, 8, 0.4
SMALLEST = torch.finfo(torch.float64).min


def drawn(rows: int = ROWS, keys: int = KEYS, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    q, k = (
        torch.randn(BATCH, *shape, WIDTH, generator=generator, dtype=torch.float64)
        for shape in ((HEADS, rows), (KV, keys))
    )
    return q.to(dtype), k.to(dtype)


def visible() -> torch.Tensor:
    """Differs between episodes; every row sees something."""
    mask = torch.rand(BATCH, 1, ROWS, KEYS, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 2] = True
    return mask


def soft() -> torch.Tensor:
    """Additive, different in every head, and hides some keys."""
    bias = torch.randn(1, HEADS, ROWS, KEYS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return bias.masked_fill(~visible()[:1], SMALLEST)


MASKS = {
    "none": None,
    "boolean": visible(),
    "one for all": visible()[:1],
    "additive": torch.zeros(BATCH, 1, ROWS, KEYS, dtype=torch.float64).masked_fill(~visible(), SMALLEST),
    "infinite": torch.zeros(BATCH, 1, ROWS, KEYS, dtype=torch.float64).masked_fill(~visible(), -math.inf),
    "a bias of each head": soft(),
}


def by_loops(q, k, mask, causal) -> torch.Tensor:
    """One exponential after the other."""
    found = torch.zeros(q.shape[:3], dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        total = 0.0
        for j in range(k.shape[2]):
            score = SCALE * float(q[b, h, i] @ k[b, h // (HEADS // KV), j])
            if causal and j > i + k.shape[2] - q.shape[2]:
                continue
            if mask is not None:
                entry = mask[min(b, len(mask) - 1), min(h, mask.shape[1] - 1), i, j]
                if not (entry if mask.dtype == torch.bool else entry > -1e9):
                    continue
                score += 0.0 if mask.dtype == torch.bool else float(entry)
            total += math.exp(score)
        found[b, h, i] = math.log(total)
    return found


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_sum_over_the_keys_that_a_row_sees(name, causal):
    """Grouped heads, fewer rows than keys; a mask says all, so that causal counts without one only."""
    q, k = drawn()
    causal = causal and name == "none"
    found = log_partition(q, k, MASKS[name], SCALE, causal)
    torch.testing.assert_close(found, by_loops(q, k, MASKS[name], causal), rtol=0, atol=1e-14)


def test_one_key_more_takes_the_sigmoid_of_the_difference_of_the_logits():
    """As MimIC has it: attention to the old keys shrinks by 1 - mu, and the new one gets mu."""
    q, k = drawn()
    mask, logit = visible(), torch.randn(BATCH, HEADS, ROWS, dtype=torch.float64)
    scores = SCALE * q @ k.repeat_interleave(HEADS // KV, 1).transpose(-1, -2)
    scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.cat([scores, logit[..., None]], -1).softmax(-1)
    mu = torch.sigmoid(logit - log_partition(q, k, mask, SCALE, False))
    torch.testing.assert_close(mu, weights[..., -1], rtol=0, atol=1e-15)
    torch.testing.assert_close((1 - mu)[..., None] * scores.softmax(-1), weights[..., :-1], rtol=0, atol=1e-15)
    assert 0.05 < float(mu.mean()) < 0.6


@pytest.mark.parametrize("kind", ["boolean", "additive", "infinite"])
def test_rows_that_see_nothing_are_finite_and_so_are_gradients(kind):
    q, k = (value.requires_grad_() for value in drawn())
    mask = MASKS[kind].clone()
    mask[0, :, 1] = False if kind == "boolean" else -math.inf if kind == "infinite" else SMALLEST
    found = log_partition(q, k, mask, SCALE, False)
    assert (found[0, :, 1] == SMALLEST).all()
    assert torch.isfinite(found).all()
    torch.sigmoid(0.3 - found).sum().backward()
    assert torch.isfinite(q.grad).all()
    assert torch.isfinite(k.grad).all()
    assert not q.grad[0, :, 1].any()
    assert q.grad[0, :, 2].abs().min() > 0
    assert (torch.sigmoid(0.3 - found)[0, :, 1] == 1).all()


@pytest.mark.parametrize("name", [*MASKS, "causal"])
@pytest.mark.parametrize("scores", [1, 2 * BATCH * HEADS * KEYS])
def test_in_pieces_it_has_the_same_values_and_gradients(monkeypatch, name, scores):
    """One row at a time, and two with one left over."""
    mask, causal = MASKS.get(name), name == "causal"

    def run() -> list[torch.Tensor]:
        q, k = (value.requires_grad_() for value in drawn())
        found = log_partition(q, k, mask, SCALE, causal)
        found.square().sum().backward()
        return [found.detach(), q.grad, k.grad]

    whole = run()
    sizes = []
    original = torch.Tensor.logsumexp
    monkeypatch.setattr(torch.Tensor, "logsumexp", lambda x, dim: sizes.append(x.numel()) or original(x, dim))
    monkeypatch.setattr(module, "SCORES", scores)
    parts = run()
    assert len(sizes) > 2
    assert max(sizes) <= max(scores, BATCH * HEADS * KEYS)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_summed_in_float32(autocast):
    q, k = drawn(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = log_partition(q, k, visible(), SCALE, False)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), by_loops(q.double(), k.double(), visible(), False), rtol=0, atol=1e-6)


def test_it_is_what_the_kernel_divides_by():
    """Ones as values, with one key more of logit 0: the kernel gives Z / (Z + 1)."""
    q, k = drawn(rows=KEYS)
    more = F.pad(k, (0, 0, 0, 1)).repeat_interleave(HEADS // KV, 1)
    ones = F.pad(torch.ones(BATCH, HEADS, KEYS, 1, dtype=q.dtype), (0, 0, 0, 1))
    mask = F.pad(torch.ones(KEYS, KEYS, dtype=torch.bool).tril(), (0, 1), value=True)
    share = F.scaled_dot_product_attention(q, more, ones, mask, scale=SCALE)[..., 0]
    torch.testing.assert_close(torch.sigmoid(log_partition(q, k, None, SCALE, True)), share, rtol=0, atol=1e-14)
