"""Class-aware regularization of the high-level features (Sec. 3.2 of HFGD; Huang et al., "CAR", ECCV 2022).

Three losses on the pixels of one map pull each pixel to the center of its class (intra), push centers apart (center to
center, c2c) and push pixels away from the centers of other classes (center to pixel, c2p).

Shapes: B images, P = h * w pixels of the map, C channels, K classes.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx
from transformers.utils.generic import maybe_autocast

from hf_denseseg.models.hfgd.configuration_hfgd import HfgdConfig
from hf_denseseg.models.inputs import ignored_id

INTRA_FLOOR = 1e-5  # lower bound of the intra loss
CLIP = 1e-7  # similarities to other classes stay in [CLIP, 1 - CLIP], the epsilon of Keras


class HfgdClassAwareRegularization(nn.Module):
    """The three losses of class-aware regularization; no parameters.

    Everything is computed in float32, also under autocast. In distributed training the centers and the means that
    are squared are those of the batches of all processes together, so N processes give the losses of one process
    with the joined batch, and its gradients once these are averaged over the processes.

    Args:
        config: `num_labels` classes, all of which take part (absent ones with a zero center); `car_*` fields.
        channels: C, width of the regularized map.
    """

    class_centers: torch.Tensor

    def __init__(self, config: HfgdConfig, channels: int) -> None:
        super().__init__()
        self.num_labels = max(int(config.num_labels or 0), 2)  # one logit tells two classes apart
        self.ignore_index = ignored_id(config)
        self.align_corners = config.align_corners
        self.batch_center = config.car_batch_center
        self.center_decay = config.car_center_decay
        self.mask_ignored_in_c2p = config.car_mask_ignored_in_c2p
        others = max(self.num_labels - 1, 1)
        self.c2c_threshold = config.car_c2c_threshold / others
        self.c2p_threshold = config.car_c2p_threshold / others
        self.scale = channels**-0.5
        if self.center_decay is not None:
            # Zeros, as for a class that has not occurred yet; the authors start from random values.
            self.register_buffer("class_centers", torch.zeros(1, self.num_labels, channels))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the three losses, not weighted.

        Args:
            features: (B, C, h, w), the map that the losses act on.
            labels: (B, H, W) integers; outside 0..num_labels-1, or equal to the ignore index, means ignored.

        Returns:
            `car_intra`, `car_c2c` and `car_c2p`, float32 scalars.
        """
        with maybe_autocast(features.device.type, enabled=False):
            pixels = features.float().flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, P, C)
            members = self._members(labels, (features.shape[2], features.shape[3]))  # (B, P, K)
            centers, counts = self._centers(pixels, members.float())
            if self.center_decay is not None:
                centers = self._moving_centers(centers, counts, self.center_decay)
            distance = self._distance_to_own_center(pixels, centers.detach(), members)  # (B, P)
            between_centers = self._similarity_to_other_centers(centers)  # (1 or B, K)
            between_pixels = self._similarity_to_other_classes(pixels, centers.detach(), members)  # (B, P)
            everywhere = torch.ones_like(between_pixels)
            # By default ignored pixels take part here, with every class as another one, as in the authors' code.
            counted = members.any(dim=2).float() if self.mask_ignored_in_c2p else everywhere
            intra, c2c, c2p = self._means(
                (distance, everywhere),
                (between_centers, torch.ones_like(between_centers)),
                (between_pixels, counted),
            )
            # The mean comes before the square, in all three.
            return {
                "car_intra": intra.square().clamp(min=INTRA_FLOOR),
                "car_c2c": c2c.square(),
                "car_c2p": c2p.square(),
            }

    def resize_labels(self, labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Nearest label of each pixel of a map.

        Args:
            labels: (B, H, W).
            size: (height, width) of the map.

        Returns:
            (B, height, width) of the same dtype.
        """
        rows = _nearest_positions(labels.shape[1], size[0], self.align_corners, labels.device)
        columns = _nearest_positions(labels.shape[2], size[1], self.align_corners, labels.device)
        return labels.index_select(1, rows).index_select(2, columns)

    def centers(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean feature of each class, over the batch of all processes or (`car_batch_center` off) per image.

        Args:
            features: (B, C, h, w).
            labels: (B, H, W) as in `forward`.

        Returns:
            Centers (1 or B, K, C), zero for an absent class, and the number of pixels of each (1 or B, K, 1).
        """
        with maybe_autocast(features.device.type, enabled=False):
            members = self._members(labels, (features.shape[2], features.shape[3]))
            return self._centers(features.float().flatten(2).transpose(1, 2), members.float())

    def _members(self, labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Membership of each pixel in each class, (B, P, K) of bool; an ignored pixel is in none."""
        labels = self.resize_labels(labels, size).flatten(1).long()
        classes = torch.arange(self.num_labels, device=labels.device)
        return (labels[..., None] == classes) & (classes != self.ignore_index)

    def _centers(self, pixels: torch.Tensor, members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sums, counts = members.transpose(1, 2) @ pixels, members.sum(dim=1)[..., None]  # (B, K, C), (B, K, 1)
        if self.batch_center:
            both = torch.cat([sums, counts], dim=2).sum(dim=0, keepdim=True)
            sums, counts = self._sum_over_processes(both).split([pixels.shape[2], 1], dim=2)
        return sums / counts.clamp(min=1), counts

    def _moving_centers(self, centers: torch.Tensor, counts: torch.Tensor, decay: float) -> torch.Tensor:
        """The moving centers after this batch; no gradient goes through them."""
        moved = self.class_centers.float()
        if self.training:
            moved = moved + (1 - decay) * (centers.detach() - moved) * (counts > 0)
            with torch.no_grad():
                self.class_centers.copy_(moved)
        return moved

    def _distance_to_own_center(
        self, pixels: torch.Tensor, centers: torch.Tensor, members: torch.Tensor
    ) -> torch.Tensor:
        """|center - pixel|, mean over the channels: (B, P); 0 for ignored pixels, which count in later means."""
        own = members.float() @ centers  # (B, P, C)
        return (own - pixels).abs().mean(dim=2) * members.any(dim=2)

    def _similarity_to_other_centers(self, centers: torch.Tensor) -> torch.Tensor:
        """Similarity of each center to the others (1 or B, K); gradients flow through the query center only."""
        similarity = (self.scale * centers @ centers.detach().transpose(1, 2)).softmax(dim=2)  # (1 or B, K, K)
        own = torch.eye(self.num_labels, dtype=torch.bool, device=centers.device)
        return _sum_above(similarity, self.c2c_threshold, own)

    def _similarity_to_other_classes(
        self, pixels: torch.Tensor, centers: torch.Tensor, members: torch.Tensor
    ) -> torch.Tensor:
        """Similarity of each pixel to centers of other classes (B, P); its own class has the center's energy."""
        own_energy = centers.square().sum(dim=2)[:, None]  # (1 or B, 1, K)
        energy = torch.where(members, own_energy, pixels @ centers.transpose(1, 2))  # (B, P, K)
        return _sum_above((self.scale * energy).softmax(dim=2), self.c2p_threshold, members)

    def _means(self, *values_and_weights: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Weighted mean of each tensor over the batches of all processes."""
        totals = torch.stack([torch.stack([(value * w).sum(), w.sum()]) for value, w in values_and_weights])
        totals = self._sum_over_processes(totals)
        return (totals[:, 0] / totals[:, 1].clamp(min=1)).unbind()

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the training processes; evaluation is local, since its processes may see unequal batch counts."""
        if self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return _sum_over_processes(values)
        return values


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too: each process's values take part in the loss of all of them."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: torch.Tensor) -> torch.Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
        return _SumOverProcesses.apply(gradient)


@torch.compiler.disable  # torch 2.11 silently loses the gradient when it traces this; one process never comes here
def _sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    return _SumOverProcesses.apply(values)


def _nearest_positions(length: int, steps: int, align_corners: bool, device: torch.device) -> torch.Tensor:
    """Nearest of `length` positions for each of `steps`, in integers: exact, and without a branch on sizes.

    Aligned corners: i (length - 1) / (steps - 1), halves up. Otherwise the position under the middle of step i.
    """
    index = torch.arange(steps, device=device)
    if align_corners:
        gaps = torch.full_like(index, steps - 1).clamp(min=1)  # a single step takes position 0
        return (2 * index * (length - 1) + gaps) // (2 * gaps)
    return (2 * index + 1) * length // (2 * steps)


def _sum_above(similarity: torch.Tensor, threshold: float, own: torch.Tensor) -> torch.Tensor:
    """Excess of the similarities to other classes over the threshold, summed over the last axis (K)."""
    return F.relu(similarity - threshold).masked_fill(own, 0).sum(dim=-1).clamp(CLIP, 1 - CLIP)


__all__ = ["HfgdClassAwareRegularization"]
