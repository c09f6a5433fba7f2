-- Causal trees: upstream features that a feature's activation depends on.

CREATE TABLE causal_edges (
    unit_key VARCHAR,
    target BIGINT,              -- the feature the tree is of, at the unit's hook point
    depth BIGINT,               -- 1: from the target to its parents; one more for each hook point further down
    child_hook VARCHAR,
    child BIGINT,
    parent_hook VARCHAR,
    parent BIGINT,
    place BIGINT,               -- 1 is the parent with the largest share
    share DOUBLE,               -- of the child's activation that is lost when the parent is ablated, mean over contexts
    low DOUBLE,                 -- 95% interval of the share
    high DOUBLE,
    estimate DOUBLE,            -- the share by the gradient, which chose what was ablated
    p DOUBLE,                   -- one-sided t-test over contexts
    p_holm DOUBLE,              -- corrected for every feature of the parent's hook point that is active in the contexts
    significant BOOLEAN,
    active BIGINT,              -- contexts in which the parent is active
    contexts BIGINT
);

CREATE TABLE causal_nodes (
    unit_key VARCHAR,
    hook_point VARCHAR,
    feature BIGINT,
    tokens VARCHAR,             -- JSON: most frequent tokens among its strongest firings as [token, share]
    maximum DOUBLE,             -- its largest activation in the scoring text
    activation DOUBLE,          -- mean over the contexts; NULL at the first hook point and of parents that are not followed; so is the rest
    contexts BIGINT,
    candidates BIGINT,          -- features of the hook point before that are active in them
    tested BIGINT,              -- of these, ablated one by one
    checked BIGINT,             -- of those that the gradient left out, ablated all the same, drawn at random
    missed BIGINT,              -- of the checked, those that would have been significant
    parents BIGINT,             -- significant ones
    together DOUBLE,            -- share lost when all of these are ablated at once
    random DOUBLE,              -- share lost when as much as the strongest parent is added along a random direction
    estimate_r DOUBLE           -- correlation of the gradient's estimate with the exact share, over tested and checked
);
