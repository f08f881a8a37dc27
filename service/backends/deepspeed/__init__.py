"""DeepSpeed kernel injection in FP16, driven by our own step loop and proven at load."""
