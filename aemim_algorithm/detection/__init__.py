"""Object detection and instance segmentation on a pre-trained ViT: Mask R-CNN, its data and its score."""
