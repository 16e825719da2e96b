"""The forms in which `distill.export` writes a student, and its model card."""

NAMINGS = ("diffusers", "kohya")  # of tensors in a LoRA file; the first is the default
