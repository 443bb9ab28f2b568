"""Layers that take the place of a model's own; stateless, as the kernels library asks."""

from torch import Tensor, nn

from . import _plain
from ._autograd import sample
from ._backends import unserved


class MultiScaleDeformableAttention(nn.Module):
    """The sampling step of Deformable DETR and its relatives in transformers, looked up under this name."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Sum the values `(B, S, M, D)` at the locations with the weights: `(B, Q, M * D)`.

        What the build does not serve is computed in plain torch: a layer has to do what the model's own did.

        `level_start_index` and `im2col_step` are not needed; the shapes are read from the list of Python numbers, so
        that no device is synchronized.
        """
        shapes = [int(size) for shape in value_spatial_shapes_list for size in shape]
        if unserved(value, sampling_locations):
            return _plain.sample(value, sampling_locations, attention_weights, shapes)
        return sample(value, sampling_locations, attention_weights, shapes)


__all__ = ["MultiScaleDeformableAttention"]
