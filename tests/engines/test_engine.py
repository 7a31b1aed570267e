"""An engine of a few lines, made and registered as CONTRIBUTING says."""

from __future__ import annotations

import pytest
import torch

from _engines import layer, with_gradients
from softsphere import LinearSphericalOptions
from softsphere.engines import choose, dispatch
from softsphere.engines.engine import Engine, Settings
from softsphere.engines.operators import LinearOperator
from softsphere.functional import linear_spherical_loss

TIGHT = {"rtol": 1e-10, "atol": 1e-11}
PLAIN = Settings(False, None, None, torch.float64, False)


def outer_statistics(x, how):
    """s, q, c, and the outputs for the backward: an engine of a few lines."""
    o = x.H.to(how.dtype) @ x.W.to(how.dtype).mT
    return o.sum(1), o.square().sum(1), o.gather(1, x.target), o


def outer_gradients(g, x, kept, how, needs):
    (o,) = kept
    G = (g.s[:, None] + 2 * g.q[:, None] * o).scatter_add(1, x.target, g.c)
    return G @ x.W if needs[0] else None, G.mT @ x.H if needs[1] else None, None


def test_an_engine_is_one_file_and_one_line_in_the_list(monkeypatch):
    """The recipe of CONTRIBUTING, followed to the letter."""
    operator = LinearOperator("outer", outer_statistics, outer_gradients, keeps=("mD",))
    OUTER = Engine("outer", operator, cost=lambda work: 1.0, chunks=("row_chunk",))
    monkeypatch.setitem(dispatch.ENGINES, "outer", OUTER)
    H, W, _ = layer(5, 123, 4)
    target, want = torch.tensor([0, 7, 7, 122, 3]), []
    for options in (
        LinearSphericalOptions(engine="dense"),
        LinearSphericalOptions(engine="outer", row_chunk=3),
        LinearSphericalOptions(),
    ):
        for compiled in (False, True):

            def call(H, W, options=options):
                return linear_spherical_loss(H, W, target, "taylor_softmax", options=options)

            if compiled:
                call = torch.compile(call, fullgraph=True, backend="aot_eager")
            got = with_gradients(call(H, W), H, W)
            want = want or got
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y, **TIGHT)
    assert choose(5, 123, 4, torch.float64, "cpu").engine == "outer"
    with pytest.raises(ValueError, match=r"class_chunk has no meaning for engine='outer'"):
        LinearSphericalOptions(engine="outer", class_chunk=3)
    torch.library.opcheck(operator.forward_operator, (H, W, None, target[:, None], None, *PLAIN))
