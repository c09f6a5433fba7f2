-- Activation patching: what every set of patched features did to every prompt, and which features came first.

CREATE TABLE patching_curves (
    unit_key VARCHAR,
    ranking VARCHAR,            -- how the features were ordered
    seed BIGINT,                -- seed of the ordering
    threshold DOUBLE,           -- threshold that accepted the set; NULL for the first features of the order
    size BIGINT,                -- features patched
    prompt BIGINT,              -- which of the reported prompts
    kl DOUBLE,                  -- KL(patched || target) of the next token, nats
    kl_reverse DOUBLE,          -- KL(target || patched)
    logit_difference DOUBLE,
    recovered DOUBLE,           -- share of the way from the base's logit difference to the target's; NULL where they are equal
    edit DOUBLE                 -- length of the change of the activation, mean over positions
);

CREATE TABLE feature_ranks (
    unit_key VARCHAR,
    ranking VARCHAR,
    seed BIGINT,
    place BIGINT,               -- 1 is the most important
    feature BIGINT,
    effect DOUBLE               -- the ordering's own number: nats of KL, or for acdc the threshold that left it out; NULL
                                -- where the feature does not differ on the prompts the order was found on
);

CREATE TABLE patching_rankings (
    unit_key VARCHAR,
    ranking VARCHAR,
    seed BIGINT,
    prompts BIGINT,             -- prompts the order was found on
    candidates BIGINT,          -- features whose codes differ on them
    passes DOUBLE,              -- forward passes of one prompt from the hook point on
    seconds DOUBLE
);

CREATE VIEW ranked_features AS             -- ranks with what each feature was explained as, where any run explained it
SELECT u.run_id, u.evaluation, u.dictionary, u.hook_point, u.config, r.ranking, r.seed, r.place, r.feature, r.effect,
       e.explanation, e.judge
FROM run_units u
JOIN feature_ranks r ON r.unit_key = u.unit_key
LEFT JOIN (
    SELECT of_unit.dictionary_id, of_unit.hook_point, x.feature, x.explanation, x.judge,
           row_number() OVER (
               PARTITION BY of_unit.dictionary_id, of_unit.hook_point, x.feature
               ORDER BY (x.judge = of_unit.judge) DESC NULLS LAST, of_unit."at" DESC NULLS LAST, x.rowid DESC
           ) AS place          -- the suite's judge before its references, the latest first
    FROM explanations x
    JOIN units of_unit ON of_unit.unit_key = x.unit_key
    WHERE x.status = 'ok'
) e ON e.dictionary_id = u.dictionary_id AND e.hook_point = u.hook_point AND e.feature = r.feature AND e.place = 1
WHERE u.status = 'done';
