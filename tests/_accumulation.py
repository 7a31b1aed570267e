"""A layer, batches and comparisons for the tests of accumulate()."""

from __future__ import annotations

import torch

from softsphere import LinearSphericalLoss, LinearSphericalOptions

d, D = 6, 123
TIGHT = {"rtol": 1e-10, "atol": 1e-11}
SMALL_CHUNKS = LinearSphericalOptions(class_chunk=50)


def layer(loss="taylor_softmax", bias=True, prior=False, **options):
    torch.manual_seed(0)
    counts = torch.rand(D).double() + 0.2 if prior else None
    options = {"dtype": torch.float64, "options": SMALL_CHUNKS, **options}
    return LinearSphericalLoss(d, D, loss, bias, counts, **options)


def batches(number=3):
    torch.manual_seed(1)
    return [
        (torch.randn(m, d).double().requires_grad_(), torch.randint(D // 20, (m,)))
        for m in range(4, 4 + number)
    ]


def run(head, data):
    for hidden, target in data:
        (head(hidden, target) / len(data)).backward()


def same(one, two):
    for x, y in zip(one.parameters(), two.parameters(), strict=True):
        if x.grad is None or y.grad is None:
            assert x.grad is y.grad
        else:
            torch.testing.assert_close(x.grad, y.grad, **TIGHT)
