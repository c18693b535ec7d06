"""What trainings against a discriminator share."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


def hinge(real: Tensor, drawn: Tensor) -> Tensor:
    """Return the discriminator's loss, (), for logits of any shape of what is real and drawn.

    Lim & Ye 2017, arXiv:1705.02894, with the half that latent diffusion puts before it.
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + drawn).mean())


def fixed(discriminator: nn.Module, *inputs: Tensor) -> Tensor:
    """Return the discriminator's logits, as it shapes them, of inputs that alone learn.

    inputs: tensors of the shapes that the discriminator takes
    """
    parameters = {name: value.detach() for name, value in discriminator.named_parameters()}
    return functional_call(discriminator, parameters, inputs)  # type: ignore[no-any-return]
