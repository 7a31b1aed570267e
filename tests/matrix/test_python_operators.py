"""Python's operators on a weight and its gradient: the numbers of a dense tensor, or a sentence."""

from __future__ import annotations

import operator

import pytest
import torch

from softsphere import FactoredSphericalLoss
from softsphere.matrix import FactoredTensor, StructuredGradient

OPERATORS = [
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("lt", "le", "gt", "ge", "eq", "ne"),
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
]
OPERANDS = {
    "number": 2.0,
    "dense": torch.full((7, 4), 3.0).double(),
    "vector": torch.arange(1.0, 5.0).double(),
    "matrix": torch.ones(4, 2).double(),
    "rows": torch.ones(2, 7).double(),
}


def subject(kind: str):
    torch.manual_seed(0)
    head = FactoredSphericalLoss(3, 7, dtype=torch.float64)
    if kind == "weight":
        return head.weight.detach()
    head(torch.randn(2, 3).double(), torch.tensor([1, 5])).backward()
    return head.weight.grad


def dense_of(x):
    return x.to_dense() if isinstance(x, (FactoredTensor, StructuredGradient)) else x


@pytest.mark.parametrize("reflected", [False, True])
@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("kind", ["weight", "gradient"])
def test_an_operator_gives_the_dense_numbers_or_says_what_to_do(kind, name, operand, reflected):
    x, other, apply = subject(kind), OPERANDS[operand], getattr(operator, name)
    before = x.to_dense()
    pair = (other, x) if reflected else (x, other)
    if isinstance(pair[0], torch.Tensor) and name.startswith("i"):
        pair = (pair[0].clone(), pair[1])
    try:
        want = apply(
            *(y.clone() if isinstance(y, torch.Tensor) else y for y in map(dense_of, pair))
        )
    except (RuntimeError, TypeError) as error:
        with pytest.raises((type(error), TypeError)):
            apply(*pair)
        return
    try:
        got = apply(*pair)
    except TypeError as error:
        assert "factored weight" in str(error)  # noqa: PT017
        assert "unsupported operand" not in str(error)  # noqa: PT017
        torch.testing.assert_close(x.to_dense(), before, rtol=0, atol=0)
    else:
        torch.testing.assert_close(dense_of(got), want)


def test_other_operands_are_left_to_python():
    W = subject("weight")
    assert W != "a word"
    with pytest.raises(TypeError, match="unsupported operand"):
        W + "a word"


def test_a_number_divided_by_a_gradient_is_refused():
    with pytest.raises(TypeError, match=r"aten\.div"):
        torch.div(torch.tensor(2.0).double(), subject("gradient"))
