"""What a step says on a machine without a GPU, after all that comes before its first launch."""

NO_GPU = "no GPU: stopped before the first launch"
