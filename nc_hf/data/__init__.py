"""Long-tailed splits of any labelled image data set, and image sets that feed a trainer."""
