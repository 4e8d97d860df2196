"""Linear operations: the same call on both parts. And what does not move with the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchnewton.curvature.complex_step.pair import (
    CONSTANTS,
    PYTHON_RULES,
    RULES,
    ComplexPair,
    Function,
    as_pair,
    im,
    is_pair,
    mapped,
    no_rule,
    paired,
    re,
    rule,
)
from torchnewton.record import RecordError

_LINEAR = """
    view reshape flatten unflatten transpose permute movedim moveaxis swapaxes swapdims t adjoint T mT H mH ravel
    squeeze unsqueeze expand expand_as repeat tile broadcast_to view_as reshape_as as_strided alias real imag conj
    narrow select slice chunk split split_with_sizes unsafe_chunk unsafe_split tensor_split hsplit vsplit dsplit unbind
    unfold diagonal diag diag_embed tril triu flip fliplr flipud roll rot90 repeat_interleave
    gather index_select take take_along_dim masked_select __getitem__ squeeze_copy view_copy
    contiguous clone to float double half bfloat16 type_as type cpu cuda resolve_conj resolve_neg
    sum mean nansum cumsum trace diff neg negative positive sum_to_size
    reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d
    upsample_bicubic2d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    nll_loss nll_loss_nd nll_loss2d affine_grid_generator
    fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn rfftn irfftn hfft ihfft fftshift ifftshift
    view_as_real view_as_complex _pack_padded_sequence _pad_packed_sequence
"""
_LIKE = ("view_as", "reshape_as", "expand_as", "type_as", "to", "__getitem__", "gather", "index_select", "take")
_JOINTLY_LINEAR = """
    cat concat concatenate stack hstack vstack dstack column_stack row_stack block_diag broadcast_tensors meshgrid
    atleast_1d atleast_2d atleast_3d scatter_add index_add index_copy index_put masked_scatter slice_scatter
    select_scatter diagonal_scatter complex
"""
_CONSTANT = """
    shape dtype device layout ndim itemsize nbytes names is_cuda is_cpu is_leaf is_sparse is_quantized is_meta is_mkldnn
    is_nested requires_grad grad_fn output_nr retains_grad grad _version _base data is_mps is_xpu volatile is_sparse_csr
    size dim ndimension numel nelement stride storage_offset element_size get_device is_floating_point is_complex
    is_contiguous is_signed is_inference is_conj is_neg is_same_size is_distributed is_nonzero data_ptr untyped_storage
    is_pinned has_names dim_order result_type can_cast is_set_to sym_numel sym_size
    eq ne lt le gt ge greater greater_equal less less_equal not_equal equal isclose allclose isin
    isnan isinf isfinite isposinf isneginf isreal any all nonzero count_nonzero logical_and logical_or
    logical_not logical_xor bitwise_and bitwise_or bitwise_not argmax argmin
    argsort argwhere sign sgn signbit floor ceil round trunc fix
    floor_divide __floordiv__ __rfloordiv__ heaviside searchsorted bucketize histc unique_dim
    item tolist __bool__ __float__ __int__ __index__ __contains__ int long short char byte bool numpy
    zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full
    new_tensor new_empty_strided one_hot multinomial bernoulli detach detach_ triu_indices tril_indices _is_view
"""

CONSTANTS.update(_CONSTANT.split())


def linear(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """f(x) + i f(y) for f that is linear in the pairs and has no other summand."""
    args, kwargs = tuple(args), dict(kwargs)
    if args and not is_pair(args[0]) and isinstance(args[0], Tensor):  # the pair is only to be like, as in x.view_as(z)
        if func.__name__ not in _LIKE:
            raise no_rule(func)
        return func(*re(args), **re(kwargs))
    return paired(func(*re(args), **re(kwargs)), func(*_im(args), **_im(kwargs)))


def jointly_linear(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The same where real tensors are summands or parts as well: their imaginary part is zero."""
    args, kwargs = tuple(args), dict(kwargs)
    zeroed = _im(_zeroed(args)), _im(_zeroed(kwargs))
    return paired(func(*re(args), **re(kwargs)), func(*zeroed[0], **zeroed[1]))


def _im(value: Any) -> Any:
    return mapped(lambda z: z.im, value)


def _zeroed(value: Any) -> Any:
    """Real floating-point tensors become zero; indices, masks and pairs stay."""
    if isinstance(value, Tensor) and not is_pair(value):
        return torch.zeros_like(value) if value.is_floating_point() or value.is_complex() else value
    if type(value) in (list, tuple):
        return type(value)([_zeroed(item) for item in value])
    if type(value) is dict:
        return {key: _zeroed(item) for key, item in value.items()}
    return value


for _rule in (linear, jointly_linear):
    vars(_rule)["takes_function"] = True
RULES.update(dict.fromkeys(_LINEAR.split(), linear))
RULES.update(dict.fromkeys(_JOINTLY_LINEAR.split(), jointly_linear))


def _on_real_part(func: Function) -> None:
    PYTHON_RULES[func] = lambda *args, **kwargs: func(*re(args), **re(kwargs))


PYTHON_RULES[Tensor.__hash__] = id
_UNIQUE = (torch.unique, torch.unique_consecutive, Tensor.unique, Tensor.unique_consecutive)
for _function in (Tensor.__repr__, Tensor.__format__, Tensor.__len__, Tensor.__eq__, *_UNIQUE):
    _on_real_part(_function)


@rule("requires_grad_")
def requires_grad_(input: Tensor, requires_grad: bool = True) -> Tensor:
    """Depends on the parameters already."""
    return input


@rule("__setitem__")
def setitem(target: Any, index: Any, value: Any) -> None:
    """target[index] = value, on both parts."""
    pair = target if isinstance(target, ComplexPair) else as_pair(target)
    pair.re[re(index)] = re(value)
    pair.im[re(index)] = im(value)


@rule("pad", "constant_pad_nd")
def pad(input: ComplexPair, pad: Sequence[int], *args: Any, **kwargs: Any) -> ComplexPair:
    """The padding is a constant."""
    if args and not isinstance(args[0], str):  # constant_pad_nd(input, pad, value)
        return ComplexPair(torch.constant_pad_nd(input.re, pad, *args), torch.constant_pad_nd(input.im, pad))
    mode = args[0] if args else kwargs.get("mode", "constant")
    return ComplexPair(F.pad(input.re, pad, *args, **kwargs), F.pad(input.im, pad, mode))


@rule("scatter")
def scatter(input: Any, dim: int, index: Tensor, src: Any = None, **kwargs: Any) -> ComplexPair:
    """Entries overwritten by those of a tensor or by a number."""
    src = kwargs.pop("value", src)
    if kwargs:
        raise RecordError("the complex step has no rule for scatter with `reduce`: take scatter_add.")
    return ComplexPair(re(input).scatter(dim, index, re(src)), im(input).scatter(dim, index, im(src)))


@rule("masked_fill")
def masked_fill(input: Any, mask: Any, value: Any) -> ComplexPair:
    """`value` where the mask is set."""
    real, imaginary = re(input), im(input)
    return ComplexPair(real.masked_fill(re(mask), re(value)), imaginary.masked_fill(re(mask), im(value)))


@rule("fill", "index_fill")
def fill(input: ComplexPair, *args: Any) -> ComplexPair:
    """A constant, everywhere or at an index."""
    if len(args) == 3:
        return ComplexPair(input.re.index_fill(*args[:2], re(args[2])), input.im.index_fill(*args[:2], im(args[2])))
    return ComplexPair(torch.full_like(input.re, 1.0) * re(args[0]), torch.full_like(input.im, 1.0) * im(args[0]))


@rule("zero")
def zero(input: ComplexPair) -> ComplexPair:
    """Zeros."""
    return ComplexPair(torch.zeros_like(input.re), torch.zeros_like(input.im))


@rule("copy")
def copy(input: ComplexPair, src: Any, non_blocking: bool = False) -> ComplexPair:
    """What `copy_` writes."""
    return ComplexPair(re(src).expand_as(input.re), im(src).expand_as(input.im))


@rule("where")
def where(condition: Any, input: Any = None, other: Any = None) -> Any:
    """Chosen entry by entry; `Tensor.where` has the arguments in another order."""
    if input is None and other is None:
        return torch.where(re(condition))
    if is_pair(condition) or condition.dtype != torch.bool:  # x.where(condition, other)
        condition, input = input, condition
    condition = re(condition)
    return ComplexPair(torch.where(condition, re(input), re(other)), torch.where(condition, im(input), im(other)))
