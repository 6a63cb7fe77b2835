"""task_aligned_assign: kernel, reference and the definition in loops, and faults in the last."""

import pytest
import torch

from assignment import FAULTS, KINDS, by_loops, close_images, differences, run, scene

VARIANTS = (
    {},
    {"topk": 7, "topk2": 1},
    {"topk": 13, "alpha": 1.0, "iou": "iou", "conflicts": "all", "min_side": 0.0},
    {"topk": 3, "conflicts": "claimed", "iou": "giou"},
    {"topk": 5, "topk2": 2, "iou": "diou", "alpha": 0.7, "beta": 3.3},
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=("reference", "cpu"))
def backend(request):
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [False, True])
def test_the_kernel_assigns_as_the_reference(kind, trained):
    close = total = 0
    for seed in range(6):
        given = scene(seed, kind, trained)
        for options in VARIANTS:
            undecided = close_images(given, **options)
            close, total = close + len(undecided), total + 3
            images = set(range(3)) - undecided
            found = run(given, **options)
            other, gap = differences(found, run(given, "reference", **options), images)
            assert other == 0, (seed, options)
            assert gap <= 2e-6, (seed, options)
    assert close <= 0.05 * total


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", ["crowd", "doubles", "tiny"])
def test_both_assign_as_the_definition_in_loops(backend, kind, options):
    given = scene(10, kind, trained=True)
    wanted = by_loops(given, **options)
    other, gap = differences(run(given, backend, **options), wanted)
    assert not close_images(given, **options)
    assert other == 0
    assert gap <= 1e-5


# For each fault, a scene and options in which it matters
CAUGHT_BY = {
    "topk off by one": ("crowd", {}),
    "no minimum side": ("tiny", {}),
    "conflicts among claimers only": ("doubles", {"topk": 2, "alpha": 2.0}),
    "conflicts among all objects": ("crowd", {"iou": "iou"}),
    "conflicts by metric": ("crowd", {}),
    "conflicts to the last object": ("doubles", {}),
    "ties to the last anchor": ("ties", {"topk": 3}),
    "topk2 before conflicts": ("crowd", {"topk": 10, "topk2": 2}),
    "metrics of 0 claimed": ("tiny", {}),
    "score not normalized": ("usual", {}),
}


def with_ties(given):
    """Every second anchor has the box and the logits of the one before it."""
    for name in ("boxes", "class_logits"):
        given[name][:, 1::2] = given[name][:, : given[name].shape[1] - 1 : 2]
    return given


def scene_for(kind):
    return with_ties(scene(11, "crowd")) if kind == "ties" else scene(11, kind)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_definition_is_found(backend, fault):
    kind, options = CAUGHT_BY[fault]
    given = scene_for(kind)
    found = run(given, backend, **options)
    other, gap = differences(found, by_loops(given, **options))
    assert (other, gap <= 1e-5) == (0, True)
    other, gap = differences(found, by_loops(given, fault, **options))
    assert other > 0 or gap > 1e-3
