"""`connectivity_topk`: which keys does each query attend to? (Sparsifiner, arXiv 2303.13755, section 3.2)

A row of attention is approximated by a mixture of few basis rows. Where it is large, the query attends.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library
from ._checks import FLOATS
from ._operator import _batched, hands_over, holds_values, replacement, wide_dtype

# --- the definition ---------------------------------------------------------------------------------------------------


def reference(
    logits: Tensor,
    basis: Tensor,
    candidates: Optional[Tensor],
    num_keys: int,
    num_coefficients: int,
    coefficient_threshold: float,
    basis_threshold: float,
    score_threshold: float,
) -> Tensor:
    """The definition. Zero for `num_keys` or `num_coefficients` stands for choosing by threshold."""
    logits, basis = logits.to(wide_dtype(logits)), basis.to(wide_dtype(logits))
    coefficients = logits.softmax(-1)
    if 0 < num_coefficients < logits.shape[-1]:
        # the same choice as by coefficient, but for rounding: small logits make coefficients that are almost equal
        largest = logits.topk(num_coefficients, -1, sorted=False).indices
        values = coefficients.gather(-1, largest)
        coefficients = torch.zeros_like(coefficients).scatter(-1, largest, values)
    elif coefficient_threshold > 0:
        coefficients = F.threshold(coefficients, coefficient_threshold, 0.0)
    rows = F.threshold(basis.abs(), basis_threshold, 0.0)
    if candidates is not None:
        rows = rows.t()[candidates].transpose(1, 2).unsqueeze(1)
    scores = coefficients @ rows
    if num_keys > 0:
        return scores.topk(num_keys, -1, sorted=False).indices
    columns = torch.arange(scores.shape[-1], device=scores.device)
    return torch.where(scores > score_threshold, columns, -1)


_ARGUMENTS = (
    "Tensor logits, Tensor basis, Tensor? candidates, int num_keys, int num_coefficients, "
    "float coefficient_threshold, float basis_threshold, float score_threshold"
)
_lib = torch.library.Library("vitrail", "FRAGMENT")
_lib.define(f"connectivity_topk({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _kernel(logits, basis, candidates, *settings):
    """Kernel of last resort: hands over to the compiled library once that is loaded, else runs the definition."""
    device = logits.device.type
    if hands_over("connectivity_topk", device, ("cpu", "cuda")):
        return torch.ops.vitrail.connectivity_topk(logits, basis, candidates, *settings)
    if candidates is not None and device == "cpu":
        check_candidates_in_range(candidates, basis.shape[1])
    return reference(logits, basis, candidates, *settings)


_lib.impl("connectivity_topk", _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("vitrail::connectivity_topk", lib=_lib)
def _fake(logits, basis, candidates, num_keys, *_):
    slots = num_keys or (basis.shape[1] if candidates is None else candidates.shape[1])
    return logits.new_empty((*logits.shape[:3], slots), dtype=torch.int64)


@torch.library.register_vmap("vitrail::connectivity_topk", lib=_lib)
def _vmap(info, in_dims, *args):
    return _batched(torch.ops.vitrail.connectivity_topk, info, in_dims, args, {1}, in_dims[1] is None)


# --- which path -------------------------------------------------------------------------------------------------------

# What a block of threads has memory for, as csrc/ops/connectivity_topk.cu says it.
_MOST_NUMBERS = 24 * 1024


def fits_gpu(logits: Tensor, basis: Tensor, candidates: Optional[Tensor]) -> bool:
    """Whether the GPU kernel takes these arguments; the definition runs where it does not."""
    rows, keys = basis.shape[0], (basis if candidates is None else candidates).shape[1]
    return logits.dtype != torch.float64 and max(keys, rows) + 2 * rows <= _MOST_NUMBERS


def choose(logits: Tensor, basis: Tensor, candidates: Optional[Tensor], *settings) -> Tensor:
    """The keys, along the path in force; arguments as the operator has them, checked but for their values."""
    args = (logits, basis, candidates, *settings)
    if (stands_for := replacement("connectivity_topk", reference, _fake, args)) is not None:
        return stands_for
    if library.mode() == "reference":
        if candidates is not None and holds_values(candidates):
            check_candidates_in_range(candidates, basis.shape[1])
        return reference(logits, basis, candidates, *settings)
    if logits.is_cuda and not fits_gpu(logits, basis, candidates):
        return reference(logits, basis, candidates, *settings)
    return torch.ops.vitrail.connectivity_topk(logits, basis, candidates, *settings)


# --- the public function ----------------------------------------------------------------------------------------------


def check_candidates_in_range(candidates: Tensor, tokens: int) -> None:
    """Every candidate names a token of the basis, else an IndexError. Reads values."""
    wrong = ((candidates < 0) | (candidates >= tokens)).nonzero()
    if len(wrong):
        at = wrong[0].tolist()
        raise IndexError(
            f"candidates{at} is {int(candidates[tuple(at)])}, but the basis has {tokens} tokens: "
            f"allowed are 0 to {tokens - 1}"
        )


def _check_tensor(name: str, x: Tensor, layout: str, dims: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {layout}, got {type(x).__name__}")
    if x.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions {layout}, got shape {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}; convert it with .to()")


def check_choice(
    ref_name: str,
    ref: Tensor,
    rows: int,
    basis: Tensor,
    num_keys: int,
    num_coefficients: int,
    coefficient_threshold: float,
    basis_threshold: float,
    score_threshold: float,
    candidates: Optional[Tensor],
) -> None:
    """The arguments that say how keys are chosen: `rows` basis rows for the images of `ref`, on its device."""
    _check_tensor("basis", basis, "(n, N)", 2)
    if basis.device != ref.device:
        raise ValueError(
            f"basis is on {basis.device} but {ref_name} is on {ref.device}; move one of them with .to()"
        )
    if basis.shape[0] != rows or rows < 1:
        raise ValueError(
            f"basis must have one row per logit, {rows} (at least 1), got shape {tuple(basis.shape)}"
        )
    tokens = basis.shape[1]
    if candidates is not None:
        if candidates.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"candidates must be int32 or int64, got {candidates.dtype}; convert it with .long()"
            )
        if candidates.device != ref.device:
            raise ValueError(
                f"candidates is on {candidates.device} but {ref_name} is on {ref.device}; "
                "move one of them with .to()"
            )
        if candidates.dim() != 2 or candidates.shape[0] != ref.shape[0]:
            raise ValueError(
                f"candidates must have shape (batch {ref.shape[0]}, tokens), got {tuple(candidates.shape)}"
            )
        tokens = candidates.shape[1]
    if not 0 <= num_keys <= tokens:
        raise ValueError(
            f"num_keys must lie between 1 and the number of candidates, {tokens}; got {num_keys}"
        )
    if num_coefficients < 0:
        raise ValueError(f"num_coefficients must be positive, or 0 for all, got {num_coefficients}")
    for name, value in (
        ("coefficient_threshold", coefficient_threshold),
        ("basis_threshold", basis_threshold),
        ("score_threshold", score_threshold),
    ):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if num_keys == 0 and score_threshold == 0:
        raise ValueError("say which keys to keep: num_keys (at least 1), or a positive score_threshold")
    if num_keys > 0 and score_threshold > 0:
        raise ValueError(
            f"keys are kept by number or by threshold, got num_keys {num_keys} and score_threshold {score_threshold}"
        )
    if num_coefficients > 0 and coefficient_threshold > 0:
        raise ValueError(
            "coefficients are kept by number or by threshold, "
            f"got num_coefficients {num_coefficients} and coefficient_threshold {coefficient_threshold}"
        )


def connectivity_topk(
    logits: Tensor,
    basis: Tensor,
    num_keys: int = 0,
    num_coefficients: int = 0,
    basis_threshold: float = 0.0,
    coefficient_threshold: float = 0.0,
    score_threshold: float = 0.0,
    candidates: Optional[Tensor] = None,
) -> Tensor:
    """For every query, the keys where its mixture of basis rows is largest; what `sparse_attention` takes.

    Sparsifiner, arXiv 2303.13755, section 3.2. A query's coefficients are the softmax of its logits. Its row of scores
    is the sum of the kept coefficients times |basis|, in which entries up to `basis_threshold` are zero; the kept
    coefficients are not renormalised. The matrix of these rows is no part of the interface, so none need be stored. The
    choice carries no gradient.

    Keys are chosen by number even where their score is zero. Among equal scores the choice is arbitrary (the definition
    leaves it to `torch.topk`, as the authors do).

    Args:
        logits: `(B, heads, Nq, n)`; float32, float64, bfloat16 or float16 (softmax and sums are float32, float64 for
            float64). Their softmax are the coefficients.
        basis: `(n, N)`, any floating-point dtype and any strides, on the same device.
        num_keys: how many keys each query keeps; 0 to choose by `score_threshold`.
        num_coefficients: how many of the coefficients each query keeps, the largest; 0 to choose by
            `coefficient_threshold`, which keeps all by default.
        basis_threshold: entries of |basis| up to this are zero.
        coefficient_threshold: coefficients up to this are dropped.
        score_threshold: scores up to this make no key.
        candidates: `(B, M)` int32 or int64: the tokens of the basis that are keys, in the order of the keys; default:
            all. With it, pruned tokens cost nothing: they are no keys, and no queries either.

    Returns:
        `(B, heads, Nq, num_keys)` int64 in no particular order; by threshold `(B, heads, Nq, N or M)`, -1 where a slot
        is empty. Numbers count the keys, so with `candidates` they are places in that list.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes or devices that do not fit, a number or threshold out of range, or both where one is due.
        IndexError: a candidate that names no token.
    """
    settings = (num_keys, num_coefficients, coefficient_threshold, basis_threshold, score_threshold)
    if torch.jit.is_scripting():
        return torch.ops.vitrail.connectivity_topk(
            logits.detach(),
            basis.detach(),
            candidates,
            num_keys,
            num_coefficients,
            coefficient_threshold,
            basis_threshold,
            score_threshold,
        )
    _check_tensor("logits", logits, "(B, heads, queries, n)", 4)
    check_choice("logits", logits, logits.shape[3], basis, *settings, candidates)
    return choose(logits.detach(), basis.detach(), candidates, *settings)
