-- Concepts: which features tell them, and what setting or adding a feature does to what the model writes.

CREATE TABLE concept_features (
    unit_key VARCHAR,
    concept VARCHAR,
    source VARCHAR,             -- feature | given | neuron | probe | null
    place BIGINT,               -- 1 is the best on the half of the texts that chose
    feature BIGINT,             -- NULL for the probe
    sign BIGINT,                -- -1: the lower tail, turned round
    auroc_chosen DOUBLE,        -- on the half that chose
    auroc DOUBLE,               -- on the other half; so are the rest
    p DOUBLE,                   -- one-sided Mann-Whitney
    p_holm DOUBLE,              -- corrected for every test of the unit with this source
    recall DOUBLE,              -- share of the texts showing the concept on which it is above 0
    level_texts BIGINT[],       -- texts at weak, middle and strong activation
    level_precision DOUBLE[],   -- share of them that show the concept; NULL where there are none
    texts BIGINT                -- texts of the half that checked
);

CREATE TABLE concept_texts (
    unit_key VARCHAR,
    concept VARCHAR,
    feature BIGINT,             -- the best feature of the concept
    sign BIGINT,
    held_out BOOLEAN,           -- in the half that checked
    label BOOLEAN,              -- shows the concept
    text VARCHAR,
    value DOUBLE,               -- the feature's largest code over the kept tokens, times sign
    rating DOUBLE               -- 0 to 3, by the judge; NULL where it was not asked or failed
);

CREATE TABLE steering_texts (
    unit_key VARCHAR,
    feature BIGINT,
    mode VARCHAR,               -- clamp | steer
    strength DOUBLE,            -- times the feature's largest activation; NULL for the model as it is
    arm VARCHAR,                -- none | feature | random_feature | random_direction
    prompt VARCHAR,
    draw BIGINT,                -- 0 greedy, from 1 sampled
    text VARCHAR,               -- what the model wrote
    named BOOLEAN,              -- holds one of the feature's words
    named_judge DOUBLE,         -- probability of yes, by the judge; NULL where it was not asked or failed
    nll DOUBLE,                 -- nats a token of the text under the model as it is
    cost DOUBLE,                -- nll minus that of the same draw of the model as it is
    distinct_tokens DOUBLE,     -- share of the text's tokens that are not repeats
    shift DOUBLE,               -- change of the log probability of the feature's words, along the unsteered reply (draw 0)
    kl DOUBLE,                  -- KL(as it is || changed) of the next token, nats
    edit DOUBLE,                -- length of amount times direction
    raised VARCHAR[],           -- tokens most raised along the unsteered reply
    lowered VARCHAR[],
    words VARCHAR[],            -- the feature's words
    maximum DOUBLE              -- its largest activation
);
