"""Image-caption pairs: architectures, batches, loop and validation of dual encoders."""
