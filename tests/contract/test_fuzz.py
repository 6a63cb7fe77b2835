"""A bounded run of the fuzzer, and faults that it must find."""

import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import dflkern
from fuzz import BACKENDS, OPS, check, draw, shrink
from fuzz import assign_model as assignments_of_the_model
from fuzz import box_model as boxes_of_the_model
from fuzz import class_model as classes_of_the_model
from fuzz import model as distributions_of_the_model
from fuzz.cases import build

ROOT = Path(__file__).parents[2]
BOUND = 400  # cases within which a fault must be found


def run(*arguments):
    """`python -m tests.fuzz` from the root of the clone."""
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)


def test_random_calls_agree_with_the_model():
    done = run("--cases", "1500", "--seed", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1500 cases" in done.stdout


def test_a_case_does_not_depend_on_those_before_it():
    first = [draw(3, index) for index in range(5)]
    assert [draw(3, index) for index in reversed(range(5))] == first[::-1]
    assert len({spec.op for spec in (draw(3, index) for index in range(1000))}) == len(OPS)


def altered(name, alter):
    """The library with one function that is given other arguments, or gives other results."""
    functions = {op: getattr(dflkern, op) for op in OPS}
    original = functions[name]

    def function(**arguments):
        return alter(original, arguments)

    return types.SimpleNamespace(**{**functions, name: function})


def with_arguments(**changes):
    """Calls the function with some arguments replaced by a function of them."""

    def alter(original, arguments):
        changed = {name: change(arguments[name]) for name, change in changes.items()}
        return original(**{**arguments, **changed})

    return alter


def noisy(original, arguments):
    found = original(**arguments)
    return found + torch.rand_like(found) * found.detach().abs() * 1e-12


def clamped_in_place(original, arguments):
    with torch.no_grad():
        arguments["target"].clamp_(min=0)
    return original(**arguments)


def gradient_everywhere(original, arguments):
    iou_loss, dfl_loss = original(**arguments)
    logits = arguments["logits"].nan_to_num(0, 0, 0)
    return iou_loss + (logits - logits.detach()).sum() * 1e-6, dfl_loss


def alpha_everywhere(original, arguments):
    if arguments["kind"] == "varifocal":
        arguments = {**arguments, "score": arguments["score"] * arguments["alpha"]}
    return original(**arguments)


def alpha_for_quality(original, arguments):
    factor = arguments["alpha"] if arguments["kind"] == "quality" else 1
    return original(**arguments) * factor


def last_object(original, arguments):
    last = len(arguments["gt_labels"]) - 1
    return original(**{**arguments, "matched": arguments["matched"].clamp(max=last)})


def last_label(original, arguments):
    logits, labels = arguments["class_logits"], arguments["gt_labels"]
    last = logits.shape[arguments["dim"]] - 1
    return original(**{**arguments, "gt_labels": labels.clamp(max=last)})


def lowest_bit(mask):
    if mask is None:
        return None
    return mask.view(torch.uint8).bitwise_and(1).view(torch.bool)


FAULTS = {
    "the bin to the right": ("dfl_loss", with_arguments(target=lambda t: t + 1)),
    "no margin": ("dfl_loss", with_arguments(margin=lambda _: 0.0)),
    "no weight": ("dfl_loss", with_arguments(weight=lambda _: None)),
    "a NaN target taken for 0": ("dfl_loss", with_arguments(target=lambda t: t.nan_to_num(0.0))),
    "a target that is changed": ("dfl_loss", clamped_in_place),
    "targets rounded to bf16": ("dfl_loss", with_arguments(target=lambda t: t.bfloat16())),
    "a small error": ("dfl_decode", lambda f, arguments: f(**arguments) * (1 + 2e-5)),
    "other bits each time": ("dfl_decode", noisy),
    "results in fp64": ("dfl_decode", lambda f, arguments: f(**arguments).double()),
    "no project": ("dfl_decode", with_arguments(project=lambda _: None)),
    "results swapped": ("dfl_loss_and_decode", lambda f, arguments: f(**arguments)[::-1]),
    "no stride": ("decode_boxes", with_arguments(stride=lambda _: None)),
    "strides of another order": (
        "decode_boxes", lambda f, arguments: f(**arguments).transpose(1, 2).contiguous().mT,
    ),
    "no mask": ("box_loss", with_arguments(foreground=lambda _: None)),
    "masks by their lowest bit": ("box_loss", with_arguments(foreground=lowest_bit)),
    "negative weights": ("box_loss", with_arguments(weight=lambda w: w.clamp(min=0))),
    "one IoU for another": (
        "box_loss", with_arguments(iou=lambda kind: "diou" if kind == "ciou" else kind),
    ),
    "the normalizer at least 1": (
        "box_loss", with_arguments(normalizer=lambda n: torch.as_tensor(n).clamp(min=1)),
    ),
    "a gradient off the foreground": ("box_loss", gradient_everywhere),
    "no class weight": ("class_loss", with_arguments(class_weight=lambda _: None)),
    "alpha at the object's class too": ("class_loss", alpha_everywhere),
    "alpha for quality": ("class_loss", alpha_for_quality),
    "another exponent": ("class_loss", with_arguments(gamma=lambda g: g + 0.01)),
    "always detached": ("class_loss", with_arguments(detach_modulation=lambda _: True)),
    "never detached": ("class_loss", with_arguments(detach_modulation=lambda _: False)),
    "the next object": ("class_loss", with_arguments(matched=lambda m: m + 1)),
    "objects out of range taken for the last": ("class_loss", last_object),
    "labels out of range taken for the last": ("class_loss", last_label),
    "scores rounded to bf16": ("class_loss", with_arguments(score=lambda s: s.bfloat16())),
    "a NaN score taken for 0": ("class_loss", with_arguments(score=lambda s: s.nan_to_num(0.0))),
    "the scores' normalizer at least 1": (
        "class_loss", with_arguments(normalizer=lambda n: torch.as_tensor(n).clamp(min=1)),
    ),
    "a class loss slightly off": ("class_loss", lambda f, arguments: f(**arguments) * (1 + 1e-4)),
    "topk off by one": ("task_aligned_assign", with_arguments(topk=lambda k: k + 1)),
    "conflicts among claimers": (
        "task_aligned_assign", with_arguments(conflicts=lambda _: "claimed"),
    ),
    "no second selection": ("task_aligned_assign", with_arguments(topk2=lambda _: None)),
    "the power of the overlap forgotten": (
        "task_aligned_assign", with_arguments(beta=lambda _: 1.0),
    ),
    "objects renamed": (
        "task_aligned_assign", lambda f, arguments: (f(**arguments)[0] + 1, *f(**arguments)[1:]),
    ),
    "scores that are too small": (
        "task_aligned_assign",
        lambda f, arguments: f(**arguments)._replace(score=f(**arguments).score * 0.99),
    ),
}  # fmt: skip


def first_failure(op, product=dflkern):
    """The first case of a function that fails."""
    specs = (draw(0, index, (op,), BACKENDS[:3]) for index in range(BOUND))
    return next((spec for spec in specs if check(spec, product)), None)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_library_is_found(fault):
    op, alter = FAULTS[fault]
    assert first_failure(op, altered(op, alter)) is not None


def test_rounding_decides_few_assignments():
    """Images that the model leaves open; in all others every decision is checked."""
    cases = [build(draw(0, index, ("task_aligned_assign",))) for index in range(100)]
    known = [case.results[0].known.all(1) for case in cases]
    assert np.concatenate(known).mean() > 0.85
    assert sum((case.results[0].value >= 0).sum() for case in cases) > 150


@pytest.mark.parametrize(
    ("op", "module", "name", "value"),
    [
        ("task_aligned_assign", assignments_of_the_model, "is_valid", lambda box: True),
        ("dfl_decode", distributions_of_the_model, "exp", lambda x: x),
        ("box_loss", boxes_of_the_model, "EPS", 1e-3),
        ("class_loss", classes_of_the_model, "_log1p", lambda x: x),
    ],
)
def test_a_fault_in_the_model_is_found(op, module, name, value, monkeypatch):
    monkeypatch.setattr(module, name, value)
    assert first_failure(op) is not None


def test_a_failure_is_made_simpler():
    op, alter = FAULTS["no mask"]
    product = altered(op, alter)
    spec = first_failure(op, product)
    least = shrink(spec, product=product)
    assert check(least, product)
    assert least.mask is not None  # without which there is no fault
    assert (least.dtype, least.backend, least.layout) == ("float32", "cpu", "contiguous")
    assert least.bins <= 3
    assert least.seed == spec.seed
