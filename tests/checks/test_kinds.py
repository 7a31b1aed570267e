"""Tensors that cannot be computed with are refused in a sentence, by every form of a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from softsphere import (
    FactoredSphericalLoss,
    LinearSphericalLoss,
    SampledSoftmaxLoss,
    SphericalLoss,
)
from softsphere.functional import linear_spherical_loss, log_prob, spherical_loss, taylor_softmax

INPUT, TARGET = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
W = torch.zeros(5, 3)


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)], layout=torch.jagged)


KINDS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "sparse": (INPUT.to_sparse, r"dense tensor, got layout torch.sparse_coo; use .*to_dense"),
    "csr": (INPUT.to_sparse_csr, r"dense tensor, got layout torch.sparse_csr"),
    "nested": (nested, "an ordinary tensor, got a nested one"),
    "float8": (
        lambda: INPUT.to(torch.float8_e4m3fn),
        r"float16, bfloat16, float32 or float64, got torch.float8_e4m3fn",
    ),
    "complex": (lambda: INPUT.to(torch.complex64), r"got torch.complex64; use .*real"),
    "quantised": (
        lambda: torch.quantize_per_tensor(INPUT, 0.1, 0, torch.qint8),
        "must not be quantised|got torch.qint8",
    ),
    "integers": (INPUT.long, r"floating-point tensor, got torch.int64; use .*float"),
}
USES: dict[str, Callable[[Any], Any]] = {
    "input of spherical_loss": lambda x: spherical_loss(x, TARGET, "z_loss"),
    "input of SphericalLoss": lambda x: SphericalLoss("softmax")(x, TARGET),
    "input of log_prob": lambda x: log_prob(x, "softmax"),
    "input of taylor_softmax": taylor_softmax,
    "input of predict": lambda x: SphericalLoss("softmax").predict(x),
    "input of linear_spherical_loss": lambda x: linear_spherical_loss(x, W, TARGET, "z_loss"),
    "linear_weight of linear_spherical_loss": lambda x: linear_spherical_loss(
        INPUT, x, TARGET, "z_loss"
    ),
    "hidden of LinearSphericalLoss": lambda x: LinearSphericalLoss(3, 5)(x, TARGET),
    "hidden of FactoredSphericalLoss": lambda x: FactoredSphericalLoss(3, 5)(x, TARGET),
    "hidden of SampledSoftmaxLoss": lambda x: SampledSoftmaxLoss(3, 5)(x, TARGET),
    "hidden of predict": lambda x: LinearSphericalLoss(3, 5).predict(x),
}


@pytest.mark.filterwarnings("ignore")  # of PyTorch's, for prototypes of layouts and dtypes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", USES)
def test_kinds_of_numbers(use, kind):
    make, message = KINDS[kind]
    name = use.split()[0]
    with pytest.raises(TypeError, match=rf"^{name} must .*({message})"):
        USES[use](make())


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "spherical_loss": lambda t: spherical_loss(INPUT, t, "z_loss"),
    "linear_spherical_loss": lambda t: linear_spherical_loss(INPUT, W, t, "z_loss"),
    "LinearSphericalLoss": lambda t: LinearSphericalLoss(3, 5)(INPUT, t),
    "FactoredSphericalLoss": lambda t: FactoredSphericalLoss(3, 5)(INPUT, t),
    "SampledSoftmaxLoss": lambda t: SampledSoftmaxLoss(3, 5)(INPUT, t),
}
TARGETS: dict[str, Callable[[], Tensor]] = {
    "sparse": TARGET.to_sparse,
    "nested": nested,
    "complex": lambda: TARGET.to(torch.complex64),
    "bool": TARGET.bool,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_kinds_of_targets(form, kind):
    with pytest.raises(TypeError, match=r"^target must "):
        FORMS[form](TARGETS[kind]())


ELSEWHERE: dict[str, Callable[[], Any]] = {
    "target": lambda: spherical_loss(INPUT, TARGET.to("meta"), "z_loss"),
    "weight": lambda: spherical_loss(INPUT, TARGET, "z_loss", weight=torch.ones(3, device="meta")),
    "prior": lambda: SphericalLoss("z_loss", prior=torch.ones(3, device="meta"))(INPUT, TARGET),
    "mask": lambda: spherical_loss(
        INPUT, TARGET, "z_loss", mask=torch.ones(3, device="meta").bool()
    ),
    "mask of log_prob": lambda: log_prob(
        INPUT, "softmax", mask=torch.ones(3, device="meta").bool()
    ),
    "target_values": lambda: spherical_loss(
        INPUT, TARGET[:, None], "z_loss", target_values=torch.ones(4, 1, device="meta")
    ),
    "linear_weight": lambda: linear_spherical_loss(INPUT, W.to("meta"), TARGET, "z_loss"),
    "linear_bias": lambda: linear_spherical_loss(
        INPUT, W, TARGET, "z_loss", linear_bias=torch.zeros(5, device="meta")
    ),
    "target of linear_spherical_loss": lambda: linear_spherical_loss(
        INPUT, W, TARGET.to("meta"), "z_loss"
    ),
    "prior of linear_spherical_loss": lambda: linear_spherical_loss(
        INPUT, W, TARGET, "z_loss", prior=torch.ones(5, device="meta")
    ),
}


@pytest.mark.parametrize("argument", ELSEWHERE)
def test_tensors_on_another_device(argument):
    name = argument.split()[0]
    with pytest.raises(ValueError, match=f"^{name} must be on the device of input, cpu, got meta"):
        ELSEWHERE[argument]()
