"""Training: the data set, the autoencoder, the text encoder and the UNet."""
