-- What a judge's answers were had without, and why a node of a causal tree has no whole explanation.

ALTER TABLE judge_calls ADD COLUMN left_out VARCHAR;           -- settings that the endpoint refuses, so that the call was made without; NULL: none, or not known
ALTER TABLE causal_nodes ADD COLUMN explanation_error VARCHAR; -- why the judge's call failed, or that the explanation was cut off
