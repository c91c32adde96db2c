"""The optimisation of one run."""

from typing import Literal

from pydantic import Field

from flowerray.config import Config


class TrainConfig(Config):
    """The optimisation of one run."""

    epochs: int = Field(15, ge=1, le=100_000)
    """Passes over the training images."""
    images: int = Field(0, ge=0, le=10**12)
    """Images drawn, repeats included, after which the training ends, also in mid-epoch and
    whatever `epochs` says: trainings of other batches are then equally long; 0 = after `epochs`."""
    max_repeats: int = Field(0, ge=0)
    """Times that an epoch shows an image on average at most, where classes are very unequal;
    epochs are then shorter, and show a part of the large classes; 0 = as often as full batches of
    distinct classes need."""
    classes_per_batch: int = Field(12, ge=2, le=10_000)
    """P: distinct classes of a global batch."""
    images_per_class: int = Field(4, ge=2, le=10_000)
    """K: images of each class in a global batch; a batch holds P x K images over all workers."""
    lr: float = Field(1e-4, gt=0, le=1)
    """AdamW's peak learning rate for the backbone; for the default one each method has its own."""
    head_lr_factor: float = Field(10.0, gt=0, le=1e4)
    """The projection's and the loss parameters' learning rate, as a multiple of `lr`."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning rate of each of the backbone's layers as a multiple of the next one's, so that early
    ones change less; 1 = all alike, 0.65 to 0.9 suit transformers."""
    weight_decay: float = Field(1e-4, ge=0, le=100)
    """AdamW's decoupled decay on matrices and kernels; never on biases, norms or centers."""
    warmup_epochs: float = Field(1.0, ge=0, le=100_000)
    """Linear warm-up, in epochs, before the cosine to zero."""
    grad_clip: float = Field(5.0, ge=0)
    """Largest global L2 norm of the gradient; 0 = no clipping."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 = autocast; auto = whichever trains faster with this backbone on this device, measured
    once.
    """
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay a step of the weights' moving average, which is then what is validated and exported; 0
    = off.
    """
    validate_every: int = Field(1, ge=1)
    """Epochs from one validation to the next; the last epoch is always validated. Only a validated
    epoch can be the best one."""
    deterministic: bool = False
    """The same bits each time on a GPU of the same kind, also after a kill, at some cost in speed:
    kernels that add in one order. Those that have none are warned of by name. CPUs need nothing."""
    compile: bool = False
    """Compile the embedder with torch.compile."""
    patience: int = Field(0, ge=0)
    """Stop after so many validated epochs without a better val MAP@R (a hardened run: val
    adversarial R@1, at full epsilon); 0 = never.
    """
    checkpoint_every_steps: int = Field(50, ge=1)
    """State is saved after so many steps, and after each epoch."""
    log_every_steps: int = Field(10, ge=1)
    """Steps between two records of the loss (and between two host syncs)."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of the weights that start at random, the batches, the augmentation and the mined tuples."""
