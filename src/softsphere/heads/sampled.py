"""The output layer for softmax that is trained on some of its classes at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softsphere import checks, losses
from softsphere.engines import LinearSphericalOptions
from softsphere.engines.repeated_rows import repeated_rows
from softsphere.engines.row_statistics import wide_dtype
from softsphere.engines.wide_outputs import wide_outputs
from softsphere.functional.conventions import Conventions, mixed_precision, multiplied_dtype
from softsphere.heads.affine import made_dtype, start_as_linear, whole_layer
from softsphere.heads.constructor_argument import LINEAR_HAS_IT, ConstructorArgument
from softsphere.heads.dense_reader import DenseReader
from softsphere.heads.negatives import SAMPLES, Sampler, sampler_of
from softsphere.heads.prediction import OutputLayer
from softsphere.losses import Softmax

__all__ = ["SampledSoftmaxLoss"]


class SampledSoftmaxLoss(OutputLayer):
    r"""Softmax trained on sampled negatives, in one module with its linear output layer.

    In training, loss = head(hidden, target) is an estimate of the softmax loss log Z − o_t of the
    outputs o = W h + b:

        log(e^{o_t} + Σ_{j: k_j ≠ t} e^{o_{k_j} − log E(k_j)}) − o_t,

    where the negatives k_1 … k_n are shared by all rows, E(k) is the expected number of times that
    class k is among them, and negatives that are the target of a row are left out of that row. The
    sum in the logarithm is an unbiased estimate of Z. The loss itself comes out too low on average,
    by about half the relative variance of that sum, so training losses cannot be compared with
    those of other layers, nor between numbers of samples.

    In evaluation, after `head.eval()`, the loss is that of softmax itself. `log_prob`, `predict`,
    `topk` and `rank` are exact in both modes. All of these need the D outputs of each row. Without
    a gradient they are computed in chunks, and no m × D tensor is made.

    The samplers are

    * "log_uniform": E_k = min(1, λ log(1 + 1/(k + 1))) with Σ_k E_k = n. Classes must be numbered
      from the commonest to the rarest.
    * "frequency": E_k = min(1, λ counts_k^power) with Σ_k E_k = n.
    * "in_batch": the targets of the other rows. E_k = (m − 1) counts_k / Σ_j counts_j for m rows,
      whose targets must be independent of each other, as in batches that were shuffled.
      Without counts E_k = 1: then the outputs learn log p − log q up to a constant, with q the
      share of each class among the targets, and neither their softmax nor the loss in evaluation is
      what was trained. A batch of one row has no negatives, and a loss of 0.

    The commonest classes, those with E_k = 1, are always negatives. The others are drawn one from
    each of equal parts of the distribution, by PyTorch's generator, so that `torch.manual_seed`
    repeats them. If n is at least D, every class is a negative, and the loss is softmax itself.

    Args:
        in_features: d.
        num_classes: D.
        num_samples: n, the number of negatives of a step; None stands for 1024. "in_batch" takes
            none.
        sampler: "log_uniform", "frequency" or "in_batch".
        counts: (D), how often each class is a target in training, which "frequency" needs. A class
            with a count of 0 is given that of the rarest one.
        power: the exponent of counts for "frequency": 1 for the counts, 0 for equal shares.
        bias: whether there is a b.
        sparse: whether the gradients of weight and bias are sparse tensors, as those of
            `nn.Embedding(sparse=True)`, for `SGD`, `SparseAdam` and `Adagrad`. A step then touches
            the rows of the targets and the negatives only. DistributedDataParallel takes sparse
            gradients of `nn.Embedding` alone.
        reduction, ignore_index: as in `nn.CrossEntropyLoss`.
        device, dtype: of weight and bias. The dtype is float16, bfloat16, float32 or float64.

    The parameters `weight` and `bias` are W and b, with the names, shapes and initial values of
    `nn.Linear`, and nothing else is in the state_dict.

    Shapes: hidden (…, d); target (…), class indices of any integer dtype.

    A training step takes 6 m n d FLOPs for m rows and reads m + n rows of W, whatever D is; with
    dense gradients it writes D d numbers more. An exact loss takes 2 m D d. The tables of
    "log_uniform" and "frequency" have 16 D bytes.

    `tf.nn.sampled_softmax_loss` corrects the output of the target by log E(t) as well. The target
    is there with certainty and not by chance, so its sum is not an estimate of Z.

    Raises ValueError or TypeError for invalid arguments. The message names the argument, the value
    received and a valid alternative.

    Source: Bengio & Senécal 2008, "Adaptive importance sampling to accelerate training of a neural
    probabilistic language model"; Jean et al. 2015, arXiv:1412.2007; Blanc & Rendle 2018,
    arXiv:1712.00527, for the estimate; Yi et al. 2019, "Sampling-bias-corrected neural modeling for
    large corpus item recommendations", for negatives in the batch; Khrylchenko et al. 2025,
    arXiv:2507.09331, for a target without correction.

    >>> head = SampledSoftmaxLoss(8, 1000, num_samples=100)
    >>> hidden, target = torch.randn(4, 8), torch.tensor([1, 5, 5, 999])
    >>> head(hidden, target).backward()
    >>> exact = head.eval()(hidden, target)
    >>> bool((exact + head.log_prob(hidden)[range(4), target].mean()).abs() < 1e-5)
    True
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    counts = ConstructorArgument()
    prior = ConstructorArgument(instead=LINEAR_HAS_IT)
    label_smoothing = ConstructorArgument(instead=LINEAR_HAS_IT)
    class_weight = ConstructorArgument(instead=LINEAR_HAS_IT)

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_samples: int | None = None,
        *,
        sampler: str = "log_uniform",
        counts: Tensor | None = None,
        power: float = 1.0,
        bias: bool = True,
        sparse: bool = False,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = checks.at_least_one("in_features", in_features)
        num_classes = checks.at_least_one("num_classes", num_classes)
        checks.flag("bias", bias)
        self.sparse = checks.flag("sparse", sparse)
        made_dtype(dtype)
        self.loss = Softmax()
        if num_samples is None and sampler != "in_batch":
            num_samples = SAMPLES
        self._sampler: Sampler = sampler_of(sampler, num_classes, num_samples, counts, power)
        n = None if num_samples is None else checks.integer("num_samples", num_samples)
        self._settings = sampler, n, power
        given = Conventions.checked(self.loss, reduction=reduction, ignore_index=ignore_index)
        self.reduction, self.ignore_index = given.reduction, given.ignore_index
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, **made))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_classes, **made)) if bias else None
        )
        self._move_sampler()
        self.reset_parameters()

    @property
    def in_features(self) -> int:
        """d, the second size of the weight as it is now."""
        return self.weight.shape[-1]

    @property
    def num_classes(self) -> int:
        """D, the first size of the weight as it is now."""
        return self.weight.shape[0]

    @property
    def sampler(self) -> str:
        """The name of the sampler. To change it or its numbers, make a new layer."""
        return self._settings[0]

    @property
    def num_samples(self) -> int | None:
        """n, the number of negatives of a step; None where they are the targets of the batch."""
        return self._settings[1]

    @property
    def power(self) -> float:
        """The exponent of counts."""
        return self._settings[2]

    @property
    def base_measure(self) -> None:
        """None: π = 1."""
        return None

    def _usable_loss(self, loss: Any) -> Softmax:
        """Raises TypeError for another loss than softmax, whose Z alone is sampled."""
        given = losses.get(loss)
        if type(given) is not Softmax:
            raise TypeError(
                f"loss of a SampledSoftmaxLoss must be softmax, got {given}; use ClusteredLoss or "
                "LinearSphericalLoss for another loss"
            )
        return given

    def reset_parameters(self) -> None:
        """Draws the initial values of `nn.Linear`, uniform within ±1/√d."""
        start_as_linear(self.weight, self.bias)

    def forward(
        self, hidden: Tensor, target: Tensor, target_values: None = None, mask: None = None
    ) -> Tensor:
        """Computes the loss of hidden (…, d) against target: an estimate in training, else exact.

        Args:
            hidden: (…, d), floating-point.
            target: (…), class indices of any integer dtype.
            target_values, mask: must be None. `LinearSphericalLoss` takes them.

        Returns a scalar, or (…) for reduction "none". The mean of no rows at all is NaN.

        Raises ValueError or TypeError for invalid arguments.
        """
        for name, value in (("target_values", target_values), ("mask", mask)):
            if value is not None:
                raise TypeError(
                    f"{name} cannot be used with a SampledSoftmaxLoss, whose rows have one target "
                    f"each and whose negatives are of all classes; use LinearSphericalLoss with "
                    "loss='softmax'"
                )
        reader = self._reader()
        reader.check(hidden)
        checks.same_device("target", target, "hidden", hidden)
        checks.rows_target(hidden.shape[:-1], target)
        conventions = self.conventions
        wide = wide_dtype(hidden.dtype)
        entries = conventions.entries(target.reshape(-1), None, reader.num_classes, wide)
        t = entries.t.squeeze(-1)
        if self.training:
            H = hidden.reshape(-1, reader.in_features)
            rows = self._estimate(reader, H, t, entries.ignored)
        else:
            rows = _exact(reader, hidden, t)
        rows = entries.weigh(rows, overflows=False)
        return conventions.finish(rows.view(target.shape), entries.counted, hidden)

    def _estimate(self, reader: DenseReader, H: Tensor, target: Tensor, ignored: Tensor) -> Tensor:
        """The losses of rows H (m, d) on negatives: (m), in float32 or wider."""
        W, b, m = reader.W, reader.b, len(H)
        if not mixed_precision(H):
            checks.same_dtype(H, W, b, ("hidden", "weight", "bias"))
        known = self._sampler.num_classes
        if known not in (None, len(W)):
            raise ValueError(
                f"weight must have {known} rows, one for each class that can be drawn, got "
                f"{len(W)}; make a new layer for them, with counts of these classes"
            )
        wide = wide_dtype(H.dtype)
        classes, log_expected = self._sampler.choose(target, ignored, wide)
        every, sizes = torch.cat([target, classes]), [m, len(classes)]
        own_rows, rows = repeated_rows(W, every, wide, sparse=self.sparse).split(sizes)
        own_bias, bias = None, None
        if b is not None:
            own_bias, bias = repeated_rows(b, every, wide, sparse=self.sparse).split(sizes)
        o = wide_outputs(H, rows, multiplied_dtype(H))
        own = (H.to(wide) * own_rows).sum(1)
        if own_bias is not None and bias is not None:
            own, o = own + own_bias, o + bias
        o = o - log_expected
        none = (classes == target.unsqueeze(1)) | log_expected.isinf()
        # A batch may leave a row no negative. Its loss is 0, but infinite outputs alone would have
        # derivatives that are not numbers.
        alone = none.all(1)
        others = o.masked_fill(none, -torch.inf).masked_fill(alone.unsqueeze(1), 0.0).logsumexp(1)
        return -F.logsigmoid(own - others).masked_fill(alone, 0.0)

    def _reader(self) -> DenseReader:
        layer = whole_layer(self.weight, self.bias, {})
        W, b, _ = layer
        checks.same_dtype(W, W, b, ("weight", "weight", "bias"))
        return DenseReader(layer, None, self.loss, LinearSphericalOptions())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SampledSoftmaxLoss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._move_sampler()
        return self

    def _move_sampler(self) -> None:
        """Moves the tables of the sampler to the device of the weight, if that has float64."""
        if not self.weight.is_meta:
            with contextlib.suppress(TypeError):  # a device without float64, such as Apple's
                self._sampler = self._sampler.to(self.weight.device)

    def extra_repr(self) -> str:
        drawn = "" if self.sampler == "in_batch" else f", num_samples={self.num_samples}"
        return (
            f"{self.in_features}, {self.num_classes}{drawn}, sampler={self.sampler!r}, "
            f"bias={self.bias is not None}, sparse={self.sparse}, reduction={self.reduction!r}, "
            f"ignore_index={self.ignore_index}"
        )


def _exact(reader: DenseReader, hidden: Tensor, target: Tensor) -> Tensor:
    """The losses of hidden (…, d) on all classes: (m), with the digits of `log_prob`."""
    with torch.autocast(hidden.device.type, enabled=False):
        H = reader.rows_of(hidden)
        own = (H * reader.weight_rows(target)).sum(1)
        return reader.check_normaliser(H, reader.log_normaliser(H)) - own
