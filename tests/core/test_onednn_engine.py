"""Products of oneDNN in the place of PyTorch's own: the eager engine up to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bacinfer
from bacinfer import CacheSchedule, PolicyHandle, SamplingPlan
from bacinfer.core.blocks import find_blocks
from bacinfer.core.engines import onednn

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch without oneDNN")

K = 4
WIDTH, TOKENS = 512, 64  # feed-forward products are large enough, those of 512 x 512 are not


class Policy:
    """Denoises by one transformer layer of a size at which products are oneDNN's."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    def sample(self, condition: Tensor) -> Tensor:
        x = condition
        for _ in range(K):
            x = 0.5 * x + 0.1 * self.model(x + condition)
        return x


@pytest.fixture
def policy() -> PolicyHandle:
    made = Policy()
    return PolicyHandle(made.model, K, (made, "sample"))


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The weights' shapes of the products that oneDNN computes."""
    found: list[tuple[int, ...]] = []
    decide = onednn._is_for_onednn

    def decided(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        if found_it := decide(input, weight, bias):
            found.append(tuple(weight.shape))
        return found_it

    monkeypatch.setattr(onednn, "_is_for_onednn", decided)
    return found


def condition() -> Tensor:
    return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def act(policy: PolicyHandle) -> Tensor:
    with torch.no_grad():
        return policy(condition())


def test_it_equals_the_eager_engine_up_to_rounding(policy: PolicyHandle, sizes: list[tuple[int, ...]]) -> None:
    plain = act(policy)
    keys = [block.key for block in find_blocks(policy.model)]
    for schedule, num_computed in ((CacheSchedule.every_step(keys, K), K), (CacheSchedule.periodic(keys, K, 2), 2)):
        bacinfer.apply(policy, schedule, engine="eager")
        expected = act(policy)
        assert not sizes
        bacinfer.apply(policy, schedule, engine="onednn")
        found = act(policy)
        assert bacinfer.summary(policy).engine == "onednn"
        assert sizes.count((4 * WIDTH, WIDTH)) == sizes.count((WIDTH, 4 * WIDTH)) == 2 * num_computed
        assert (WIDTH, WIDTH) not in sizes
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (num_computed == K) == torch.allclose(found, plain, rtol=1e-5, atol=1e-5)
        sizes.clear()
    bacinfer.remove(policy)
    assert torch.equal(act(policy), plain)
    assert not sizes


def test_new_weights_count_at_once(policy: PolicyHandle) -> None:
    bacinfer.apply(policy, SamplingPlan(), engine="onednn")
    before = act(policy)
    policy.model.layers[0].linear1.weight.data.mul_(0.5)
    found = act(policy)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, act(bacinfer.remove(policy)), rtol=1e-5, atol=1e-5)


def test_what_onednn_does_not_stand_for(policy: PolicyHandle, sizes: list[tuple[int, ...]]) -> None:
    bacinfer.apply(policy, SamplingPlan(), engine="onednn")
    given = condition().requires_grad_()
    policy(given).sum().backward()
    assert given.grad is not None
    assert not sizes
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            act(policy)
        policy.model.double()
        assert policy(condition().double()).dtype == torch.float64
        policy.model.float()
        bacinfer.remove(policy)
        assert not sizes
        with onednn.OneDnnProducts():
            F.linear(torch.randn(TOKENS - 1, WIDTH), torch.randn(4 * WIDTH, WIDTH))
            F.linear(torch.randn(TOKENS, WIDTH), torch.randn(WIDTH, 4 * WIDTH).t())
            assert not sizes
            F.linear(torch.randn(TOKENS, WIDTH), torch.randn(4 * WIDTH, WIDTH))
    assert sizes == [(4 * WIDTH, WIDTH)]


def test_it_is_for_the_cpu(policy: PolicyHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="computes blocks by the policy's own code"):
        bacinfer.apply(policy, SamplingPlan(), engine="onednn", precision="bf16")
    policy.model.to("meta")
    with pytest.raises(ValueError, match=r"cannot run this policy on meta .* engine='eager' can"):
        bacinfer.apply(policy, SamplingPlan(), engine="onednn")
