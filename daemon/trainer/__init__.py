"""The only home of torch, transformers and peft: one process for one run."""
