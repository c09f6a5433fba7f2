"""Change activations at hook points and run the rest of the model: ablation, patching between prompts, paths, generation."""
