"""What a judge answered: an explanation, a refusal, or nothing."""
