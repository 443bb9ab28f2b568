"""Class-aware regularization against its four steps written as loops: values, gradients, and two processes."""

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import processes  # noqa: F401 - its fork server imports the package
from closeness import assert_same_outputs
from hf_denseseg.models.hfgd.regularization_hfgd import HfgdClassAwareRegularization

IGNORE_INDEX = 255
NAMES = ("car_intra", "car_c2c", "car_c2p")


def regularization(channels: int = 6, **fields: object) -> HfgdClassAwareRegularization:
    defaults = {
        **{"num_labels": 5, "semantic_loss_ignore_index": IGNORE_INDEX, "align_corners": True},
        **{"car_c2c_threshold": 0.5, "car_c2p_threshold": 0.25, "car_center_decay": None},
        **{"car_batch_center": True, "car_mask_ignored_in_c2p": False},
    }
    return HfgdClassAwareRegularization(SimpleNamespace(**defaults | fields), channels)


def scene(classes: int, allowed: list[int], images: int = 2, channels: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes + len(allowed))
    features = 1.5 * torch.randn(images, channels, 4, 3, generator=generator)
    chosen = torch.randint(len(allowed), (images, 4, 3), generator=generator)
    return features, torch.tensor(allowed)[chosen]


def in_loops(features, labels, classes, car_batch_center=True, car_mask_ignored_in_c2p=False):
    """Spec of the three losses, pixel by pixel in float64; labels have the size of the map."""
    images, channels = features.shape[:2]
    pixels = [[features[b, :, y, x] for y in range(4) for x in range(3)] for b in range(images)]
    ids = labels.reshape(images, -1).tolist()
    groups = [range(images)] if car_batch_center else [[b] for b in range(images)]
    scale, distances, center_terms, pixel_terms = 1 / math.sqrt(channels), [], [], []
    for group in groups:
        where = {k: [pixels[b][j] for b in group for j in range(12) if ids[b][j] == k] for k in range(classes)}
        zero = torch.zeros(channels, dtype=features.dtype)
        centers = [sum(found) / len(found) if found else zero for found in where.values()]
        fixed = [center.detach() for center in centers]
        for k in range(classes):
            similarity = torch.stack([scale * centers[k] @ other for other in fixed]).softmax(0)
            above = [similarity[o] - 0.5 / (classes - 1) for o in range(classes) if o != k]
            center_terms.append(sum(each.clamp(min=0) for each in above).clamp(1e-7, 1 - 1e-7))
        for b in group:
            for pixel, k in zip(pixels[b], ids[b], strict=True):
                valid = 0 <= k < classes
                distances.extend((fixed[k] - pixel).abs() if valid else zero)
                energy = [fixed[o] @ fixed[o] if o == k else pixel @ fixed[o] for o in range(classes)]
                similarity = (scale * torch.stack(energy)).softmax(0)
                above = [similarity[o] - 0.25 / (classes - 1) for o in range(classes) if o != k]
                if valid or not car_mask_ignored_in_c2p:
                    pixel_terms.append(sum(each.clamp(min=0) for each in above).clamp(1e-7, 1 - 1e-7))
    means = [sum(values) / max(len(values), 1) for values in (distances, center_terms, pixel_terms)]
    return {"car_intra": (means[0] ** 2).clamp(min=1e-5), "car_c2c": means[1] ** 2, "car_c2p": means[2] ** 2}


@pytest.mark.parametrize("fields", [{}, {"car_batch_center": False}, {"car_mask_ignored_in_c2p": True}], ids=str)
@pytest.mark.parametrize(
    ("classes", "allowed"),
    [
        (5, [0, 1, 2, 3, 4]),
        (5, [0, 3, IGNORE_INDEX]),
        (5, [2]),
        (2, [0, 1, IGNORE_INDEX]),
        (4, [1, 2, -100, IGNORE_INDEX]),
    ],
    ids=["all", "absent and ignored", "single", "two classes", "both ignored ids"],
)
def test_losses_and_gradients_follow_the_equations(classes, allowed, fields):
    features, labels = scene(classes, allowed)
    ours, exact = features.clone().requires_grad_(), features.double().requires_grad_()
    losses = regularization(num_labels=classes, **fields)(ours, labels)
    expected = in_loops(exact, labels, classes, **fields)
    for name in NAMES:
        assert losses[name].dtype == torch.float32 and losses[name].shape == ()
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(losses[name], ours, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected[name], exact, retain_graph=True)
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item() + 1e-12)


def test_intra_loss_pulls_pixels_to_fixed_centers():
    features, labels = scene(5, [0, 1, 4, IGNORE_INDEX])
    features.requires_grad_()
    module = regularization()
    (gradient,) = torch.autograd.grad(module(features, labels)["car_intra"], features)
    centers, _ = module.centers(features.detach(), labels)
    valid = labels != IGNORE_INDEX
    away = features.detach() - centers[0, labels.where(valid, 0)].permute(0, 3, 1, 2)
    mean = (away.abs() * valid[:, None]).mean()  # ignored pixels stay in the mean
    torch.testing.assert_close(gradient, 2 * mean * away.sign() * valid[:, None] / away.numel())


def test_center_to_center_moves_all_pixels_of_a_class_alike_and_no_others():
    features, labels = scene(5, [0, 1, 4, IGNORE_INDEX])
    features.requires_grad_()
    (gradient,) = torch.autograd.grad(regularization()(features, labels)["car_c2c"], features)
    by_pixel = gradient.permute(0, 2, 3, 1)
    assert by_pixel[labels == IGNORE_INDEX].abs().max() == 0
    for k in (0, 1, 4):
        of_class = by_pixel[labels == k]
        assert of_class.abs().max() > 0
        torch.testing.assert_close(of_class, of_class[:1].expand_as(of_class))


@pytest.mark.parametrize("masked", [False, True])
def test_batch_without_a_valid_pixel_is_finite_and_at_its_lower_bounds(masked):
    features = torch.randn(2, 6, 4, 3, requires_grad=True)
    module = regularization(car_mask_ignored_in_c2p=masked)
    losses = module(features, torch.full((2, 8, 9), IGNORE_INDEX, dtype=torch.uint8))
    assert losses["car_intra"].item() == pytest.approx(1e-5)
    assert losses["car_c2c"].item() == pytest.approx((4 / 5 - 0.5) ** 2, rel=1e-5)  # 4 others of 1/5, less t
    others = 0 if masked else 5  # all classes are other classes of an ignored pixel
    assert losses["car_c2p"].item() == pytest.approx((others * (1 / 5 - 0.25 / 4)) ** 2, rel=1e-5, abs=1e-13)
    sum(losses.values()).backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("full", "small"), [(65, 9), (64, 7), (33, 17), (5, 9), (8, 1), (1, 3), (513, 17)])
def test_labels_are_resized_to_the_nearest(full, small, align_corners):
    module = regularization(align_corners=align_corners)
    if align_corners:
        expected = [math.floor(Fraction(i * (full - 1), max(small - 1, 1)) + Fraction(1, 2)) for i in range(small)]
    else:
        expected = [math.floor((i + Fraction(1, 2)) * Fraction(full, small)) for i in range(small)]
    column = torch.arange(full, dtype=torch.int32)[None, :, None]
    assert module.resize_labels(column, (small, 1))[0, :, 0].tolist() == expected
    assert module.resize_labels(column.transpose(1, 2), (1, small))[0, 0].tolist() == expected


def test_autocast_leaves_the_losses_in_float32():
    features, labels = scene(5, [0, 1, 2, IGNORE_INDEX])
    module, half = regularization(), features.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = module(half, labels)
        centers, _ = module.centers(half, labels)
    assert_same_outputs(losses, module(half.float(), labels))
    assert centers.dtype == torch.float32


def test_moving_centers_follow_the_classes_seen_in_training():
    features, labels = scene(5, [0, 3])
    features.requires_grad_()
    module = regularization(car_center_decay=0.9)
    before = torch.randn(1, 5, 6)
    module.class_centers.copy_(before)
    module.eval()(features, labels)
    torch.testing.assert_close(module.class_centers, before, rtol=0, atol=0)
    losses = module.train()(features, labels)
    expected = before.clone()
    expected[:, [0, 3]] = 0.9 * before[:, [0, 3]] + 0.1 * regularization().centers(features, labels)[0][:, [0, 3]]
    torch.testing.assert_close(module.class_centers, expected.detach())
    still, moved = (torch.autograd.grad(losses[name], features, retain_graph=True)[0] for name in NAMES[1:])
    assert still.abs().max() == 0 and moved.abs().max() > 0


CASES = [{}, {"car_batch_center": False}, {"car_mask_ignored_in_c2p": True}, {"car_center_decay": 0.9}]
CASES += [{"backend": "eager"}]  # compiled


def losses_and_gradient(part: slice, backend: str = "", **fields: object) -> list[torch.Tensor]:
    """Losses of some images, and the gradient of their sum for the weight of a linear map before them."""
    features, labels = scene(5, [0, 1, 2, IGNORE_INDEX], images=4)
    labels[2:][labels[2:] == 1] = 3  # class 1 in the first two images only, 3 in the last two only
    labels[:2, 0] = IGNORE_INDEX  # and unequal numbers of valid pixels
    weight = torch.eye(6).requires_grad_()
    module = regularization(**fields)
    compiled = torch.compile(module, backend=backend) if backend else module
    losses = torch.stack(list(compiled(torch.einsum("oc,bchw->bohw", weight, features)[part], labels[part]).values()))
    losses.sum().backward()
    return [losses.detach(), weight.grad, *module.buffers()]


def one_of_two(rank: int, folder: str) -> None:
    """Half of the images in one of two processes; writes each case, gradients averaged over the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = [losses_and_gradient(slice(2 * rank, 2 * rank + 2), **fields) for fields in CASES]
    for _, gradient, *_ in results:
        dist.all_reduce(gradient)
        gradient /= 2
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives_with_the_joined_batch(tmp_path):
    mp.start_processes(one_of_two, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    expected = [losses_and_gradient(slice(None), **fields) for fields in CASES]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=1e-5, atol=1e-7)


def test_compiles_as_one_graph_for_any_size():
    torch._dynamo.reset()
    module = regularization(car_batch_center=False)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    for height, width in ((4, 3), (1, 5), (6, 1)):
        features, labels = torch.randn(2, 6, height, width), torch.randint(5, (2, 9, 11))
        torch.testing.assert_close(compiled(features, labels), module(features, labels))
