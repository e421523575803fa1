"""Neural collapse for long-tailed image classification with timm and Hugging Face."""

__version__ = "0.1.0"
