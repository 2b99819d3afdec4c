"""The Open Inference Protocol v2 as Triton speaks it, over the same Variants, batches and limits as /v1."""
