"""Stage two: lightweight heads trained on cached features."""
