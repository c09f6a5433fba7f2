-- Causal trees: what of an edge is the removed vector itself, read again at the later hook point; and which edges were drawn to check the gradient.

ALTER TABLE causal_edges ADD COLUMN carried DOUBLE;     -- share of the child's activation lost were the removed vector missing at the later hook point and nothing computed from it
ALTER TABLE causal_edges ADD COLUMN checked BOOLEAN;    -- drawn at random from what the gradient left out: tells what it misses, and is no parent
