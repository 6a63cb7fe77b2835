"""What a run of the demo can vary, in one value."""

from __future__ import annotations

import dataclasses

STRIDES = (4, 8, 16, 32)  # P2 to P5
NUM_CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes, schedule and loss gains of one training run.

    The defaults are the demo; tests run the same code on a smaller one. Lengths are in pixels.
    """

    epochs: int = 5
    seed: int = 0
    device: str = "cpu"
    backend: str = "auto"
    decode_backend: str = "auto"  # of decode_boxes, where `backend` has no kernel for it yet

    image_size: int = 128  # a multiple of 32, the largest stride
    min_digits: int = 3
    max_digits: int = 8
    min_height: float = 10.0
    max_height: float = 90.0
    clutter: int = 6
    validation_scenes: int = 256

    num_bins: int = 16  # K: bins 0 to 15, so 4·16 box channels, not 4·17
    width: int = 48

    steps_per_epoch: int = 160
    batch_size: int = 16
    learning_rate: float = 8e-3
    weight_decay: float = 0.02
    warmup_steps: int = 50
    clip_norm: float = 10.0

    static_steps: int = 160  # the first steps, assigned without a look at predictions
    prior_cells: float = 3.0  # the side of the squares by which they are: 12 pixels on P2, 96 on P5
    top_k: int = 10
    alpha: float = 1.0
    beta: float = 6.0
    box_gain: float = 2.0
    class_gain: float = 1.0
    dfl_gain: float = 0.5

    mistakes: tuple[str, ...] = ()  # of `mistakes.MISTAKES`, made on purpose

    @property
    def head_bins(self) -> int:
        """How many bins the head gives a side: K, unless it has one too many."""
        return self.num_bins + ("extra-bin" in self.mistakes)

    @property
    def steps(self) -> int:
        """Training steps of the whole run."""
        return self.epochs * self.steps_per_epoch
