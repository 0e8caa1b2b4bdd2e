"""A matrix for the kernels that holds codes."""

from __future__ import annotations

from crosspool.kernels import native_structs as ns
from crosspool.models.held_forms import HeldForm


def hold_codes(matrix: ns.Matrix, form: HeldForm) -> None:
    """Sets the fields that tell the kernels how to read a matrix of this form."""
    matrix.encoding = ns.GROUPED
    matrix.codes, matrix.scales = ns.CODES[form.codes], ns.SCALE_TYPES[form.scales]
    matrix.group, matrix.offset = form.group, ns.OFFSETS[form.offset]
