-- Case studies of single features: what they fire on, and what their absence or presence does to the next token.

CREATE TABLE input_bins (
    unit_key VARCHAR,
    feature BIGINT,
    "of" VARCHAR,               -- feature | neuron: the dimension of the hook point closest to the feature, as contrast
    neuron BIGINT,              -- which dimension; NULL for the feature
    sign BIGINT,                -- 1, or -1 where the dimension falls as the feature rises; NULL for the feature
    scale VARCHAR,              -- range: tenths of the range | decile: tenths of the firings | top: the strongest contexts alone
    bin BIGINT,                 -- 0 is the weakest
    low DOUBLE,                 -- smallest and largest activation it may hold (range) or holds (decile, top)
    high DOUBLE,
    n BIGINT,                   -- firings in it
    tokens VARCHAR,             -- JSON: most frequent tokens as [token, share of the bin]
    main_class VARCHAR,         -- class of tokens the feature as a whole fires on most (case and spaces folded, numbers as one)
    main_share DOUBLE,          -- its share of the bin; NULL where the bin is empty
    top_class VARCHAR,          -- the bin's own most frequent class
    top_share DOUBLE,
    contexts VARCHAR            -- JSON: objects of window, position, value, tokens, at (index of the firing token)
);

CREATE TABLE logit_effects (
    unit_key VARCHAR,
    feature BIGINT,
    edit VARCHAR,               -- ablate | add | clamp
    ranked_by VARCHAR,          -- change: of the log-probability | mass: change of the probability | direct: through the unembedding
    side VARCHAR,               -- lowered | raised
    place BIGINT,               -- 1 is the token most lowered or raised
    token_id BIGINT,
    token VARCHAR,
    change DOUBLE,              -- of the log-probability, nats, mean over contexts; low, high: 95% bootstrap interval
    low DOUBLE,
    high DOUBLE,
    mass DOUBLE,                -- change of the probability, mean over contexts
    direct DOUBLE,              -- change of the centred logit through the residual stream alone; NULL off the residual stream
    probability DOUBLE,         -- without the edit, mean over contexts
    contexts BIGINT
);

CREATE TABLE ablation_contexts (
    unit_key VARCHAR,
    feature BIGINT,
    edit VARCHAR,
    "window" BIGINT,
    position BIGINT,            -- where the next token is read: the feature's strongest position of the window
    code DOUBLE,                -- its code there
    edited BIGINT,              -- positions up to there that are edited
    kl DOUBLE,                  -- KL(original || edited) of the next token, nats
    tokens VARCHAR,             -- JSON: the last tokens up to the position
    next_token VARCHAR,         -- what the text goes on with
    next_change DOUBLE,         -- change of its log-probability
    lowered VARCHAR,            -- token whose probability falls most, and the change of its log-probability
    lowered_change DOUBLE
);
