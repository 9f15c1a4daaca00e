"""End to end, when frozen features are not enough: pretraining and adaptation of backbones."""
