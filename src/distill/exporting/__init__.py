"""What `distill.export` writes of a student, and the model card beside it."""

NAMINGS = ("diffusers", "kohya")  # of the tensors in a file of a LoRA; the first if none is given
