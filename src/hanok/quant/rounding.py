"""Rounding to int8, which several methods share."""

from torch import Tensor

LARGEST = 127.0  # the code of a group's largest magnitude


def rounded(groups: Tensor, *, is_half: bool) -> tuple[Tensor, Tensor]:
    """Return int8 codes and scales of groups (out, groups, size).

    The codes are rounded with the scale as it is stored, float16 or float32.
    """
    largest = groups.abs().amax(-1)
    scale = largest / LARGEST
    if is_half:
        scale = scale.half()
        inverse = 1 / scale.float()
    else:
        inverse = LARGEST / largest
    inverse = inverse.nan_to_num(posinf=0.0)
    codes = (groups * inverse[..., None]).round().clamp(-LARGEST, LARGEST)
    return codes.char(), scale
