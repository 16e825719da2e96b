"""Our sources of data, by what `data._target_` says of them."""

OWN = "distill.data.source."
IMAGES = f"{OWN}images"  # pictures with captions
EDIT_PAIRS = f"{OWN}pairs"
LATENTS = f"{OWN}latents"  # cached or generated
PREFERENCES = f"{OWN}preferences"  # pairs of a winner and a loser
PROMPTS = f"{OWN}prompts"  # captions alone
DRAWN = f"{OWN}drawn"  # rendered on demand
