"""Fine-tuning with labels: a backbone's adapter and a head on it, from options to report."""
