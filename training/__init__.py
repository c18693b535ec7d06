"""Training: the data set, the autoencoder, the text encoder and the UNet."""

import runtime  # noqa: F401  # which refuses a stranger's package `engine`
