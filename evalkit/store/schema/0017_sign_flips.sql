-- Edges of causal trees: p by sign flips over contexts, beside the t-test's.

ALTER TABLE causal_edges ADD COLUMN p_flips DOUBLE;       -- corrected for as many candidates as p_holm; NULL in earlier runs
