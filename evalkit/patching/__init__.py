"""Activation patching: copy features' codes from a target run into a base run, and see what the model then says."""
