"""Image classifiers: the CIFAR ResNets for timm, and one way to load, tap and change any classifier."""
