"""Training images: how they are decoded, varied and handed over in batches."""
