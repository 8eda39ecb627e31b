"""The frozen CLIP: its two towers, where its weights come from, the small CLIP that is trained on the captions."""
