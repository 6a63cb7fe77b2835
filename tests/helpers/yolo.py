"""Real Ultralytics models from their YAML files, and small random batches for their tasks."""

import copy

import torch

SIZE = 128  # pixels; 336 anchors
TASKS = {
    "detect": "DetectionModel", "segment": "SegmentationModel", "pose": "PoseModel",
    "obb": "OBBModel",
}  # fmt: skip
SUFFIX = {"detect": "", "segment": "-seg", "pose": "-pose", "obb": "-obb"}


def build(family, task="detect"):
    """A model such as YOLOv8n, with random weights that depend on nothing but its kind."""
    from ultralytics.cfg import get_cfg
    from ultralytics.nn import tasks

    torch.manual_seed(0)
    name = f"{family}{SUFFIX[task]}.yaml"
    model = getattr(tasks, TASKS[task])(name, nc=3, verbose=False)
    model.args = get_cfg()
    return model.train()


def batch_for(task="detect", objects=(3, 2), seed=0):
    """Random images, and objects of 10 to 40 pixels with all that the task's loss asks for."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(shape, generator=generator)

    images, count = len(objects), sum(objects)
    boxes = torch.cat((random(count, 2) * 0.4 + 0.3, random(count, 2) * 0.45 + 0.15), -1)
    batch = {
        "img": random(images, 3, SIZE, SIZE),
        "batch_idx": torch.repeat_interleave(torch.arange(len(objects)), torch.tensor(objects)),
        "cls": torch.arange(count).remainder(3)[:, None].float(),
        "bboxes": boxes,
    }
    batch["batch_idx"] = batch["batch_idx"].float()
    if task == "segment":
        batch["masks"] = random(images, SIZE // 4, SIZE // 4).mul(max(objects) + 1).floor()
    if task == "pose":
        visible = torch.ones(count, 17, 1)
        batch["keypoints"] = torch.cat((random(count, 17, 2), visible), -1)
    if task == "obb":
        batch["bboxes"] = torch.cat((boxes, random(count, 1)), -1)
    return batch


def items_of(detached):
    """The parts of a loss as a vector: Ultralytics 8.4 names them, 8.3 does not."""
    return torch.stack(list(detached.values())) if isinstance(detached, dict) else detached


def step(model, batch):
    """The parts of the loss of a copy of the model, and the gradients of its parameters by name."""
    model = copy.deepcopy(model)
    loss, parts = model.loss(copy.deepcopy(batch))
    loss.sum().backward()
    return items_of(parts), {
        name: each.grad for name, each in model.named_parameters() if each.grad is not None
    }


def train(model, steps):
    """The losses of optimiser steps on one batch after another, as Ultralytics' trainer clips."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    losses = []
    for index in range(steps):
        loss, parts = model.loss(batch_for(objects=(3, 2, 4, 1), seed=index))
        optimizer.zero_grad()
        loss.sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        losses.append(items_of(parts))
    return torch.stack(losses)
